"""Training, a generator of events; generation, token by token; and the scores of what a model says."""

from .checkpoint import must_go_on
from .engine import pace, train, warm_up
from .events import Event
from .loop import LEAVE, STOP

__all__ = ["LEAVE", "STOP", "Event", "must_go_on", "pace", "train", "warm_up"]
