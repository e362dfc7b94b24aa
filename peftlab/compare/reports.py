"""What is known of a base and its adapters side by side: replies, scores and their intervals, as values that JSON carries."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..adapters import Adapter
from ..data import tasks

BASE, APART, MERGED, SERIAL = "base", "apart", "merged", "serial"
"""The base; and of `proofs.latency` the adapter apart from its weights, merged into them, and a new Houlsby adapter."""


@dataclass(frozen=True)
class Reply:
    model: str
    """BASE, or the adapter's name."""
    text: str
    seconds: float
    """Time that the text took; 0 where it was not measured."""
    score: float | None = None
    """0 or 1 by the task's metric; None for a prompt without a reference."""


@dataclass(frozen=True)
class Exchange:
    prompt: str
    reference: str | None
    """The right answer; None where there is none."""
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Score:
    """A mean of 0/1 scores and its 95% Wilson interval."""

    model: str
    mean: float
    low: float
    high: float
    items: int
    forgetting: float | None
    """Nats per token on public-domain prose, adapted minus base; None for the base and where it was not measured."""


@dataclass(frozen=True)
class ComparisonReport:
    task: str | None
    """Key of the task whose held-out rows were asked; None for a prompt of one's own."""
    metric: str | None
    exchanges: tuple[Exchange, ...]
    scores: tuple[Score, ...]
    """One for each model; empty for a prompt of one's own."""
    notes: tuple[str, ...] = ()
    """What was left out of an adapter's settings, in words."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(told: dict[str, Any]) -> ComparisonReport:
        """The report that `to_dict` told of, also out of JSON."""
        exchanges = [
            Exchange(**one | {"replies": tuple(Reply(**reply) for reply in one["replies"])})
            for one in told["exchanges"]
        ]
        scores = tuple(Score(**score) for score in told["scores"])
        return ComparisonReport(
            **told | {"exchanges": tuple(exchanges), "scores": scores, "notes": tuple(told["notes"])}
        )


def wilson(successes: float, items: int) -> tuple[float, float]:
    """95% interval of a proportion, sound for small samples and for 0 and 1. Wilson 1927."""
    if not items:
        return 0.0, 1.0
    p, z = successes / items, 1.959964
    middle = (p + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * math.sqrt(p * (1 - p) / items + z * z / (4 * items * items))
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))  # rounding must not put p outside


def score_of(model: str, scores: list[float], forgetting: float | None = None) -> Score:
    """The mean of at least one 0/1 score, with its interval."""
    low, high = wilson(sum(scores), len(scores))
    return Score(model, sum(scores) / len(scores), low, high, len(scores), forgetting)


def recorded(adapter: Adapter) -> ComparisonReport | None:
    """The comparison that the adapter's own run measured on all held-out rows; None where its manifest has none."""
    rows = adapter.result.get("heldout")
    if not rows:
        return None
    sides = ((BASE, "base", None), (adapter.label, "adapted", adapter.result.get("forgetting")))
    exchanges = []
    for r in rows:
        replies = tuple(Reply(name, r[side], 0.0, r[f"{side}_score"]) for name, side, _ in sides)
        exchanges.append(Exchange(r["prompt"], r["reference"], replies))
    scores = tuple(score_of(name, [r[f"{side}_score"] for r in rows], forgetting) for name, side, forgetting in sides)
    task = tasks.find(adapter.spec.task or "")
    return ComparisonReport(task.key, task.metric, tuple(exchanges), scores)
