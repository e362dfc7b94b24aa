"""What to try after a run: each suggestion has a reason out of the run's own numbers, and the settings that try it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import sqrt
from statistics import fmean, variance

from .. import units
from ..data import tasks
from ..resolve import resolve, resolve_here
from ..run.events import Event
from ..spec import SETTINGS, Json, Resolved, RunSpec
from .marks import MUCH, replacing
from .run_charts import losses_of
from .settings import short

MOST = 3
SATURATED = 0.95
"""A score from which on there is too little left to gain."""
HARDLY = 0.9
"""A loss that ends above this share of the first one has hardly moved."""
LITTLE = 0.02
"""A fall of the loss by a smaller share is not worth more steps."""
OF_THE_MACHINE = ("gpu", "precision", "attention")
"""Settings that each machine chooses for itself."""


@dataclass(frozen=True)
class Suggestion:
    label: str
    """What its button says."""
    why: str
    run: Mapping[str, str] = field(default_factory=dict)
    """The settings of the run to try, automatic ones left out."""
    adapter: str = ""
    """The id of a run whose adapter is compared with the base, instead of a run to try."""


def suggestions(events: Sequence[Event], spec: Resolved, adapter: str = "") -> list[Suggestion]:
    """One to three things to try after a run that is done; `adapter` is its id, where its owner may compare it."""
    done, losses = events[-1], losses_of(events)
    after = (done.get("eval") or {}).get("after")
    score = next(iter(after.values())) if after else 0.0
    found = [_to_its_end(done, spec, bool(adapter)), _less_forgetting(done, spec)]
    if score >= SATURATED:
        found.append(_saturated(score, spec))
    elif not found[0]:
        learned = _longer(losses, spec) or (None if found[1] else _faster(losses, spec)) or _more_rows(done, spec)
        found.insert(0, _as_the_task(spec) or learned)
    chosen = [one for one in found if one] or [_another_seed(spec)]
    if not adapter:
        return chosen[:MOST]
    compared = Suggestion("Compare", "Put a prompt of your own to the base and to this adapter.", adapter=adapter)
    return [*chosen[: MOST - 1], compared]


def _to_its_end(done: Event, spec: Resolved, resumable: bool) -> Suggestion | None:
    """All steps, after a run that was stopped. Where it is `resumable`, there is a button beside it that goes on."""
    if not done["stopped"] or done["steps"] >= int(spec.steps or 0):
        return None
    why = f"It was stopped after {done['steps']} of {spec.steps} steps."
    more = " Resume goes on from there; this begins anew." if resumable else ""
    return Suggestion(f"All {spec.steps} steps", why + more, settings_of(spec))


def _as_the_task(spec: Resolved) -> Suggestion | None:
    """As many steps as the task's own run takes here, after a run that was asked for fewer."""
    usual = resolve_here(RunSpec(model=spec.model, method=spec.method, task=spec.task)).steps
    why = f"It took {spec.steps} step{'s' if spec.steps != 1 else ''}; this task's own run takes {usual}."
    return _with(spec, "steps", usual, f"{usual} steps", why) if spec.steps < usual else None


def _longer(losses: Sequence[float], spec: Resolved) -> Suggestion | None:
    """More steps, where the loss has not come to rest."""
    steps = 2 * int(spec.steps or 0)
    fall = still_falls(losses)
    return _with(spec, "steps", steps, f"{steps} steps", f"The loss still falls: {fall}.") if fall else None


def _faster(losses: Sequence[float], spec: Resolved) -> Suggestion | None:
    """A higher learning rate after a run whose loss has hardly moved."""
    end = fmean(losses[-max(1, len(losses) // 4) :]) if losses else 0.0
    if not losses or end <= HARDLY * losses[0]:
        return None
    rate = 2 * float(spec.learning_rate or 0)
    why = f"The loss has hardly moved: {losses[0]:.2f} at first, {end:.2f} at the end."
    return _with(spec, "learning_rate", rate, f"Learning rate {rate:g}", why)


def _more_rows(done: Event, spec: Resolved) -> Suggestion | None:
    """Larger batches, where the loss is level and training rows were left unread."""
    size, rows = int(spec.batch_size or 0), int(spec.training_rows or 0) or len(tasks.find(str(spec.task)).train)
    read = done["steps"] * size * int(spec.accumulation or 1)
    why = f"The loss is level, but only {read} of {rows} training rows were read."
    return _with(spec, "batch_size", 2 * size, f"{2 * size} examples a step", why) if read < rows else None


def still_falls(losses: Sequence[float]) -> str:
    """How the loss falls at the end of a run, in words; empty where it is level there, or what it does may be chance.

    The last quarter of the steps has to lie below the one before it by twice the standard error of the difference and by a
    share of LITTLE. Of fewer than eight steps, the last one has to be the lowest.
    """
    n = len(losses) // 4
    if n < 2:
        lowest = len(losses) > 1 and losses[-1] < min(losses[:-1])
        return f"the last step's {losses[-1]:.2f} is the lowest" if lowest else ""
    before, last = losses[-2 * n : -n], losses[-n:]
    error = sqrt((variance(before) + variance(last)) / n)
    if fmean(before) - fmean(last) <= max(2 * error, LITTLE * fmean(before)):
        return ""
    say = units.significant
    return f"{say(fmean(before))} on average in the third quarter of the steps, {say(fmean(last))} in the last"


def _less_forgetting(done: Event, spec: Resolved) -> Suggestion | None:
    """A lower learning rate after a run that forgot a lot."""
    change = done.get("forgetting")
    if change is None or change < MUCH:
        return None
    rate = float(spec.learning_rate or 0) / 2
    why = f"It forgot a lot, {units.significant(change, 2)} nats a token; smaller updates usually forget less."
    return _with(spec, "learning_rate", rate, f"Learning rate {rate:g}", why)


def _saturated(score: float, spec: Resolved) -> Suggestion | None:
    """Fewer parameters after a run that has nothing left to learn, or another task."""
    said = f"{units.score(score)} leaves little to gain"
    if spec.rank and spec.rank > 1:
        return _with(spec, "rank", 1, "Rank 1", f"{said}: see whether the lowest rank learns it too.")
    other = next((key for key in tasks.TASKS if key != spec.task), None)
    if other is None:
        return None
    plain = {"model": str(spec.model), "method": str(spec.method), "task": other}
    return Suggestion(tasks.TASKS[other].name, f"{said}: take another task.", plain)


def _another_seed(spec: Resolved) -> Suggestion:
    """Another seed, which is of use after any run."""
    seed = int(spec.seed or 0) + 1
    why = "One run is one draw: another seed shows how far its numbers vary."
    return Suggestion(f"Seed {seed}", why, {**settings_of(spec), "seed": str(seed)})


def _with(spec: Resolved, name: str, value: float, label: str, why: str) -> Suggestion | None:
    """The run with another value of one setting; None where that is out of the setting's range."""
    about = SETTINGS[name]
    if about.high is not None and value > about.high:
        return None
    return Suggestion(label, why, {**settings_of(spec), name: short(value)})


def settings_of(spec: Resolved) -> dict[str, str]:
    """Model, method and task of a run, and what else is not automatic; each machine chooses its own precision."""
    named, all_of = {"model": str(spec.model), "method": str(spec.method), "task": str(spec.task)}, spec.to_dict()
    usual = _resolved(named)
    left_out = (*named, *OF_THE_MACHINE, *spec.unread)
    changed = {n: v for n, v in all_of.items() if n not in left_out and v != usual.get(n)}
    for name in [*changed]:  # one may follow from another: alpha is twice the rank
        others = {n: v for n, v in changed.items() if n != name}
        if _resolved({**named, **others}).get(name) == changed[name]:
            changed = others
    return {name: short(value) for name, value in {**named, **changed}.items()}


def _resolved(settings: Json) -> Json:
    return resolve(RunSpec.from_dict(settings)).to_dict()


def buttons(told: Sequence[Suggestion]) -> str:
    """Suggestions as HTML. The page's store writes what a button holds."""
    return "".join(f"<p>{_button(one)} {escape(one.why)}</p>" for one in told)


def _button(one: Suggestion) -> str:
    if not one.adapter:
        return replacing(one.label, one.run)
    does = f'data-opens="compare" data-write="{escape(json.dumps({"adapter": one.adapter}))}"'
    return f'<button type="button" class="small-button" {does}>{escape(one.label)}</button>'
