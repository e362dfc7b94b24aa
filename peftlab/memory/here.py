"""Whether a run fits into this machine's memory: what it takes at its peak, what is free, and the cheapest change that fits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from .. import hardware, methods, units
from ..base import fetching, models, weights
from ..catalog.gpus import GPUS
from ..data import tasks
from ..errors import DoesNotFit, SpecError
from ..resolve import cannot_run, resolve
from ..spec import SETTINGS, Resolved
from .closed_form import exact, predict
from .fit import SAME_RESULT, Change, changes_for, cheapest_changes, largest_model
from .report import MemoryReport

COPIES = 2
"""On a CPU a run keeps copies of what it trains, to go back to: the last sound one, and one that is not yet proven."""


@dataclass(frozen=True)
class Peak:
    bytes: float
    """What a run takes of this machine's memory at the peak of a step, its base included; infinite where that is unknown."""
    traced: bool = False
    """Whether the step was traced; else the closed form says so, which counts a little more."""


@dataclass(frozen=True)
class Remedy:
    settings: Mapping[str, object]
    """Settings to change, None for one that becomes automatic."""
    bytes: float
    """What the run takes then."""


@dataclass(frozen=True)
class Widest:
    """The widest batch that a run's rows give."""

    tokens: int
    answers: int
    """Tokens at the end of each row for which logits are made; 0 for all."""


def must_fit(spec: Resolved, offered: Collection[str] | None = None, whole: bool = False) -> None:
    """Raises DoesNotFit for a run that needs more memory than is free, or with `whole` than this machine has at all.

    Models that stay loaded count as free, since they can be let go. Where nothing is known of what the run needs, or of what
    is free, it is let through. A smaller model that the error names is one of `offered`; None offers all.
    """
    limit = _whole() if whole else _free()
    if limit is None:
        return
    found = peak(spec, limit)
    if limit < found.bytes < math.inf:
        remedy = _remedy(spec, found, limit, offered)
        settings = remedy.settings if remedy else {}
        raise DoesNotFit(_said(spec, found, limit, whole, remedy), settings, in_words(settings))


def make_room(spec: Resolved) -> None:
    """Lets other models go where a run needs their memory. Raises DoesNotFit where it is not enough even then."""
    must_fit(spec)
    base = weights.loaded(spec)
    others = weights.allocated() - (weights.allocated(base) if base else 0)
    if others and (free := _free()) is not None and peak(spec, free).bytes > free - others:
        weights.let_go(but=spec)


def peak(spec: Resolved, limit: int) -> Peak:
    """What a run takes: by the closed form, which is at once there, where that is within `limit` bytes; else by the trace.

    The closed form is of rows as long as the spec allows, and then of the task's own, where the model's tokenizer is here.
    """
    if (most := _closed(spec)) <= limit:
        return Peak(most)
    widest = _widest(spec)
    real = replace(spec, sequence_length=widest.tokens)
    if (about := _closed(real)) <= limit:
        return Peak(about)
    try:
        return Peak(_bytes(exact(real, widest.answers or None, quick=True)), traced=True)
    except SpecError:
        return Peak(about)


def in_words(settings: Mapping[str, object]) -> str:
    """Settings as a sentence names them: `batch size 1 and accumulation 4`. Automatic ones are left out."""
    said = [_named(name, value) for name, value in settings.items() if value is not None]
    return " and ".join([", ".join(said[:-1]), said[-1]] if said[1:] else said)


def _named(name: str, value: object) -> str:
    if name == "method":
        return methods.find(str(value)).name
    if name == "model":
        return models.find(str(value)).name
    text = f" {value:g}" if isinstance(value, float) else f" {value}"
    return name.replace("_", " ") + ("" if value is True else text)


def _closed(spec: Resolved) -> float:
    try:
        return _bytes(predict(spec))
    except SpecError:
        return math.inf


def _bytes(report: MemoryReport) -> float:
    """A step on this machine, and what stays beside it."""
    on_gpu = hardware.here().device == "cuda"
    step = report.reserved if on_gpu else report.allocated
    if step is None:
        return math.inf
    beside = methods.find(report.spec.method).in_place  # then what is trained is a copy, and the base stays as it is
    return step + report.trainable_weights * (beside + (0 if on_gpu else COPIES))


def _widest(spec: Resolved) -> Widest:
    if not weights.loaded(spec) and fetching.source_of(models.find(spec.model)) is None:
        return Widest(spec.sequence_length, 0)
    task = tasks.find(spec.task)
    found = _rows(spec.model, models.edition(spec.model), task, tasks.drawn(task, spec.training_rows, spec.seed))
    least = int(SETTINGS["sequence_length"].low or 1)
    return replace(found, tokens=max(least, min(found.tokens, spec.sequence_length)))


@lru_cache(maxsize=64)
def _rows(model: str, _edition: str, task: tasks.Task, rows: tuple[tasks.Row, ...]) -> Widest:
    tokenizer = weights.tokenizer_of(models.find(model))
    prompts = [len(tasks.prompt_ids(tokenizer, task.instruction, row.prompt)) for row in rows]
    answers = [len(tasks.answer_ids(tokenizer, row.answer)) for row in rows]
    longest = max(map(sum, zip(prompts, answers, strict=True)))
    return Widest(longest, longest - min(prompts) + 1)


def _free() -> int | None:
    """Bytes that a run may take, those of loaded models included; None where that is not known."""
    held = weights.allocated()
    if hardware.here().device == "cpu":
        free = hardware.free_memory()
        return None if free is None else free + max(0, held - hardware.mapped_files())
    import torch

    try:
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() + held
    except (RuntimeError, AssertionError):  # this process has no GPU
        return None


def _whole() -> int | None:
    """Bytes of this machine's memory, or of its GPU's; None where that is not known."""
    machine = hardware.here()
    if machine.device == "cpu":
        return machine.memory_bytes
    return int(machine.gpu_share * GPUS[machine.gpu].memory_bytes) if machine.gpu else None


def _remedy(spec: Resolved, found: Peak, limit: int, offered: Collection[str] | None) -> Remedy | None:
    """The cheapest changes after which the run fits here, else a smaller model, with the cheapest two of them where it
    needs these too; None where nothing does.

    A changed run is traced only where there is hope that it fits: it may need as much less than its closed form says as
    this run's trace does.
    """
    width = _widest(spec).tokens
    about = _closed(replace(spec, sequence_length=width))
    share = 1.0 if about == math.inf else min(1.0, found.bytes / about)

    def needed(changed: Resolved) -> float:
        known = replace(changed, sequence_length=width) if changed.model == spec.model else changed
        if cannot_run(changed) or share * _closed(known) > limit:
            return math.inf
        return peak(changed, limit).bytes

    if cheapest := cheapest_changes(spec, limit, needed):
        chosen, changed = cheapest
        return Remedy(_settings(spec, chosen), needed(changed))
    size = predict(spec).total_parameters
    smaller = [m.key for m in models.MODELS.values() if m.hub_id and (m.total_parameters or math.inf) < size]
    allowed = [key for key in smaller if offered is None or key in offered]
    for chosen in (changes_for(spec)[:n] for n in range(SAME_RESULT + 1)):
        settings = _settings(spec, chosen)
        if model := largest_model(resolve(spec.but(**settings)), limit, allowed, needed):
            settings["model"] = model
            return Remedy(settings, needed(resolve(spec.but(**settings))))
    return None


def _settings(spec: Resolved, chosen: Collection[Change]) -> dict[str, object]:
    return {name: value for change in chosen for name, value in change.apply(spec).items()}


def _said(spec: Resolved, found: Peak, limit: int, whole: bool, remedy: Remedy | None) -> str:
    """The refusal: the value, the limit and the fix."""
    memory = "GPU memory" if hardware.here().device == "cuda" else "memory"
    how = "by a trace of its step" if found.traced else "by the closed form"
    has = f"this machine has {units.size(limit)}" if whole else f"{units.size(limit)} of it is free here"
    fix = "train a smaller model, or on a machine with more"
    if remedy:
        fix = f"with {in_words(remedy.settings)} it needs {units.size(remedy.bytes)}"
    run = f"{methods.find(spec.method).name} on {models.find(spec.model).name}, batch size {spec.batch_size}"
    return f"{run}: this needs {units.size(found.bytes)} of {memory} ({how}), and {has}; {fix}"
