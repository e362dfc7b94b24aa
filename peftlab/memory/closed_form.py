"""Predictions: the closed form, which answers at once, and `exact`, which asks the trace; both give a MemoryReport."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from .. import methods, optimizers
from ..base import architecture as architectures
from ..base import models
from ..base.models import BaseModel
from ..count import BYTES, count
from ..errors import SpecError
from ..spec import Json, Resolved, closest
from . import seconds
from .activations import derivation, moments
from .allocator import MIB
from .asked import Unknown
from .conventions import CONVENTIONS, FP4_BYTES, FROZEN_BYTES
from .lines import Line, Polynomial, constant, total
from .report import MemoryReport, Moment
from .sharding import Sharded, plan
from .states import of_family, paged, quantizable, quantized_bits

RESERVE = 1.14
"""Bytes reserved over bytes allocated: the median of assets/measured/memory-*.json. The trace gives the run's own."""
CONTEXT = {"h100": 767 * MIB, "": 500 * MIB}
"""Bytes that CUDA and the libraries' code take beside PyTorch's memory. The H100's are measured after a step
(assets/measured/memory-h100.json), the others' are a guess."""
EXACT = "exact"
"""The name for no convention: the run's own precisions count."""


def predict(spec: Resolved, convention: str = EXACT, trainable_parameters: int | None = None) -> MemoryReport:
    """Memory of `spec` at the peak of a training step (`exact`), or of its states alone as a convention counts them.

    `trainable_parameters` stands in for the count of a model that is only a number; SpecError without it. Such a model, and
    one that does not write text, has no step to predict: `moments` is empty. So it is, and `unknown` says why, where the
    closed form does not know what the model keeps; `exact` tells then.
    """
    entry = models.find(spec.model)
    if convention != EXACT or entry.config is None or not entry.is_causal:
        return predict_states(spec, convention, trainable_parameters)
    return closed_form(spec).report()


def predict_states(spec: Resolved, convention: str = EXACT, trainable_parameters: int | None = None) -> MemoryReport:
    """`predict` without what depends on the batch."""
    if convention not in (EXACT, *CONVENTIONS):
        raise SpecError(f"convention={convention}: {closest(convention, (EXACT, *CONVENTIONS))}")
    rule, entry, method = CONVENTIONS.get(convention), models.find(spec.model), methods.find(spec.method)
    if rule is None and spec.optimizer == "adafactor" and not (entry.config and entry.is_causal):
        raise SpecError(
            f"optimizer=adafactor: it keeps a number for each row and column, and {entry.said} has none here; choose adamw, "
            "or name a model that writes text"
        )
    packable: int | None = None
    left: tuple[str, ...] = ()
    if entry.config is None:
        parameters, name = entry.total_parameters or 0, entry.name
        trained = _given(spec, entry, trainable_parameters)
        frozen = parameters - trained if method.in_place else parameters
    else:
        report = count(spec)
        parameters, name, trained = report.total_parameters, report.model_name, report.trainable_parameters
        frozen, left = report.frozen_parameters, report.frozen
        packable = None if rule else quantizable(architectures.of(spec.model))
    each, kind = BYTES[spec.trained_precision], optimizers.find(spec)
    state = kind.bits // 8 if kind.bits else each
    weights, gradients, optimizer = each, each, kind.states * state
    if rule:
        weights, gradients, optimizer = rule.weights, rule.gradients, rule.optimizer
    frozen_weights = _frozen_bytes(spec, frozen, FROZEN_BYTES if rule else BYTES[spec.precision], packable)
    counted = frozen_weights, trained * weights, trained * gradients, trained * optimizer
    return MemoryReport(spec, convention, name, method.name, parameters, trained, *counted, left=left)


def _given(spec: Resolved, entry: BaseModel, trainable_parameters: int | None) -> int:
    """Trained parameters of a model that is only a number. Raises SpecError where they are not given, or too many."""
    parameters = entry.total_parameters or 0
    trained = parameters if spec.method == "full" else trainable_parameters
    if trained is None:
        raise SpecError(
            f"model={spec.model}: a bare count has no layers for {spec.method} to adapt; give the number of trained "
            f"parameters (--trainable-parameters {parameters // 200}), or name a model"
        )
    if trained > parameters:
        raise SpecError(f"trainable-parameters={trained}: {entry.name} has {parameters}; train {parameters} at most")
    return trained


def _frozen_bytes(spec: Resolved, frozen: int, each: int, packable: int | None) -> int:
    """Quantization packs `packable` of the weights; with None it packs all, and 4-bit is half a byte, as lectures count."""
    if spec.quantization == "none":
        return frozen * each
    if packable is None:
        return round(frozen * (FP4_BYTES if spec.quantization == "nf4" else 1))
    packed = min(frozen, packable)
    return round(packed * quantized_bits(spec) / 8) + (frozen - packed) * each


@dataclass(frozen=True)
class ClosedForm:
    """A run's memory as polynomials in batch, length and rank: what Python evaluates here, and the page on every move."""

    states: MemoryReport
    """Weights, gradients and optimizer states alone, and the run's spec."""
    moments: Mapping[str, Mapping[str, Polynomial]]
    """Bytes by kind at the high points of a step, on one GPU; none where `states.unknown` says why."""
    several: Sharded | None = None
    """What several GPUs, or the CPU's memory, change."""
    reserve: float = RESERVE
    """Bytes reserved over bytes allocated."""

    @property
    def context(self) -> int:
        """Bytes that CUDA takes before the first tensor, with the libraries' code."""
        return of_family(self.states.spec.gpu, CONTEXT)

    def allocated(self, batch_size: int, sequence_length: int, rank: int) -> float:
        """Bytes allocated at the peak."""
        return max(total(kinds.values()).value(batch_size, sequence_length, rank) for kinds in self.moments.values())

    def process(self, batch_size: int, sequence_length: int, rank: int) -> float:
        """Bytes that nvidia-smi would show. An estimate: the allocator's reserve is taken as usual."""
        return self.reserve * self.allocated(batch_size, sequence_length, rank) + self.context

    def report(self) -> MemoryReport:
        """The prediction at the spec's own batch, length and rank; of the states alone where the step is unknown."""
        return self._report

    @cached_property
    def _report(self) -> MemoryReport:
        if not self.moments:
            return self.states
        moments = tuple(
            Moment(name, 0, {kind: self.value(size) for kind, size in kinds.items()})
            for name, kinds in self.moments.items()
        )
        return replace(
            self.states,
            optimizer=max(m.bytes["optimizer"] for m in moments),
            moments=moments,
            reserved=round(self.reserve * self.allocated(*self._at)),
            context=self.context,
            outside=paged(self.states.spec),
            cpu=self.value(self.several.in_cpu) if self.several else 0,
        )

    def lines(self) -> tuple[Line, ...]:
        """The derivation of what is there at the peak of a known step, for one GPU alone."""
        if not self.moments:
            return ()
        peak = max(self.moments, key=lambda name: total(self.moments[name].values()).value(*self._at))
        return tuple(line for line in derivation(self.states.spec) if peak in line.moments)

    def value(self, size: Polynomial) -> int:
        """`size` at the spec's own batch, length and rank."""
        return round(size.value(*self._at))

    @property
    def _at(self) -> tuple[int, int, int]:
        spec = self.states.spec
        return spec.batch_size, spec.sequence_length, spec.rank

    def to_data(self) -> Json:
        """For the page: the terms of each kind at each moment, and how the process follows from what is allocated."""
        moments = [{kind: size.to_data() for kind, size in kinds.items()} for kinds in self.moments.values()]
        return {"moments": moments, "reserve": self.reserve, "context": self.context}


def closed_form(spec: Resolved) -> ClosedForm:
    """The closed form of a model that writes text. Raises SpecError for others, and as `Case.of` and `plan` do."""
    states = predict_states(spec)
    try:
        return _on_several(ClosedForm(states, moments(spec)))
    except Unknown as reason:
        return ClosedForm(replace(states, unknown=str(reason)), {})


def _on_several(form: ClosedForm) -> ClosedForm:
    """The form of what one of the run's GPUs holds, from that of a GPU alone."""
    spec = form.states.spec
    if spec.n_gpus == 1 and spec.sharding == spec.offload == "none":
        return form
    found = plan(form.moments, spec)
    return replace(form, moments=found.moments, several=found)


def exact(spec: Resolved, logits: int | None = None, quick: bool = False) -> MemoryReport:
    """`predict` from a trace of a whole training step on fake tensors: every token predicted, or each example's last `logits`.

    The step is any trainer's, or with `quick` the engine's own, with its fused operations and optimizer. Takes seconds, and
    torch. Raises SpecError for what cannot be traced.
    """
    states = predict_states(spec)
    from .trace import trace

    found = trace(spec, logits, quick)
    sizes = {f"{m.phase} {i}": {k: constant(n) for k, n in m.bytes.items()} for i, m in enumerate(found.moments)}
    reserve = found.reserved / max(m.total for m in found.moments)
    report = _on_several(ClosedForm(states, sizes, reserve=reserve)).report()
    moments = tuple(replace(old, bytes=new.bytes) for old, new in zip(found.moments, report.moments, strict=True))
    took = seconds.predicted(spec, found.operations, seconds.GRAPH if quick else seconds.EAGER)
    return replace(report, source="trace", optimizer=found.after["optimizer"], moments=moments, step_seconds=took)
