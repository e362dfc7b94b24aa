"""What is predicted of a run's memory, whichever source predicts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..resolve import resolve
from ..spec import Json, Resolved, RunSpec

KINDS = (
    "frozen_weights", "trainable_weights", "gradients", "optimizer", "temporaries", "activations", "logits", "workspace",
    "communication",
)  # fmt: skip
"""Kinds of bytes that PyTorch has allocated. `temporaries` are the optimizer step's; `logits` include their softmax and their
gradients; `workspace` is cuBLAS's; `communication` the buffers between GPUs."""


@dataclass(frozen=True)
class Moment:
    """The highest point of one phase of a step, in one part of the model."""

    phase: str
    """forward, backward or optimizer."""
    part: int
    """-1 before the layers, a layer's number in it, and the number of layers after them."""
    bytes: Mapping[str, int]
    """Bytes of each of KINDS."""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one training run on one GPU."""

    spec: Resolved
    convention: str
    model_name: str
    method_name: str
    total_parameters: int
    trainable_parameters: int
    frozen_weights: int
    trainable_weights: int
    gradients: int
    optimizer: int
    source: str = "closed-form"
    """`closed-form` or `trace`."""
    left: tuple[str, ...] = ()
    """Sentences on what one may expect to be trained, or quantized, and is not: `ParameterReport.frozen`."""
    unknown: str = ""
    """Why the closed form does not know the step, so that only a trace has `moments`; empty where it does."""
    moments: tuple[Moment, ...] = ()
    """A step's high points, in order. A convention has none: it leaves out all that depends on the batch."""
    reserved: int | None = None
    """Bytes that PyTorch takes from the driver."""
    context: int | None = None
    """Bytes that CUDA and the libraries' code take beside it."""
    outside: int = 0
    """Bytes of paged optimizer states, in memory that the GPU and the CPU share and that PyTorch does not count."""
    cpu: int = 0
    """Bytes that are offloaded to the CPU's memory."""
    step_seconds: float | None = None
    """What a step takes on the chosen GPU, without what passes between several. Only a trace tells it; None where it cannot."""

    @property
    def weights(self) -> int:
        return self.frozen_weights + self.trainable_weights

    @property
    def states(self) -> int:
        """Weights + gradients + optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> Moment | None:
        """The highest moment of the step."""
        return max(self.moments, key=lambda m: m.total, default=None)

    @property
    def allocated(self) -> int | None:
        """Bytes allocated at the peak."""
        return self.peak.total if self.peak else None

    @property
    def process(self) -> int | None:
        """Bytes that nvidia-smi shows: reserved, and the context."""
        return None if self.reserved is None or self.context is None else self.reserved + self.context

    @property
    def needed(self) -> int:
        """Bytes that a GPU must have: the process where it is predicted, the states where a convention counts."""
        return self.process or self.states

    def to_dict(self) -> Json:
        parts = ("weights", "frozen_weights", "trainable_weights", "gradients", "optimizer")
        peak = dict(self.peak.bytes) if self.peak else dict.fromkeys(("activations", "logits", "workspace"))
        return {
            "spec": self.spec.to_dict(),
            "convention": self.convention,
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "components": {part: getattr(self, part) for part in parts} | peak,
            "states_bytes": self.states,
            "peak_allocated_bytes": self.allocated,
            "peak_reserved_bytes": self.reserved,
            "process_bytes": self.process,
            "paged_bytes": self.outside,
            "cpu_bytes": self.cpu,
            "timeline": [{"phase": m.phase, "part": m.part, "bytes": m.total, **m.bytes} for m in self.moments] or None,
            "step_seconds": self.step_seconds,
            "run_seconds": None if self.step_seconds is None else self.step_seconds * self.spec.steps,
            "source": self.source,
        } | ({"unknown": self.unknown} if self.unknown else {})


def settings(spec: Json) -> str:
    """Batch, length and precision of a recorded run, and what else is not as usual, in words."""
    usual = resolve(RunSpec(model=spec["model"], method=spec["method"], gpu=spec["gpu"])).to_dict()
    own = [f"{spec['batch_size']} × {spec['sequence_length']}", spec["precision"]]
    own += [
        name.replace("_", " ") if value is True else f"{name.replace('_', ' ')} {value}"
        for name, value in spec.items()
        if name not in ("model", "method", "batch_size", "sequence_length", "precision", "alpha")
        and usual.get(name) != value
    ]
    return ", ".join(own)


def summary(document: Json) -> Json:
    """Predicted and measured bytes allocated of each row, with the `mean` absolute and the `worst` error as shares."""
    rows = []
    for row in (r for r in document["rows"] if "error" not in r):
        spec, there, here = row["spec"], row["measured"], row["predicted"]
        rows.append(
            {
                "spec": spec,
                "settings": settings(spec),
                "predicted": here["peak_allocated_bytes"],
                "measured": there["peak_allocated_bytes"],
                "error": here["peak_allocated_bytes"] / there["peak_allocated_bytes"] - 1,
                "reserved_error": here["peak_reserved_bytes"] / there["peak_reserved_bytes"] - 1,
            }
        )
    errors = [row["error"] for row in rows]
    return {"rows": rows, "mean": sum(map(abs, errors)) / len(errors), "worst": max(errors, key=abs)}
