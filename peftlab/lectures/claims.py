"""What the lectures claim in numbers, each recomputed here. `claims.json` holds one a line, table by table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..resolve import resolve
from ..spec import RunSpec

COUNTED = ("trainable_parameters", "adapter_bytes")
"""Quantities of a ParameterReport."""


@dataclass(frozen=True)
class Claim:
    tab: str
    source: str
    """The text, and in it the slide or table."""
    says: str
    claimed: float
    """Of a range, the upper end."""
    unit: str
    """bytes, parameters, or percent of the model's parameters."""
    quantity: str
    """Which of our numbers it is about: one of COUNTED, trainable_percent, storage_full, storage_adapters, or a field
    of MemoryReport; of a matrix, weights or trainable_parameters."""
    spec: Mapping[str, Any]
    why: str
    """The convention behind it, or the reason it differs."""
    convention: str = "exact"
    trainable: int | None = None
    tasks: int = 1
    matrix: Sequence[int] | None = None
    """(outputs, inputs) of the one matrix that it is about; None where it is about a model."""
    least: float | None = None
    """Lower end of a range, 0 where the lecture gives only the upper; None where it gives one number."""
    differs: bool = False
    """The exact number does not round to the claimed one, or is outside the claimed range."""

    @property
    def run(self) -> RunSpec:
        return RunSpec.from_dict(self.spec)

    def computed(self) -> float:
        """Our number for it."""
        from ..count import count
        from ..memory import predict, storage

        if self.matrix:
            return self._of_matrix()
        if self.quantity in COUNTED:
            return getattr(count(resolve(self.run)), self.quantity)
        if self.quantity == "trainable_percent" and self.trainable is None:
            return count(resolve(self.run)).trainable_percent
        report = predict(resolve(self.run), self.convention, self.trainable)
        if self.quantity == "trainable_percent":
            return 100 * report.trainable_parameters / report.total_parameters
        if self.quantity == "storage_full":
            return storage(report, self.tasks).full
        if self.quantity == "storage_adapters":
            return storage(report, self.tasks).adapters
        return getattr(report, self.quantity)

    def _of_matrix(self) -> int:
        from .. import methods
        from ..base.architecture import Module

        matrix = Module("the matrix", "linear", {"weight": tuple(self.matrix or ())})
        return matrix.weight if self.quantity == "weights" else methods.find("lora").trained(matrix, resolve(self.run))


CLAIMS: tuple[Claim, ...] = tuple(
    Claim(**entry) for entry in json.loads((Path(__file__).parent / "claims.json").read_text())
)
