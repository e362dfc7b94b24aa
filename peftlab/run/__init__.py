"""Training, a generator of events; generation, token by token; and the scores of what a model says."""

from typing import TYPE_CHECKING

from ..lazily import exported
from .events import Event
from .files import CHECKPOINT, LEAVE, STOP

if TYPE_CHECKING:
    from .checkpoint import must_go_on
    from .engine import pace, train, warm_up

__all__ = ["CHECKPOINT", "LEAVE", "STOP", "Event", "must_go_on", "pace", "train", "warm_up"]
__getattr__ = exported(__name__, {"must_go_on": "checkpoint", "pace": "engine", "train": "engine", "warm_up": "engine"})
