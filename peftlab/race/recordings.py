"""Recorded races: written as they go on, read from assets/measured/, and their lines found by what they ran with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import SpecError
from ..measured import documents, provenance
from ..spec import Json
from .board import Line


class Board:
    """A race's finished lines, found by their settings."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = [line for line in lines if line.scores]

    def of(self, **settings: object) -> Line:
        """The line of these settings, the best of several. Raises LookupError where none finished."""
        found = [line for line in self.lines if all(line.spec[name] == value for name, value in settings.items())]
        if not found:
            raise LookupError(f"no racer of {settings} finished")
        return max(found, key=lambda line: line.score)

    def score(self, **settings: object) -> float:
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
    """A lesson's recordings, one a machine: the one with the most runs first, of equals a GPU's.

    All files `race-KEY-*.json` of one machine make one recording; of two lines of the same settings the later file's counts.
    """
    found: dict[str, list[Json]] = {}
    for one in documents(f"race-{key}"):
        found.setdefault(one["hardware"], []).append(one)
    return sorted(map(_recording, found.values()), key=lambda r: (-r.runs, r.device != "cuda"))


def _recording(together: Sequence[Json]) -> Recording:
    lines = [Line(**line) for one in together for line in one["lines"] if line["scores"] or line["error"]]
    last = max(together, key=lambda one: one["date"])
    return Recording(
        tuple({json.dumps(line.spec | {"seed": 0}): line for line in lines}.values()),
        last["hardware"], last["device"], last["date"], last["versions"], tuple(one["command"] for one in together),
    )  # fmt: skip


def document(axes: Mapping[str, Sequence[str]], lines: Sequence[Line]) -> Json:
    """A race as it is recorded: command, hardware, versions and date, and the board."""
    return provenance() | {"kind": "race", "vary": dict(axes), "lines": [asdict(line) for line in lines]}


def record(file: Path, axes: Mapping[str, Sequence[str]], lines: Sequence[Line]) -> None:
    """Writes `document`, a line of the file for each of the board."""
    head = json.dumps(document(axes, []), indent=1).removesuffix("[]\n}")
    rows = ",\n".join(json.dumps(asdict(line)) for line in lines)
    file.write_text(f"{head}[\n{rows}\n]}}\n", encoding="utf-8")


def read(file: Path) -> list[Line]:
    """The lines of a race that a command recorded. Raises SpecError for a file that is none."""
    try:
        return [Line(**line) for line in json.loads(file.read_text(encoding="utf-8"))["lines"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{file}: not a recorded race ({error}); give another path") from None
