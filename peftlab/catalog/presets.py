"""Published settings, each with who published it. `presets.json` holds one a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..spec import closest


@dataclass(frozen=True)
class Preset:
    key: str
    name: str
    source: str
    says: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    alpha_over_rank: float | None = None
    epochs: int | None = None
    """Times that a run reads all training rows; its steps follow from the task's rows and the batch."""


PRESETS: dict[str, Preset] = {
    key: Preset(key, **entry)
    for key, entry in json.loads((Path(__file__).parent / "presets.json").read_text(encoding="utf-8")).items()
}


def find(key: str) -> Preset:
    if key not in PRESETS:
        raise SpecError(f"preset={key}: no such preset; {closest(key, PRESETS)}")
    return PRESETS[key]
