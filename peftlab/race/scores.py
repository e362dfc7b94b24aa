"""Recorded scores of one task and method. They differ from tab to tab: where each stands, and what it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

from .. import adapters, measured, units
from ..adapters import Adapter
from ..compare import wilson
from ..methods.where import WHERE
from . import Line, recordings


@dataclass(frozen=True)
class Recorded:
    """A held-out score that a tab shows, of one run or as the mean of several seeds."""

    tab: str
    spec: Mapping[str, Any]
    """Every setting of the run, resolved."""
    scores: tuple[float, ...]
    """Of each seed."""
    items: int
    hardware: str

    @property
    def score(self) -> float:
        return fmean(self.scores)

    def settings(self) -> str:
        """What most decides a score."""
        rank = f"rank {self.spec['rank']}, " if self.spec.get("rank") else ""
        return f"{rank}{_steps(self.spec)}, learning rate {self.spec['learning_rate']:g}"

    def unlike(self, other: Recorded) -> list[str]:
        """What is different here, in words."""
        said = []
        if len(self.scores) != len(other.scores):
            seeds = len(self.scores)
            said.append(f"mean of {seeds} seeds" if seeds > 1 else f"seed {self.spec['seed']} alone")
        if self.spec.get("rank") != other.spec.get("rank"):
            said.append(f"rank {self.spec.get('rank')}")
        if self.spec.get("target_modules") != other.spec.get("target_modules"):
            modules = self.spec.get("target_modules") or ""
            said.append(WHERE.get(modules, modules))
        if _steps(self.spec) != _steps(other.spec):
            said.append(_steps(self.spec))
        if self.spec["learning_rate"] != other.spec["learning_rate"]:
            said.append(f"learning rate {self.spec['learning_rate']:g}")
        if self.hardware != other.hardware:
            said.append(f"on {self.hardware}")
        return said or ["another run"]


def _steps(spec: Mapping[str, Any]) -> str:
    return f"{spec['steps']} steps of {spec['batch_size']} examples"


def of_run(run: Mapping[str, Any]) -> Recorded:
    """Of a training run that Live shows, from `measured.runs`."""
    done = run["events"][-1]["eval"]
    return Recorded("Live", run["spec"], tuple(done["after"].values()), done["items"], run["hardware"])


def of_adapter(adapter: Adapter) -> Recorded:
    """Of an adapter in Compare, that has its score in its manifest."""
    done = adapter.result["eval"]
    scores, device = tuple(done["after"].values()), adapter.result["device"]
    spec = adapter.spec.to_dict() | {"steps": adapter.result["steps"]}  # fewer than were meant, where it was stopped
    return Recorded("Compare", spec, scores, done["items"], device)


def of_line(line: Line, hardware: str) -> Recorded:
    """Of a finished racer."""
    return Recorded("Race", line.spec, tuple(map(fmean, line.scores)), len(line.scores[0]), hardware)


@lru_cache
def recorded() -> tuple[Recorded, ...]:
    """What each tab shows first, where it is opened: of a task and method, the first is the one that is seen."""
    runs = [of_run(run) for run in measured.runs()]
    bundled = [of_adapter(adapter) for adapter in adapters.bundled() if adapter.result.get("heldout")]
    races = [of_line(line, race.hardware) for race in recordings.of("methods") for line in race.lines if line.scores]
    return (*runs, *bundled, *races)


def elsewhere(here: Recorded) -> str:
    """Why other tabs show other scores for the same task, method and model, as one sentence; empty where none does."""
    same = ("task", "method", "model")
    seen: dict[str, Recorded] = {}
    for other in recorded():
        if other.tab != here.tab and all(other.spec[name] == here.spec[name] for name in same):
            seen.setdefault(other.tab, other)
    if not seen:
        return ""
    others, said = [], set[str]()
    for other in seen.values():
        unlike = other.unlike(here)
        new = [part for part in unlike if part not in said]
        others.append(
            f"{units.score(other.score)} in {other.tab} ({', '.join(new if len(new) == len(unlike) else ['as there', *new])})"
        )
        said.update(unlike)
    low, high = wilson(here.scores[0] * here.items, here.items)
    known = f"{units.score(here.score)} is known only to lie between {units.score(low)} and {units.score(high)}"
    sure = f"; on {here.items} items, {known}" if len(here.scores) == 1 else ""
    return f"The same task and method: {', '.join(others)}{sure}."
