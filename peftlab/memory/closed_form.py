"""Predictions: the closed form, which answers at once, and `exact`, which asks the trace; both give a MemoryReport."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import methods, optimizers
from ..base import architecture as architectures
from ..base import models
from ..base.architecture import Architecture
from ..count import BYTES, count
from ..errors import SpecError
from ..resolve import resolve
from ..spec import Resolved
from . import conventions
from .activations import derivation, moments
from .conventions import EXACT, FP4_BYTES, FROZEN_BYTES, NF4_BITS, Convention
from .lines import Line
from .polynomial import RANK, Polynomial, constant, total
from .report import MemoryReport, Moment
from .sharding import Sharded, plan
from .states import paged

INT8_BYTES = 1


def predict(spec: Resolved, convention: str = EXACT, trainable_parameters: int | None = None) -> MemoryReport:
    """Memory of `spec` at the peak of a training step (`exact`), or of its states alone as a convention counts them.

    `trainable_parameters` stands in for the count of a model that is only a number; SpecError without it. Such a model, and
    one that does not write text, has no step to predict: `moments` is empty.
    """
    entry = models.find(resolve(spec).model or "")
    if convention != EXACT or entry.config is None or not entry.is_causal:
        return predict_states(spec, convention, trainable_parameters)
    return closed_form(spec).report()


def predict_states(spec: Resolved, convention: str = EXACT, trainable_parameters: int | None = None) -> MemoryReport:
    """`predict` without what depends on the batch."""
    spec = resolve(spec)
    rule = conventions.find(convention)
    entry = models.find(spec.model)
    method = methods.find(spec.method)
    if rule is None and spec.optimizer == "adafactor" and not (entry.config and entry.is_causal):
        raise SpecError(
            f"optimizer=adafactor: it keeps a number for each row and column, and {spec.model} has none here; choose adamw, "
            "or name a model that writes text"
        )
    if entry.config is None:
        total = entry.total_parameters or 0
        trainable = total if method.key == "full" else trainable_parameters
        if trainable is None:
            raise SpecError(
                f"model={spec.model}: a bare count has no layers for {method.key} to adapt; give the number of trained "
                f"parameters (--trainable-parameters {total // 200}), or name a model"
            )
        if trainable > total:
            raise SpecError(f"trainable-parameters={trainable}: {entry.name} has {total}; train {total} at most")
        shape, name, added = None, entry.name, 0 if method.in_place else trainable
    else:
        report = count(spec)
        total, trainable, name = report.total_parameters, report.trainable_parameters, report.model_name
        shape, added = architectures.of(spec.model), report.added_parameters
    return _report(spec, convention, rule, name, method.name, shape, total, trainable, added)


@dataclass(frozen=True)
class ClosedForm:
    """A run's memory as polynomials in batch, length and rank: what Python evaluates here, and the page on every move."""

    states: MemoryReport
    """Weights, gradients and optimizer states alone, and the resolved spec."""
    moments: Mapping[str, Mapping[str, Polynomial]]
    """Bytes by kind at the high points of a step, on one GPU."""
    several: Sharded | None = None
    """What several GPUs, or the CPU's memory, change."""

    @property
    def context(self) -> int:
        """Bytes that CUDA takes before the first tensor, with the libraries' code."""
        return context(self.states.spec.gpu)

    def allocated(self, batch: int, length: int, rank: int) -> float:
        return max(total(kinds.values()).value(batch, length, rank) for kinds in self.moments.values())

    def process(self, batch: int, length: int, rank: int) -> float:
        """Bytes that nvidia-smi would show. An estimate: the allocator's reserve is taken as usual."""
        return RESERVE * self.allocated(batch, length, rank) + self.context

    def report(self) -> MemoryReport:
        """At the spec's own batch, length and rank."""
        at = self._at()
        moments = tuple(
            Moment(name, 0, {kind: round(size.value(*at)) for kind, size in kinds.items()})
            for name, kinds in self.moments.items()
        )
        return replace(
            self.states,
            optimizer=max(m.bytes["optimizer"] for m in moments),
            moments=moments,
            reserved=round(RESERVE * self.allocated(*at)),
            context=self.context,
            outside=paged(self.states.spec),
            cpu=round(self.several.in_cpu.value(*at)) if self.several else 0,
        )

    def lines(self) -> tuple[Line, ...]:
        """The derivation of what is there at the peak, for one GPU alone."""
        at = self._at()
        peak = max(self.moments, key=lambda name: total(self.moments[name].values()).value(*at))
        return tuple(line for line in derivation(self.states.spec) if peak in line.moments)

    def value(self, size: Polynomial) -> int:
        """At the spec's own batch, length and rank."""
        return round(size.value(*self._at()))

    def _at(self) -> tuple[int, int, int]:
        spec = self.states.spec
        return spec.batch_size, spec.sequence_length, spec.rank

    def to_data(self) -> dict[str, Any]:
        """For the page: terms of each kind at each moment, and how to come from allocated to the process."""
        moments = [{kind: size.to_data() for kind, size in kinds.items()} for kinds in self.moments.values()]
        return {"moments": moments, "reserve": RESERVE, "context": self.context}


RESERVE = 1.16
"""Reserved over allocated: the median of assets/measured/memory-h100.json. The trace knows better."""


def closed_form(spec: Resolved) -> ClosedForm:
    """Of a model with layers that writes text. Raises SpecError for others, and as `methods.targets` and `sharding.plan` do."""
    states = predict_states(spec)
    spec = states.spec
    if not models.find(spec.model).is_causal:
        raise SpecError(f"model={spec.model}: only models that write text have a training step here; try gpt2")
    return _on_several(ClosedForm(states, moments(spec)))


def _on_several(form: ClosedForm) -> ClosedForm:
    """What one of the run's GPUs holds."""
    spec = form.states.spec
    if spec.n_gpus == 1 and spec.sharding == spec.offload == "none":
        return form
    found = plan(form.moments, spec, _gathered(spec), trained(spec))
    return replace(form, moments=found.moments, several=found)


def exact(spec: Resolved, logits: int | None = None, quick: bool = False) -> MemoryReport:
    """`predict` from a trace of a whole training step on fake tensors: every token predicted, or each example's last `logits`.

    As any trainer runs it, or `quick`, with the fused operations and optimizer of ours.
    Takes seconds, and torch. Raises SpecError for what cannot be traced.
    """
    states = predict_states(spec)
    spec = states.spec
    from .trace import trace

    found = trace(spec, logits, quick)
    report = replace(
        states,
        optimizer=found.after["optimizer"],
        source="trace",
        moments=found.moments,
        reserved=found.reserved,
        context=context(spec.gpu),
        outside=paged(spec),
    )
    if spec.n_gpus == 1 and spec.sharding == spec.offload == "none":
        return report
    several = plan(
        {f"{m.phase} {i}": {k: constant(n) for k, n in m.bytes.items()} for i, m in enumerate(found.moments)},
        spec,
        _gathered(spec),
        trained(spec),
    )
    at = (spec.batch_size, spec.sequence_length, spec.rank)
    moments = tuple(
        Moment(m.phase, m.part, {k: round(size.value(*at)) for k, size in kinds.items()})
        for m, kinds in zip(found.moments, several.moments.values(), strict=True)
    )
    reserve = found.reserved / max(m.total for m in found.moments)
    return replace(
        report,
        moments=moments,
        reserved=round(reserve * max(m.total for m in moments)),
        cpu=round(several.in_cpu.value(*at)),
    )


CONTEXT = {"h100": 767 * 2**20, "": 500 * 2**20}
"""With the libraries' code, after a step: the H100's is measured (assets/measured/memory-h100.json), the others' a guess."""


def context(gpu: str | None) -> int:
    return CONTEXT.get((gpu or "").split("-")[0], CONTEXT[""])


def trained(spec: Resolved) -> Polynomial:
    """Trained parameters, by rank."""
    method = methods.find(spec.method)
    if "rank" not in method.settings:
        return constant(count(spec).trainable_parameters)
    once, twice = (count(replace(spec, rank=r)).trainable_parameters for r in (1, 2))
    return constant(2 * once - twice) + RANK * (twice - once)


def _gathered(spec: Resolved) -> int:
    """Bytes of the weights that are gathered at once: the largest layer's, or the embedding's or head's."""
    shape = architectures.of(spec.model)
    layers: Counter[int] = Counter()
    for m in shape.modules:
        for layer in m.layers or (-1,):
            layers[layer] += m.weight + m.bias
    return max(layers.values()) * BYTES[spec.precision]


def _report(
    spec: Resolved,
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
        base = BYTES[spec.precision]
        each = (
            BYTES[spec.adapter_precision] if spec.adapter_precision else base
        )  # none where the base's own are trained
        frozen_bytes = _frozen_bytes(spec, shape, frozen, base, ideal=False)
        weights = gradients = trainable * each
        kind = optimizers.find(spec)
        optimizer = trainable * kind.states * (kind.bits // 8 if kind.bits else each)
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


def _frozen_bytes(spec: Resolved, shape: Architecture | None, frozen: int, each: int, ideal: bool) -> int:
    """Bytes of the frozen weights. Quantization touches linear maps only: embeddings, norms and the head stay 16-bit.

    `ideal` counts 4-bit as half a byte for every parameter, as lectures do.
    """
    if spec.quantization == "none":
        return frozen * each
    if ideal or shape is None:
        return round(frozen * (FP4_BYTES if spec.quantization == "nf4" else INT8_BYTES))
    quantized = min(frozen, sum(m.weight * m.count for m in shape.linear()))
    bits = NF4_BITS[spec.double_quantization] if spec.quantization == "nf4" else 8 * INT8_BYTES
    return round(quantized * bits / 8) + (frozen - quantized) * each
