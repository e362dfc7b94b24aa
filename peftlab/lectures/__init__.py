"""What the lectures state, each statement with its source and what is found of it here."""

import json
from pathlib import Path
from typing import Any


def text(name: str) -> str:
    """A file of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def data(name: str) -> Any:
    """A JSON file of this folder, the lists in its objects as tuples."""
    return json.loads(
        text(name), object_hook=lambda o: {key: tuple(v) if isinstance(v, list) else v for key, v in o.items()}
    )
