"""Measurements a user can repeat. Each writes JSON with its command, hardware, library versions and date."""

from .calculators import record_calculators
from .generation import record_generation
from .memory import record_memory
from .page import record_page
from .record import record_train
from .training import record_gears, record_speed

__all__ = [
    "record_calculators",
    "record_gears",
    "record_generation",
    "record_memory",
    "record_page",
    "record_speed",
    "record_train",
]
