"""What fits where: GPUs for a run, the largest run for a GPU, and the cheapest change that makes one fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from ..base import models
from ..catalog.gpus import GPU, GPUS
from ..errors import SpecError
from ..resolve import resolve
from ..spec import SETTINGS, Resolved
from .closed_form import ClosedForm, closed_form
from .conventions import FROZEN_BYTES
from .report import MemoryReport

CLUSTER = tuple(2**i for i in range(1, 11))
"""Numbers of GPUs that are tried where one is not enough."""


@dataclass(frozen=True)
class Fit:
    gpu: GPU
    share: float
    """Of one GPU's memory that the run needs."""
    n_gpus: int
    """GPUs needed: 1 where one holds it; otherwise with FSDP, or, for what has no layers, spread evenly. 0 where no number
    of them is enough, for each keeps the activations of its own batch."""
    checkpointed: bool = False
    """Only with gradient checkpointing."""


def fits(required: int) -> list[Fit]:
    """Every GPU of the catalogue against `required` bytes that can be spread evenly, smallest first."""
    return [Fit(g, required / g.memory_bytes, math.ceil(required / g.memory_bytes)) for g in GPUS.values()]


def gpu_grid(report: MemoryReport) -> list[Fit]:
    """Every GPU of the catalogue against a predicted run, smallest first."""
    spec = report.spec
    if report.process is None:
        return fits(report.states)
    frugal = replace(spec, gradient_checkpointing=True)
    alone = (False, 1, report.process), (True, 1, _process(frugal))
    shared = [
        (less, n, _process(replace(one, n_gpus=n, sharding="fsdp", offload="none")))
        for less, one in ((False, spec), (True, frugal))
        for n in CLUSTER
    ]
    found = []
    for gpu in GPUS.values():
        enough = [
            (less, n) for less, n, needed in (*alone, *shared) if needed is not None and needed <= gpu.memory_bytes
        ]
        less, n = next(iter(enough), (False, 0))
        found.append(Fit(gpu, report.process / gpu.memory_bytes, n, less))
    return found


def _process(spec: Resolved) -> int | None:
    """None where the settings exclude each other."""
    try:
        return closed_form(spec).report().process
    except SpecError:
        return None


def largest(form: ClosedForm, setting: str, limit: int) -> int:
    """The largest `batch_size` or `sequence_length` whose run needs at most `limit` bytes; 0 where none does."""
    spec, about = form.states.spec, SETTINGS[setting]
    batch, length, rank = spec.batch_size, spec.sequence_length, spec.rank

    def needs(value: int) -> float:
        return form.process(value, length, rank) if setting == "batch_size" else form.process(batch, value, rank)

    low, high = int(about.low or 1) - 1, int(about.high or 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= limit else (low, middle - 1)
    return low if low >= (about.low or 1) else 0


def largest_model(spec: Resolved, limit: int) -> str | None:
    """Key of the largest decoder of the catalogue that the run's other settings leave room for; None where none fits."""
    able = [m for m in models.MODELS.values() if m.is_causal and not m.shape_of]
    for entry in sorted(able, key=lambda m: -(m.total_parameters or 0)):
        needed = _process(resolve(spec.but(model=entry.key)))
        if needed is not None and needed <= limit:
            return entry.key
    return None


@dataclass(frozen=True)
class Change:
    words: str
    cost: str
    apply: Callable[[Resolved], dict[str, object]]
    """Settings to change; none where it would change nothing."""


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
        "8-bit AdamW",
        "hardly any accuracy",
        lambda s: {"optimizer": "adamw-8bit"} if s.optimizer == "adamw" else {},
    ),
    Change("LoRA instead of training every weight", "less capacity", lambda s: _lora(s)),
    Change(
        "the frozen base in NF4 (QLoRA)",
        "slower, a little accuracy",
        lambda s: {"quantization": "nf4"} | _lora(s) if s.quantization == "none" else {},
    ),
)
"""Cheapest first."""


def _lora(spec: Resolved) -> dict[str, object]:
    from .. import methods

    in_place = methods.find(spec.method).in_place
    return {"method": "lora", "precision": "bf16"} if in_place else {}


def cheapest_changes(spec: Resolved, limit: int) -> tuple[tuple[Change, ...], Resolved] | None:
    """The fewest and cheapest changes after which a resolved run needs at most `limit` bytes; None where none do."""
    for found, changed in _changed(spec):
        needed = _process(changed)
        if needed is not None and needed <= limit:
            return found, changed
    return None


def _changed(spec: Resolved) -> Iterator[tuple[tuple[Change, ...], Resolved]]:
    for n in range(1, len(CHANGES) + 1):
        for chosen in combinations(CHANGES, n):
            changes = [change.apply(spec) for change in chosen]
            if all(changes):
                merged = {k: v for one in changes for k, v in one.items()}
                yield chosen, resolve(spec.but(**merged))


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
    copy = report.total_parameters * FROZEN_BYTES
    return Storage(tasks, copy * tasks, report.trainable_parameters * FROZEN_BYTES * tasks, copy)
