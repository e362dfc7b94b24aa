"""Published settings, each with who published it. `presets.json` holds one a line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..spec import RunSpec, closest


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

    def on(self, spec: RunSpec) -> RunSpec:
        """`spec` with these settings in place of its own; a change of method leaves behind what the old one alone read."""
        from .. import tasks
        from ..resolve import METHOD_SETTINGS, resolve

        if self.settings.get("method", spec.method) != spec.method:
            spec = spec.but(**dict.fromkeys((*METHOD_SETTINGS, "quantization")))
        spec = spec.but(**self.settings)
        if self.alpha_over_rank:
            spec = spec.but(alpha=self.alpha_over_rank * (resolve(spec).rank or 1))
        if self.epochs:
            rows = len(tasks.find(spec.task or tasks.DEFAULT).train)
            spec = spec.but(steps=math.ceil(self.epochs * rows / (spec.batch_size or 1)))
        return spec


PRESETS: dict[str, Preset] = {
    key: Preset(key, **entry)
    for key, entry in json.loads((Path(__file__).parent / "presets.json").read_text(encoding="utf-8")).items()
}


def find(key: str) -> Preset:
    if key not in PRESETS:
        raise SpecError(f"preset={key}: no such preset; {closest(key, PRESETS)}")
    return PRESETS[key]
