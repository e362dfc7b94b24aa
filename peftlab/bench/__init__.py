"""Measurements a user can repeat. Each writes JSON with its command, hardware, library versions and date."""

from .record import MEASURED, recorded_runs, record_train

__all__ = ["MEASURED", "record_train", "recorded_runs"]
