"""Recorded scores of one task and method: which tab shows which, and what differs between the runs they come from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from .. import adapters, measured, units
from ..adapters import Adapter
from ..compare import wilson
from ..methods.selection import WHERE
from ..spec import Json
from . import recordings
from .recordings import Line


@dataclass(frozen=True)
class Recorded:
    """A held-out score that a tab shows, of one run or as the mean of several seeds."""

    tab: str
    spec: Json
    """Every setting of the run, resolved."""
    scores: tuple[float, ...]
    """One for each seed."""
    items: int
    hardware: str

    @property
    def score(self) -> float:
        return fmean(self.scores)

    def words(self) -> tuple[str, ...]:
        """What most decides a score: rank, modules, steps, learning rate and hardware."""
        rank, modules = self.spec.get("rank"), self.spec.get("target_modules") or ""
        steps = f"{self.spec['steps']} steps of {self.spec['batch_size']} examples"
        rate = f"learning rate {self.spec['learning_rate']:g}"
        return f"rank {rank}", WHERE.get(modules, modules), steps, rate, f"on {self.hardware}"

    def settings(self) -> str:
        """The settings that most decide a score, in words."""
        rank, _, steps, rate, _ = self.words()
        return ", ".join([rank, steps, rate] if self.spec.get("rank") else [steps, rate])

    def unlike(self, other: Recorded) -> list[str]:
        """What is different here, in words."""
        seeds = len(self.scores)
        said = f"mean of {seeds} seeds" if seeds > 1 else f"seed {self.spec['seed']} alone"
        unlike = [own for own, theirs in zip(self.words(), other.words(), strict=True) if own != theirs]
        return [said, *unlike] if seeds != len(other.scores) else unlike or ["another run"]


def of_run(run: Json) -> Recorded:
    """The score of a training run that Live shows, one of `measured.runs`."""
    done = run["events"][-1]["eval"]
    return Recorded("Live", run["spec"], tuple(done["after"].values()), done["items"], run["hardware"])


def of_adapter(adapter: Adapter) -> Recorded:
    """The score of an adapter in Compare that has one in its manifest."""
    result = adapter.result
    done = result["eval"]
    spec = adapter.spec.to_dict() | {"steps": result["steps"]}  # fewer than were meant, where it was stopped
    return Recorded("Compare", spec, tuple(done["after"].values()), done["items"], result["device"])


def of_line(line: Line, hardware: str) -> Recorded:
    """The score of a racer that finished."""
    return Recorded("Race", line.spec, tuple(map(fmean, line.scores)), len(line.scores[0]), hardware)


@lru_cache
def recorded() -> tuple[Recorded, ...]:
    """The scores that tabs show when they are opened; of one tab, task and method, the first is the one that is seen."""
    runs = [of_run(run) for run in measured.runs()]
    bundled = [of_adapter(adapter) for adapter in adapters.bundled() if adapter.result.get("heldout")]
    races = [of_line(line, race.hardware) for race in recordings.of("methods") for line in race.lines if line.scores]
    return (*runs, *bundled, *races)


def elsewhere(here: Recorded) -> str:
    """Why other tabs show other scores for the same task, method and model, as one sentence; empty where none does."""
    seen: dict[str, Recorded] = {}
    for other in recorded():
        if other.tab != here.tab and all(other.spec[name] == here.spec[name] for name in ("task", "method", "model")):
            seen.setdefault(other.tab, other)
    if not seen:
        return ""
    others, said = [], set[str]()
    for other in seen.values():
        unlike = other.unlike(here)
        new = [part for part in unlike if part not in said]
        why = ", ".join(new if len(new) == len(unlike) else ["as there", *new])
        others.append(f"{units.score(other.score)} in {other.tab} ({why})")
        said.update(unlike)
    low, high = wilson(here.scores[0] * here.items, here.items)
    known = f"{units.score(here.score)} is known only to lie between {units.score(low)} and {units.score(high)}"
    sure = f"; on {here.items} items, {known}" if len(here.scores) == 1 else ""
    return f"The same task and method: {', '.join(others)}{sure}."
