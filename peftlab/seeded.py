"""Random numbers from a seed, for one piece of work at a time: torch has one generator for all threads of a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_drawing = threading.Lock()
if hasattr(os, "register_at_fork"):  # a forked process has no thread that would ever let go of it
    os.register_at_fork(after_in_child=_drawing._at_fork_reinit)  # type: ignore[attr-defined]  # as logging has it


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from `seed` within, and goes on as before afterwards. Every thread that draws in this process must use it."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # a server on a shared GPU has none
    with _drawing, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
