"""Measurements that a user can repeat. Each writes JSON with its command, hardware, library versions and date."""

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

from ..spec import Json

Result = TypeVar("Result")
Say = Callable[[str], None]
"""Takes a line about the progress."""


def result_of(work: Generator[object, None, Result]) -> Result:
    """Takes `work` to its end and returns its result."""
    while True:
        try:
            next(work)
        except StopIteration as finished:
            return finished.value


def write(document: Json, out: Path) -> Json:
    """Writes a recording, in a folder that may not exist yet, and returns it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document
