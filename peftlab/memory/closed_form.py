"""Weights, gradients and optimizer states as products of parameter counts and bytes.

Activations, logits and everything else that depends on the batch are not in here yet: they are None, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import architecture as architectures
from .. import methods
from ..architecture import Architecture
from ..catalog import models
from ..count import BYTES, count
from ..errors import SpecError
from ..resolve import resolve
from ..spec import RunSpec
from . import conventions
from .conventions import EXACT, FP4_BYTES, FROZEN_BYTES, Convention

NF4_BITS = {False: 4 + 32 / 64, True: 4 + 8 / 64 + 32 / (64 * 256)}
"""Bits a weight: 4, and an fp32 scale a block of 64; with double quantization (True) the scale is 8 bits, and 256 scales
share one fp32. QLoRA, arXiv 2305.14314 section 3."""
INT8_BYTES = 1
STATES = {"adamw": 2, "lion": 1, "sgd": 0, "sgd-momentum": 1}
"""Numbers the optimizer keeps for each trained parameter; the others' are not a plain multiple and stay None."""


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one training run on one GPU, before activations."""

    spec: RunSpec
    """Resolved."""
    convention: str
    model_name: str
    method_name: str
    total_parameters: int
    trainable_parameters: int
    frozen_weights: int
    trainable_weights: int
    gradients: int
    optimizer: int | None
    source: str = "closed-form"
    peak: Mapping[str, int] | None = None
    """Bytes by kind at the highest point of a step; None in the closed form, which leaves activations out."""
    timeline: Mapping[str, int] | None = None
    """Highest bytes of each phase of the step."""

    @property
    def weights(self) -> int:
        return self.frozen_weights + self.trainable_weights

    @property
    def states(self) -> int | None:
        """Weights + gradients + optimizer; None while one of them is not known."""
        return None if self.optimizer is None else self.weights + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, Any]:
        peak = dict(self.peak or dict.fromkeys(("activations", "logits", "workspace")))
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
            "peak_allocated_bytes": sum(self.peak.values()) if self.peak else None,
            "peak_reserved_bytes": None,
            "process_bytes": None,
            "timeline": dict(self.timeline) if self.timeline else None,
            "source": self.source,
        }


def predict(spec: RunSpec, convention: str = EXACT, trainable_parameters: int | None = None) -> MemoryReport:
    """Memory of `spec` under a convention, or as its own precisions allocate it (`exact`).

    `trainable_parameters` stands in for the count of a model that is only a number; SpecError without it.
    """
    spec = resolve(spec)
    rule = conventions.find(convention)
    entry = models.find(spec.model or "")
    method = methods.find(spec.method or "")
    if entry.config is None:
        total = entry.total_parameters or 0
        trainable = total if method.key == "full" else trainable_parameters
        if trainable is None:
            raise SpecError(
                f"model={spec.model}: a bare count has no layers for {method.key} to adapt; give the number of trained "
                f"parameters (--trainable-parameters {total // 200}), or name a model"
            )
        shape, name, added = None, entry.name, 0 if method.in_place else trainable
    else:
        report = count(spec)
        total, trainable, name = report.total_parameters, report.trainable_parameters, report.model_name
        shape, added = architectures.of(spec.model or ""), report.added_parameters
    return _report(spec, convention, rule, name, method.name, shape, total, trainable, added)


def exact(spec: RunSpec) -> MemoryReport:
    """`predict` with the peak of a whole training step, every token predicted, from a trace of it on fake tensors.

    Takes seconds, and torch. Raises SpecError for what cannot be traced.
    """
    report = predict(spec)
    from .trace import trace

    phases = {name: dict(kinds) for name, kinds in trace(report.spec).items() if name != "after"}
    workspace = WORKSPACE.get((report.spec.gpu or "").split("-")[0], WORKSPACE[""])
    highest = max(phases.values(), key=lambda kinds: sum(kinds.values()))
    return replace(
        report,
        source="trace",
        peak=highest | {"workspace": workspace},
        timeline={name: sum(kinds.values()) + workspace for name, kinds in phases.items()},
    )


WORKSPACE = {"h100": 65 * 2**20, "h200": 65 * 2**20, "": 9 * 2**20}
"""What cuBLAS keeps from the first product on. Hopper's is measured (assets/measured/memory-h100.json);
the others' is PyTorch's default of 8.1 MiB and 1 MiB for cuBLASLt."""


def _report(
    spec: RunSpec,
    convention: str,
    rule: Convention | None,
    model_name: str,
    method_name: str,
    shape: Architecture | None,
    total: int,
    trainable: int,
    added: int,
) -> MemoryReport:
    frozen = total + added - trainable
    optimizer: int | None
    if rule:
        frozen_bytes = _frozen_bytes(spec, shape, frozen, FROZEN_BYTES, ideal=True)
        weights, gradients, optimizer = (trainable * b for b in (rule.weights, rule.gradients, rule.optimizer))
    else:
        base = BYTES[spec.precision or "fp32"]
        each = (
            BYTES[spec.adapter_precision] if spec.adapter_precision else base
        )  # none where the base's own are trained
        frozen_bytes = _frozen_bytes(spec, shape, frozen, base, ideal=False)
        weights = gradients = trainable * each
        state = 4 if spec.optimizer_precision == "fp32" else each
        numbers = STATES.get(spec.optimizer or "")
        optimizer = None if numbers is None else trainable * numbers * state
    return MemoryReport(
        spec=spec,
        convention=convention,
        model_name=model_name,
        method_name=method_name,
        total_parameters=total,
        trainable_parameters=trainable,
        frozen_weights=frozen_bytes,
        trainable_weights=weights,
        gradients=gradients,
        optimizer=optimizer,
    )


def _frozen_bytes(spec: RunSpec, shape: Architecture | None, frozen: int, each: int, ideal: bool) -> int:
    """Bytes of the frozen weights. Quantization touches linear maps only: embeddings, norms and the head stay 16-bit.

    `ideal` counts 4-bit as half a byte for every parameter, as lectures do.
    """
    if spec.quantization in (None, "none"):
        return frozen * each
    if ideal or shape is None:
        return round(frozen * (FP4_BYTES if spec.quantization == "nf4" else INT8_BYTES))
    quantized = min(frozen, sum(m.weight * m.count for m in shape.linear()))
    bits = NF4_BITS[bool(spec.double_quantization)] if spec.quantization == "nf4" else 8 * INT8_BYTES
    return round(quantized * bits / 8) + (frozen - quantized) * each
