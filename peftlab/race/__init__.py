"""Fine-tunings of one task held side by side, and the board that says what came of each."""

from .recordings import BY_KEY, COLUMNS, Column, Line, bootstrap, column, document, ranked, read, record, to_csv
from .runner import Racer, along, race

__all__ = [
    "BY_KEY", "COLUMNS", "Column", "Line", "Racer", "along", "bootstrap", "column", "document", "race", "ranked", "read",
    "record", "to_csv",
]  # fmt: skip
