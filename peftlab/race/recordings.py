"""Recorded races: read from assets/measured/, and their lines found by what they ran with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

from ..measured import documents
from . import Line


class Board:
    """A race's finished lines, found by their settings."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = [line for line in lines if line.scores]

    def of(self, **settings: Any) -> Line:
        """The line of these settings, the best of several. Raises LookupError where none finished."""
        found = [line for line in self.lines if all(line.spec[name] == value for name, value in settings.items())]
        if not found:
            raise LookupError(f"no racer of {settings} finished")
        return max(found, key=lambda line: line.score)

    def score(self, **settings: Any) -> float:
        return self.of(**settings).score

    def best(self, setting: str, of: str) -> Any:
        """The value of a setting at which a method scores highest; of equals, the one with the lower loss."""
        found = [line for line in self.lines if line.spec["method"] == of]
        return max(found, key=lambda line: (line.score, -fmean(line.loss))).spec[setting]


@dataclass(frozen=True)
class Recording:
    """Races of one lesson on one machine."""

    lines: tuple[Line, ...]
    hardware: str
    device: str
    date: str
    versions: Mapping[str, str]
    commands: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, int]:
        """The fewest and the most that a racer has finished, of those that finished any."""
        finished = [len(line.scores) for line in self.lines if line.scores]
        return min(finished, default=0), max(finished, default=0)

    @property
    def runs(self) -> int:
        return sum(len(line.scores) for line in self.lines)


@lru_cache
def of(key: str) -> list[Recording]:
    """Of a lesson, that with the most runs first, of equals a GPU's: the files `race-KEY-*.json`, those of one machine
    together.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for document in documents(f"race-{key}"):
        found.setdefault(document["hardware"], []).append(document)
    recordings = []
    for hardware, together in found.items():
        lines = {
            json.dumps(line["spec"] | {"seed": 0}): Line(**line)
            for d in together
            for line in d["lines"]
            if line["scores"] or line["error"]
        }
        last = max(together, key=lambda d: d["date"])
        commands = tuple(d["command"] for d in together)
        recordings.append(
            Recording(tuple(lines.values()), hardware, last["device"], last["date"], last["versions"], commands)
        )
    return sorted(recordings, key=lambda r: (-r.runs, r.device != "cuda"))
