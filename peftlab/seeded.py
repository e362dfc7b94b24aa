"""Random numbers from a seed, for one piece of work at a time: torch has one generator for all threads of a process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_drawing = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed`, then on as before. Whoever draws in a thread of its own does it within."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with _drawing, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
