"""Weights, gradients and optimizer states as products of parameter counts and bytes.

Activations, logits and everything else that depends on the batch are not in here yet: they are None, never zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .. import architecture as architectures
from .. import methods, optimizers
from ..architecture import Architecture
from ..catalog import models
from ..count import BYTES, count
from ..errors import SpecError
from ..resolve import resolve
from ..spec import RunSpec
from . import conventions
from .conventions import EXACT, FP4_BYTES, FROZEN_BYTES, Convention
from .report import MemoryReport

NF4_BITS = {False: 4 + 32 / 64, True: 4 + 8 / 64 + 32 / (64 * 256)}
"""Bits a weight: 4, and an fp32 scale a block of 64; with double quantization (True) the scale is 8 bits, and 256 scales
share one fp32. QLoRA, arXiv 2305.14314 section 3."""
INT8_BYTES = 1


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


def exact(spec: RunSpec, overtaken: Callable[[], bool] = lambda: False) -> MemoryReport:
    """`predict` from a trace of a whole training step on fake tensors, every token predicted.

    Takes seconds, and torch. Raises SpecError for what cannot be traced, and `trace.Overtaken` once `overtaken` says so.
    """
    report = predict(spec)
    from .trace import trace

    found = trace(report.spec, overtaken)
    return replace(
        report, source="trace", moments=found.moments, reserved=found.reserved, context=context(report.spec.gpu)
    )


CONTEXT = {"h100": 767 * 2**20, "": 500 * 2**20}


def context(gpu: str | None) -> int:
    return CONTEXT.get((gpu or "").split("-")[0], CONTEXT[""])


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
        optimizer = trainable * optimizers.find(spec).states * state
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
