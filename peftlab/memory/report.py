"""What is predicted of a run's memory, whichever source predicts it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..spec import Resolved

KINDS = (
    "frozen_weights", "trainable_weights", "gradients", "optimizer", "temporaries", "activations", "logits", "workspace",
    "communication",
)  # fmt: skip
"""Of bytes that PyTorch has allocated. `temporaries` are the optimizer step's; `logits` are those, their softmax and their
gradients; `workspace` is cuBLAS's; `communication` the buffers between GPUs."""


@dataclass(frozen=True)
class Moment:
    """The highest point of one phase of a step, in one part of the model."""

    phase: str
    """forward, backward or optimizer."""
    part: int
    """-1 before the layers, then the layer's number, and their count after them."""
    bytes: Mapping[str, int]
    """By kind."""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one training run on one GPU."""

    spec: Resolved
    """Resolved."""
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
    moments: tuple[Moment, ...] = ()
    """A step, in order; none where a convention counts, which leaves out all that depends on the batch."""
    reserved: int | None = None
    """What PyTorch takes from the driver."""
    context: int | None = None
    """What CUDA and the libraries' code take beside it."""
    outside: int = 0
    """Paged optimizer states: in memory that the GPU and the CPU share, and in none of PyTorch's figures."""
    cpu: int = 0
    """Offloaded to the CPU's memory."""

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
        """At the peak."""
        return self.peak.total if self.peak else None

    @property
    def process(self) -> int | None:
        """What nvidia-smi shows: reserved, and the context."""
        return None if self.reserved is None or self.context is None else self.reserved + self.context

    @property
    def needed(self) -> int:
        """What a GPU must have: the process where it is predicted, the states where a convention counts."""
        return self.process or self.states

    def to_dict(self) -> dict[str, Any]:
        peak = dict(self.peak.bytes) if self.peak else dict.fromkeys(("activations", "logits", "workspace"))
        return {
            "spec": self.spec.to_dict(),
            "convention": self.convention,
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "components": {
                "weights": self.weights,
                "frozen_weights": self.frozen_weights,
                "trainable_weights": self.trainable_weights,
                "gradients": self.gradients,
                "optimizer": self.optimizer,
            }
            | peak,
            "states_bytes": self.states,
            "peak_allocated_bytes": self.allocated,
            "peak_reserved_bytes": self.reserved,
            "process_bytes": self.process,
            "paged_bytes": self.outside,
            "cpu_bytes": self.cpu,
            "timeline": [{"phase": m.phase, "part": m.part, "bytes": m.total, **m.bytes} for m in self.moments] or None,
            "source": self.source,
        }
