"""A number that a lecture gives, beside the same quantity computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from .. import methods, units
from ..base.architecture import Module
from ..count import count
from ..memory import predict, storage
from ..resolve import resolve
from ..spec import RunSpec
from .statements import STATEMENTS, Finding, decided


@dataclass(frozen=True)
class Number:
    value: float
    """What the lecture gives; the upper end of a range."""
    unit: Literal["bytes", "parameters", "percent", "times"]
    """Percent are of the model's parameters."""
    quantity: str
    """Which of our numbers it is: an attribute of ParameterReport, Storage (`storage_full`, `storage_adapters`) or
    MemoryReport; or `times_fewer`, all parameters over the trainable ones."""
    spec: Mapping[str, object]
    """The run that it is about."""
    convention: str = "exact"
    trainable: int | None = None
    """Trainable parameters, where the lecture gives them and names no method's settings."""
    tasks: int = 1
    matrix: Sequence[int] | None = None
    """(outputs, inputs) of the one matrix that it is about; None where it is about a model."""
    least: float | None = None
    """The lower end of a range, 0 where the lecture gives only the upper; None where it gives one number."""

    @property
    def run(self) -> RunSpec:
        return RunSpec.from_dict(self.spec)

    def computed(self) -> float:
        """Our number, in `unit`. Raises SpecError for a run that cannot be."""
        spec = resolve(self.run)
        if self.matrix:
            matrix = Module("the matrix", "linear", {"weight": tuple(self.matrix)})
            return matrix.weight if self.quantity == "weights" else methods.find("lora").trained(matrix, spec)
        if self.quantity == "times_fewer":
            return 100 / count(spec).trainable_percent
        if self.convention == "exact" and self.trainable is None:
            return getattr(count(spec), self.quantity)
        report = predict(spec, self.convention, self.trainable)
        if self.quantity == "trainable_percent":
            return 100 * report.trainable_parameters / report.total_parameters
        if self.quantity.startswith("storage_"):
            return getattr(storage(report, self.tasks), self.quantity.removeprefix("storage_"))
        return getattr(report, self.quantity)

    def finding(self) -> Finding:
        """It holds where ours is within the range, or rounds to the one number at as many digits as that has."""
        found = self.computed()
        digits = len(Decimal(str(self.value)).normalize().as_tuple().digits)
        rounded = float(f"{found:.{digits - 1}e}")
        so = rounded == self.value if self.least is None else self.least <= found <= self.value
        return decided(so, self._shown(found))

    def _shown(self, value: float) -> str:
        if self.unit == "bytes":
            return units.size(value)
        if self.unit == "percent":
            return units.percent(value / 100)
        return f"{value:,.0f} times" if self.unit == "times" else f"{value:,.0f}"


def numbers() -> dict[str, Number]:
    """The statements that give a number, by id."""
    return {s.id: Number(**s.given) for s in STATEMENTS.values() if s.test == "number"}


def percents() -> list[tuple[float, RunSpec]]:
    """Each percent that a lecture gives as one number, and the run that it is about."""
    found = numbers().values()
    return [(n.value, n.run) for n in found if n.quantity == "trainable_percent" and n.least is None]
