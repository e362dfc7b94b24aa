"""Measurements that a user can repeat. Each writes JSON with its command, hardware, library versions and date."""

import json
from collections.abc import Callable
from pathlib import Path

from ..spec import Json

Say = Callable[[str], None]
"""Takes a line about the progress."""


def write(document: Json, out: Path) -> Json:
    """Writes a recording, in a folder that may not exist yet, and returns it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document
