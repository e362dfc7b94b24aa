"""Which method, and whether any: what the lectures advise and weigh up, each piece with its source.

`guide.json` holds families in the order of how deep they reach, situations, and pros and cons. The sentence that stands
beside a lecture's words is computed by `here.beside`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..catalog import FAMILIES

GROUPS = {
    "none": "Before any training",
    "full": "Where PEFT may be the wrong tool",
    "peft": "What matters most",
    "gemma": "What lecture 11.2 says of Gemma 3 270M",
}
"""The groups of situations."""


@dataclass(frozen=True)
class Family:
    key: str
    """One of FAMILIES."""
    idea: str
    """Its idea in a word."""
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
    """The methods to use, the first one first; none where the advice is not to train."""
    here: str = ""
    """The sentence of `here.HERE` that stands beside it; empty where there is nothing to compute."""
    raced: str = ""
    """The id of the statement whose recorded race stands beside it too; empty for none."""
    model: str = ""
    """The model whose counts are shown; empty for the run's own."""
    differs: bool = False
    """What is found here is not what the lecture says."""
    ticked: bool = False
    """It is ticked when the page opens."""


def weighed(cases: Iterable[Case]) -> list[tuple[str, int]]:
    """(method, in how many of the situations it is advised), the most first, then in the order of the advice."""
    return Counter(key for case in cases for key in case.methods).most_common()


@dataclass(frozen=True)
class Sides:
    """Pros and cons of an aspect of PEFT or of a kind of method."""

    source: str
    of: str
    pros: tuple[str, ...]
    cons: tuple[str, ...]
    methods: tuple[str, ...] = ()
    """The methods whose counts and times stand beside them."""
    here: str = ""
    raced: str = ""
    """Both as for a Case."""


_entries = json.loads((Path(__file__).parent / "guide.json").read_text(encoding="utf-8"))


def _tuples(entry: Mapping[str, object]) -> dict[str, object]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


SPECTRUM: tuple[Family, ...] = tuple(Family(**e) for e in _entries["families"])
CASES: dict[str, Case] = {e["key"]: Case(**_tuples(e)) for e in _entries["cases"]}  # type: ignore[arg-type]
SIDES: tuple[Sides, ...] = tuple(Sides(**_tuples(e)) for e in _entries["sides"])  # type: ignore[arg-type]
