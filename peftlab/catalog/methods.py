"""What is said of each fine-tuning method. `methods.json` holds an entry each, in the order in which methods are shown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FAMILIES = ("full", "additive", "selective", "prompt-based")
"""The lectures' three families, and the yardstick that all are held against."""


@dataclass(frozen=True)
class About:
    name: str
    family: str
    hypothesis: str
    """Why it should work, in one sentence."""
    trains: str
    """What is trained and where, by role."""
    inference: str
    """What it adds when the model is used."""
    merging: str
    """Whether and how it folds into the base's weights."""
    when: str
    when_not: str
    mistakes: tuple[str, ...]
    papers: tuple[str, ...] = ()
    """Keys of `papers.json`."""
    reparameterized: bool = False
    """Within the additive family: what is added is another way to write a change of the weights."""


def _read() -> dict[str, About]:
    entries = json.loads((Path(__file__).parent / "methods.json").read_text(encoding="utf-8"))
    lists = ("mistakes", "papers")
    return {key: About(**{**e, **{n: tuple(e.get(n, ())) for n in lists}}) for key, e in entries.items()}


ABOUT: dict[str, About] = _read()
