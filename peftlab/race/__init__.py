"""Fine-tunings of one task held side by side, and the board that says what came of each."""

from typing import TYPE_CHECKING

from ..lazily import exported
from .racers import Racer, along
from .recordings import BY_KEY, COLUMNS, Column, Line, bootstrap, column, document, ranked, read, record, to_csv

if TYPE_CHECKING:
    from .runner import race

__all__ = [
    "BY_KEY", "COLUMNS", "Column", "Line", "Racer", "along", "bootstrap", "column", "document", "race", "ranked", "read",
    "record", "to_csv",
]  # fmt: skip
__getattr__ = exported(__name__, {"race": "runner"})
