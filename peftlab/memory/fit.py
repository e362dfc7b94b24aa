"""What fits where: GPUs for a run, the largest run for a GPU, and the cheapest change that makes one fit."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

from .. import methods
from ..base import models
from ..catalog import GPU, GPUS
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
    """What the run needs over the memory of one GPU."""
    n_gpus: int
    """GPUs that the run needs: several share it with FSDP or, where it has no layers, evenly. 0 where no number of CLUSTER
    is enough, since each GPU keeps the activations of its own batch."""
    checkpointed: bool = False
    """True where it fits only with gradient checkpointing."""


def fits(required: int) -> list[Fit]:
    """Every GPU of the catalogue against `required` bytes that can be spread evenly, smallest first."""
    return [Fit(g, required / g.memory_bytes, math.ceil(required / g.memory_bytes)) for g in GPUS.values()]


def gpu_grid(report: MemoryReport) -> list[Fit]:
    """Every GPU of the catalogue against a predicted run, smallest first."""
    spec = report.spec
    if report.process is None:
        return fits(report.states)
    frugal = replace(spec, gradient_checkpointing=True)
    needs = [(False, 1, report.process), (True, 1, _process(frugal))]
    needs += [
        (less, n, _process(replace(one, n_gpus=n, sharding="fsdp", offload="none")))
        for less, one in ((False, spec), (True, frugal))
        for n in CLUSTER
    ]
    found = []
    for gpu in GPUS.values():
        enough = ((less, n) for less, n, needed in needs if needed is not None and needed <= gpu.memory_bytes)
        less, n = next(enough, (False, 0))
        found.append(Fit(gpu, report.process / gpu.memory_bytes, n, less))
    return found


def _process(spec: Resolved) -> int | None:
    """Bytes of the run's process; None where its settings exclude each other."""
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

    values = range(int(about.low or 1), int(about.high or 1) + 1)
    n = bisect_right(values, float(limit), key=needs)
    return values[n - 1] if n else 0


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


def _lora(spec: Resolved) -> dict[str, object]:
    return {"method": "lora", "precision": "bf16"} if methods.find(spec.method).in_place else {}


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
)
"""The cheapest comes first."""


def cheapest_changes(spec: Resolved, limit: int) -> tuple[tuple[Change, ...], Resolved] | None:
    """The fewest and cheapest changes after which a run needs at most `limit` bytes, and that run; None where none do."""
    for n in range(1, len(CHANGES) + 1):
        for chosen in combinations(CHANGES, n):
            settings = [change.apply(spec) for change in chosen]
            if all(settings):
                changed = resolve(spec.but(**{name: value for one in settings for name, value in one.items()}))
                needed = _process(changed)
                if needed is not None and needed <= limit:
                    return chosen, changed
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
