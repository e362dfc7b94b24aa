"""Where the files of a base model lie on this machine, and where they came from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from .models import CONFIG, BaseModel

MANIFEST = "peftlab-source.json"
"""The file in a fetched model's folder that holds its Source."""
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class Source:
    """Where a model on disk came from."""

    where: str
    precision: str
    sha256: str
    size: int
    """Bytes of the weights, which betray a truncated copy."""


def cache() -> Path:
    """The folder for base models: PEFTLAB_CACHE, else ~/.cache/peftlab."""
    return Path(os.environ.get("PEFTLAB_CACHE") or Path.home() / ".cache" / "peftlab")


def folder_of(entry: BaseModel) -> Path:
    """The folder that the model is loaded from: the user's own, or the one in the cache that a fetch makes."""
    return entry.folder or cache() / "models" / entry.key.replace("/", "--")


def bytes_in(folder: Path, pattern: str = "**/*") -> int:
    """Bytes of the files in `folder` that match, some of which may go while they are counted."""
    size = 0
    for file in folder.glob(pattern):
        try:
            size += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return size


def source_of(entry: BaseModel) -> Source | None:
    """The source of a model that is on disk and ready to load; None where nothing is there, or not all of it."""
    folder = folder_of(entry)
    if entry.key.startswith(CONFIG) or not (folder / "config.json").exists():
        return None
    size = bytes_in(folder, WEIGHTS)
    if (folder / MANIFEST).exists():
        source = Source(**json.loads((folder / MANIFEST).read_text()))
        return source if source.size == size else None
    return Source(str(folder), "as in the folder", "", size) if size else None
