"""What fits where: GPUs for a run, the largest run for a GPU, the cheapest change, and many fine-tunings stored and served."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import ChainMap
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TypeAlias

from .. import caches, methods
from ..base import architecture as architectures
from ..base import configs, models
from ..catalog.gpus import GPU, GPUS
from ..count import BYTES, count
from ..errors import SpecError
from ..methods import Unsuited
from ..methods.prompts import keepers
from ..methods.selection import USUAL_RANK
from ..resolve import resolve
from ..spec import SETTINGS, Resolved
from .closed_form import ClosedForm, closed_form, predict
from .conventions import FROZEN_BYTES
from .report import MemoryReport

Needed: TypeAlias = Callable[[Resolved], float]
"""Bytes that a run needs; infinitely many where it cannot be, or is not known."""
CLUSTER = tuple(2**i for i in range(1, 11))
"""Numbers of GPUs that are tried where one is not enough."""


@dataclass(frozen=True)
class Fit:
    gpu: GPU
    share: float
    """What the run needs over the memory of one GPU."""
    n_gpus: int
    """GPUs that the run needs: several share it with FSDP or, where it has no layers, evenly. 0 where no number of CLUSTER
    is enough, since each GPU keeps the activations of its own batch."""
    checkpointed: bool = False
    """True where it fits only with gradient checkpointing."""
    alone: bool = False
    """True where nothing is known of several GPUs, as of checkpointing, because the closed form does not know the model."""


def fits(required: int) -> list[Fit]:
    """Every GPU of the catalogue against `required` bytes that can be spread evenly, smallest first."""
    return [Fit(g, required / g.memory_bytes, math.ceil(required / g.memory_bytes)) for g in GPUS.values()]


def gpu_grid(report: MemoryReport) -> list[Fit]:
    """Every GPU of the catalogue against a predicted run, smallest first."""
    spec = report.spec
    if report.process is None:
        return fits(report.states)
    needs, alone = [(False, 1, float(report.needed))], bool(closed_form(spec).states.unknown)
    if not alone:
        frugal = replace(spec, gradient_checkpointing=True)
        needs.append((True, 1, _needed(frugal)))
        for less, one in ((False, spec), (True, frugal)):
            shared = replace(one, sharding="fsdp", offload="none")
            needs += [(less, n, _needed(replace(shared, n_gpus=n))) for n in CLUSTER]
    found = []
    for gpu in GPUS.values():
        less, n = next(((less, n) for less, n, needed in needs if needed <= gpu.memory_bytes), (False, 0))
        found.append(Fit(gpu, report.process / gpu.memory_bytes, n, less, alone))
    return found


def _needed(spec: Resolved) -> float:
    """Bytes of the run's process; infinitely many where its settings exclude each other, or the step is unknown."""
    try:
        return closed_form(spec).report().process or math.inf
    except SpecError:
        return math.inf


def largest(form: ClosedForm, setting: str, limit: int) -> int:
    """The largest `batch_size` or `sequence_length` whose run needs at most `limit` bytes; 0 where none does."""
    about = SETTINGS[setting]
    values = range(int(about.low or 1), int(about.high or 1) + 1)
    usual = {name: getattr(form.states.spec, name) for name in ("batch_size", "sequence_length", "rank")}
    n = bisect_right(values, float(limit), key=lambda value: form.process(**usual | {setting: value}))
    return values[n - 1] if n else 0


def largest_model(
    spec: Resolved, limit: int, among: Collection[str] | None = None, needed: Needed = _needed
) -> str | None:
    """Key of the largest decoder of the catalogue that the run's other settings leave room for; None where none fits.

    `among` are the keys of those that may be named; None allows all.
    """
    able = [m for m in models.MODELS.values() if m.is_causal and not m.shape_of and (among is None or m.key in among)]
    largest_first = (m.key for m in sorted(able, key=lambda m: -(m.total_parameters or 0)))
    return next((key for key in largest_first if needed(resolve(spec.but(model=key))) <= limit), None)


@dataclass(frozen=True)
class Change:
    words: str
    cost: str
    apply: Callable[[Resolved], dict[str, object]]
    """Settings to change; none where it would change nothing."""


def _lora(spec: Resolved) -> dict[str, object]:
    automatic = dict.fromkeys(("precision", "learning_rate"))
    return {"method": "lora", **automatic} if methods.find(spec.method).in_place else {}


def _smaller(spec: Resolved) -> dict[str, object]:
    same_scale = {"alpha": spec.alpha * USUAL_RANK / spec.rank} if spec.alpha else {}
    return {"rank": USUAL_RANK, **same_scale} if spec.rank > USUAL_RANK else {}


CHANGES = (
    Change(
        "one example at a time, gradients accumulated",
        "slower, the same result",
        lambda s: {"batch_size": 1, "accumulation": s.accumulation * s.batch_size} if s.batch_size > 1 else {},
    ),
    Change(
        "gradient checkpointing",
        "a third more arithmetic, the same result",
        lambda s: {} if s.gradient_checkpointing else {"gradient_checkpointing": True},
    ),
    Change(
        "8-bit AdamW", "hardly any accuracy", lambda s: {"optimizer": "adamw-8bit"} if s.optimizer == "adamw" else {}
    ),
    Change("LoRA instead of training every weight", "less capacity", _lora),
    Change(
        "the frozen base in NF4 (QLoRA)",
        "slower, a little accuracy",
        lambda s: {"quantization": "nf4"} | _lora(s) if s.quantization == "none" else {},
    ),
    Change(f"rank {USUAL_RANK}", "less capacity", _smaller),
)
"""The cheapest comes first."""
SAME_RESULT = 2
"""After so many of the changes a run still learns the same."""
MOST_PASSES = 64
"""A step of more forward passes takes too long to be worth the same result: then the batch is made smaller instead."""


def changes_for(spec: Resolved) -> tuple[Change, ...]:
    """CHANGES; a smaller batch in place of the first one, where that would take more than MOST_PASSES."""
    return CHANGES if spec.batch_size * spec.accumulation <= MOST_PASSES else (_fewer(1), *CHANGES[1:])


def _fewer(examples: int) -> Change:
    return Change(
        f"batch size {examples}",
        "each step learns from fewer examples",
        lambda s: {"batch_size": examples} if s.batch_size > examples else {},
    )


def cheapest_changes(
    spec: Resolved, limit: int, needed: Needed = _needed
) -> tuple[tuple[Change, ...], Resolved] | None:
    """The fewest and cheapest changes after which a run needs at most `limit` bytes, and that run; None where none do.

    A batch that is made smaller is the largest power of two that fits.
    """

    def fitting(chosen: tuple[Change, ...]) -> tuple[tuple[Change, ...], Resolved] | None:
        settings = [change.apply(spec) for change in chosen]
        changed = resolve(spec.but(**ChainMap(*settings))) if all(settings) else None
        return (chosen, changed) if changed and needed(changed) <= limit else None

    offered = changes_for(spec)
    for n in range(1, len(offered) + 1):
        for chosen in combinations(offered, n):
            if (found := fitting(chosen)) and chosen[0] not in CHANGES:
                sizes = (2**i for i in reversed(range(1, spec.batch_size.bit_length())))
                found = next(filter(None, (fitting((_fewer(size), *chosen[1:])) for size in sizes)), found)
            if found:
                return found
    return None


@dataclass(frozen=True)
class Storage:
    """Bytes on disk for a number of tasks, 16-bit."""

    tasks: int
    full: int
    """A whole model for each task."""
    adapters: int
    base: int
    """The one base model that all adapters share."""


def storage(report: MemoryReport, tasks: int) -> Storage:
    """What so many fine-tunings of one model take on disk."""
    copy = report.total_parameters * FROZEN_BYTES
    return Storage(tasks, copy * tasks, report.trainable_parameters * FROZEN_BYTES * tasks, copy)


@dataclass(frozen=True)
class Serving:
    """Bytes on the GPUs that serve. Left out are the little that a forward pass holds besides weights, adapters and cache, and
    what a server reserves ahead (vLLM pads every adapter to its largest rank)."""

    cache: int
    """Keys and values of all answers that are written at once."""
    as_copies: int
    """A whole model for every fine-tuning, in the run's precision and quantization, and the cache."""
    on_one_base: int
    """The weights that all fine-tunings share, the adapters or changed tensors as they are saved, and the cache."""
    stateful: int
    """Layers that keep a state, which is left out: it is small, and does not grow with the text."""


def serve(spec: Resolved, adapters: int, streams: int, context: int) -> Serving:
    """What serving takes of so many fine-tunings, answers at once, and tokens for each answer: prompt, answer, virtual ones.

    Raises SpecError for a model that keeps no cache, or something else in it than keys and values, for a bare count, and for
    tokens beyond what the model reads.
    """
    for name, value in (("adapters", adapters), ("streams", streams), ("context", context)):
        if value < 1:
            raise SpecError(f"{name}={value}: serving takes at least 1; try 1")
    entry, shape = models.find(spec.model), architectures.of(spec.model)
    if not entry.is_causal:
        raise SpecError(f"model={entry.said}: it writes no text token by token, and so keeps no cache; try gpt2")
    if shape.context and context > shape.context:
        raise SpecError(f"context={context}: {entry.name} reads {shape.context:,} tokens; try {shape.context}")
    report = count(spec)
    changed = report.total_parameters - report.frozen_parameters
    copy = predict(spec).frozen_weights + changed * BYTES[spec.precision]
    numbers, stateful = _kept(entry, shape, context)
    cache = streams * 2 * numbers  # of 16 bits a number whatever the weights are
    base = copy if report.frozen_parameters else 0
    return Serving(cache, adapters * copy + cache, base + adapters * report.adapter_bytes + cache, stateful)


def _kept(entry: models.BaseModel, shape: architectures.Architecture, context: int) -> tuple[int, int]:
    """(the numbers of keys and values that a text of so many tokens leaves in the cache, the layers that keep a state)"""
    assert entry.config is not None
    held = caches.layers_of(configs.parsed(entry.config)[0])
    try:
        makers = keepers(shape)
        if len(held) != shape.n_layers or any(layer.is_indexed for layer in held):
            raise Unsuited("")
    except Unsuited:
        raise SpecError(
            f"model={entry.said}: it keeps a state of its texts, or more than the keys and values of each layer, and what "
            "serving takes of that is not known here; try gpt2"
        ) from None
    numbers = sum(t.module.cached * min(held[n].window or context, context) for t in makers for n in t.layers)
    return numbers, sum(layer.is_state for layer in held)
