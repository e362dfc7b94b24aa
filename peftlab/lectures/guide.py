"""Which method, and whether any: what the lectures advise and compare, each piece with its source and what we find of it.

`guide.json` holds families in the order of how deep they reach, situations, pros and cons, and comparison tables. What
stands beside a lecture's words is computed: `here` names one of `evidence.HERE`, `check` one of `checks.CHECKS`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..catalog.methods import FAMILIES

GROUPS = {
    "none": "Before any training",
    "full": "Where PEFT may be the wrong tool",
    "peft": "What matters most",
    "gemma": "What lecture 11.2 says of Gemma 3 270M",
}
"""Of situations."""


@dataclass(frozen=True)
class Family:
    key: str
    """One of FAMILIES."""
    idea: str
    """In a word."""
    says: str

    def __post_init__(self) -> None:
        if self.key not in FAMILIES:
            raise LookupError(f"family={self.key}: guide.json has a family that is none of {', '.join(FAMILIES)}")


@dataclass(frozen=True)
class Case:
    """A situation, and what to do in it."""

    key: str
    group: str
    when: str
    advice: str
    why: str
    source: str
    methods: tuple[str, ...] = ()
    """To use, the first one first; none where the advice is not to train."""
    here: str = ""
    """Of `evidence.HERE`; empty where there is nothing to compute."""
    model: str = ""
    """Whose counts to show; empty for the run's own."""
    differs: bool = False
    """What is found here is not what the lecture says."""
    ticked: bool = False
    """At first."""


def weighed(cases: Iterable[Case]) -> list[tuple[str, int]]:
    """(method, how many of the situations it is advised in), the most first, then in the order of the advice."""
    return Counter(key for case in cases for key in case.methods).most_common()


@dataclass(frozen=True)
class Sides:
    """Pros and cons, of an aspect of PEFT or of a kind of method."""

    source: str
    of: str
    pros: tuple[str, ...]
    cons: tuple[str, ...]
    methods: tuple[str, ...] = ()
    here: str = ""


@dataclass(frozen=True)
class Finding:
    text: str
    holds: bool | None
    """Whether it is as the lecture says; None where a machine cannot tell."""
    read: bool = False
    """Told by our reading, not by a machine."""


@dataclass(frozen=True)
class Cell:
    """One statement of a lecture's table."""

    of: str
    """Its row and column."""
    says: str
    check: str
    """Of `checks.CHECKS`."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """To the check."""
    why: str = ""
    differs: bool = False
    """Where the check cannot tell: our reading of it."""


@dataclass(frozen=True)
class Table:
    source: str
    cells: tuple[Cell, ...]


_entries = json.loads((Path(__file__).parent / "guide.json").read_text(encoding="utf-8"))


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


SPECTRUM: tuple[Family, ...] = tuple(Family(**e) for e in _entries["families"])
CASES: dict[str, Case] = {e["key"]: Case(**_tuples(e)) for e in _entries["cases"]}
SIDES: tuple[Sides, ...] = tuple(Sides(**_tuples(e)) for e in _entries["sides"])
TABLES: tuple[Table, ...] = tuple(Table(e["source"], tuple(Cell(**c) for c in e["cells"])) for e in _entries["tables"])
