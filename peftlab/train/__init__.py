"""The training engine: a generator of events."""

from .engine import STOP, train

__all__ = ["STOP", "train"]
