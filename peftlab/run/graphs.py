"""CUDA graphs: many launches recorded once and replayed as one. A stream of their own, and one thread at a time on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_using = threading.Lock()
"""Of the stream, by one thread at a time: what another launched there during a recording would be recorded too."""


@cache
def stream() -> Any:
    """One for all: cuBLAS keeps a workspace for each stream that it has seen."""
    import torch

    return torch.cuda.Stream()


@contextmanager
def apart() -> Iterator[None]:
    """What is launched within goes to the graphs' stream, whatever else this process has under way."""
    import torch

    with _using, torch.cuda.stream(stream()):
        yield


def pinned(tensor: Any) -> Any:
    """A copy in memory that the GPU can read by itself. While a graph is being recorded CUDA refuses to give any."""
    with _using:
        return tensor.pin_memory()


def follow() -> None:
    """What is launched `apart` from now on comes after what this thread has launched so far."""
    import torch

    with _using:  # waiting for another stream's work, a recording would fail
        stream().wait_stream(torch.cuda.current_stream())


@contextmanager
def recording(graph: Any, pool: Any = None) -> Iterator[None]:
    """Records what is launched within into a `torch.cuda.CUDAGraph`; use it `apart`. Raises RuntimeError.

    `torch.cuda.graph` does the same, and first gives the process's cached memory back to the driver, which then has to be
    asked for it again. Here that is done only where it is needed: a graph cannot use what is cached for others, and needs no
    more than the same work has left there.
    """
    import torch

    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    if free < torch.cuda.memory_reserved() - torch.cuda.memory_allocated():
        torch.cuda.empty_cache()
    graph.capture_begin(*((pool,) if pool else ()), capture_error_mode="thread_local")  # others may go on meanwhile
    try:
        yield
    finally:
        graph.capture_end()
