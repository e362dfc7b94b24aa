"""Fine-tunings of one task held side by side, and the board that says what came of each."""

from .board import BY_KEY, COLUMNS, Column, Line, bootstrap, column, ranked, to_csv
from .recordings import document, read, record
from .runner import Racer, along, race

__all__ = [
    "BY_KEY", "COLUMNS", "Column", "Line", "Racer", "along", "bootstrap", "column", "document", "race", "ranked", "read",
    "record", "to_csv",
]  # fmt: skip
