"""Measurements a user can repeat. Each writes JSON with its command, hardware, library versions and date."""

from .calculators import record_calculators
from .memory import record_memory
from .record import MEASURED, record_train, recorded_runs

__all__ = ["MEASURED", "record_calculators", "record_memory", "record_train", "recorded_runs"]
