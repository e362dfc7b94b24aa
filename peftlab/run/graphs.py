"""CUDA graphs: many launches recorded once and replayed as one, on a stream of their own, one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE, CUDAGraph, Stream

_using = threading.Lock()
"""Held by whoever launches on the stream: what another thread launched there during a recording would be recorded too."""


@cache
def stream() -> Stream:
    """The one stream of all graphs: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream()


@contextmanager
def apart() -> Iterator[None]:
    """Launches what is within on the graphs' stream, whatever else this process has under way."""
    with _using, torch.cuda.stream(stream()):
        yield


def pinned(tensor: Tensor) -> Tensor:
    """A copy in memory that the GPU can read by itself. CUDA gives none while a graph is being recorded, so this waits."""
    with _using:
        return tensor.pin_memory()


def follow() -> None:
    """Lets what is launched `apart` from now on come after what this thread has launched so far."""
    with _using:  # waiting for another stream's work, a recording would fail
        stream().wait_stream(torch.cuda.current_stream())


@contextmanager
def recording(graph: CUDAGraph, pool: _POOL_HANDLE | None = None) -> Iterator[None]:
    """Records what is launched within into `graph`; use it `apart`. Raises RuntimeError.

    `torch.cuda.graph` first gives all cached memory back to the driver, which takes time to get it again; here that is done
    only where less is free than is cached, since a graph needs no more than the same work has left there.
    """
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    if free < torch.cuda.memory_reserved() - torch.cuda.memory_allocated():
        torch.cuda.empty_cache()
    graph.capture_begin(pool, capture_error_mode="thread_local")  # other threads may go on meanwhile
    try:
        yield
    finally:
        graph.capture_end()
