"""Facts as data, each with its source: base models, GPUs, papers. To add one, add a line to the JSON beside this file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..errors import SpecError
from ..spec import closest

Entry = TypeVar("Entry")
FAMILIES = ("full", "additive", "selective", "prompt-based")
"""The lectures' three families, and the yardstick that all are held against."""


def read(name: str) -> dict[str, Any]:
    """The entries of `NAME.json`, in the order in which they are shown."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class About:
    """What is said of a fine-tuning method."""

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
    mistakes: Sequence[str]
    papers: Sequence[str] = ()
    """Keys of PAPERS."""
    reparameterized: bool = False
    """Within the additive family: what is added is another way to write a change of the weights."""


@dataclass(frozen=True)
class Paper:
    """A paper that methods and conventions come from."""

    key: str
    authors: str
    year: int
    title: str
    venue: str
    url: str

    @property
    def citation(self) -> str:
        return f"{self.authors} ({self.year}), {self.title}"


@dataclass(frozen=True)
class Preset:
    """Published settings, and who published them."""

    key: str
    name: str
    source: str
    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    alpha_over_rank: float | None = None
    epochs: int | None = None
    """Times that a run reads all training rows; its steps follow from the task's rows and the batch."""


ABOUT = {key: About(**entry) for key, entry in read("methods").items()}
PAPERS = {key: Paper(key, **entry) for key, entry in read("papers").items()}
PRESETS = {key: Preset(key, **entry) for key, entry in read("presets").items()}


def entry_of(kind: str, key: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry of that key. Raises SpecError with the nearest keys."""
    if key not in entries:
        raise SpecError(f"{kind}={key}: no such {kind}; {closest(key, entries)}")
    return entries[key]
