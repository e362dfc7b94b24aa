"""The room of jobs under strain: many visitors who train at once, a server that is killed, and memory over many runs.

All of it is done with small models that are made for it, at a real server in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import SpecError
from ..measured import provenance
from ..spec import Json, closest
from . import Say, write
from .crowd import visitors
from .kills import kills
from .steady import memory

PARTS: dict[str, Callable[[int, Say], Json]] = {"visitors": visitors, "kills": kills, "memory": memory}
"""What is measured, each over a number of visitors, kills or runs."""


def record_room(
    out: Path, say: Say, only: Sequence[str] | None = None, people: int = 50, killed: int = 20, runs: int = 100
) -> Json:
    """Writes to `out` what came of each part, by default of all. Raises SpecError for an unknown one, and PeftlabError."""
    for part in only or ():
        if part not in PARTS:
            raise SpecError(f"only={part}: no such part; {closest(part, PARTS)}")
    counts = {"visitors": people, "kills": killed, "memory": runs}
    document = provenance() | {"kind": "room"}
    for part, measure in PARTS.items():
        if not only or part in only:
            document[part] = measure(counts[part], say)
            write(document, out)
    return document
