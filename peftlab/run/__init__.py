"""The training engine: a generator of events."""

from .engine import STOP, pace, train, warm_up

__all__ = ["STOP", "pace", "train", "warm_up"]
