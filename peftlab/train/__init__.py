"""The training engine: a generator of events."""

from .engine import STOP, train, warm_up

__all__ = ["STOP", "train", "warm_up"]
