"""What the lectures claim in numbers, each recomputed here. `claims.json` holds one a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..spec import RunSpec


@dataclass(frozen=True)
class Claim:
    tab: str
    source: str
    says: str
    claimed: float
    unit: str
    quantity: str
    """Which of our numbers it is about: a field of MemoryReport, storage_full, storage_adapters, or trainable."""
    spec: Mapping[str, Any]
    why: str
    """The convention behind it, or the reason it differs."""
    convention: str = "exact"
    trainable: int | None = None
    tasks: int = 1
    differs: bool = False
    """Exact counting disagrees by more than rounding."""

    @property
    def run(self) -> RunSpec:
        return RunSpec.from_dict(self.spec)

    def computed(self) -> float:
        """Our number for it."""
        from ..count import count
        from ..memory import predict, storage

        if self.quantity == "trainable":
            return count(self.run).trainable_parameters
        report = predict(self.run, self.convention, self.trainable)
        if self.quantity == "storage_full":
            return storage(report, self.tasks).full
        if self.quantity == "storage_adapters":
            return storage(report, self.tasks).adapters
        return getattr(report, self.quantity)


CLAIMS: tuple[Claim, ...] = tuple(
    Claim(**entry) for entry in json.loads((Path(__file__).parent / "claims.json").read_text())
)
