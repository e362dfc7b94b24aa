"""Random numbers from a seed, for one piece of work at a time: torch has one generator for all threads of a process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_drawing = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from `seed` within, and goes on as before afterwards. Every thread that draws in this process must use it."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with _drawing, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
