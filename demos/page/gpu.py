"""Where training runs: on the shared GPU of a ZeroGPU Space through its decorator, anywhere else directly."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import ParamSpec, TypeVar

from peftlab.run.events import Work

SECONDS = 120  # longest that one run may hold a shared GPU
P = ParamSpec("P")
T = TypeVar("T")


def on_gpu(work: Callable[P, T]) -> Callable[P, T]:
    """`work`, which a ZeroGPU Space runs where the GPU is. Call this at import, when a Space looks for it."""
    if not os.environ.get("SPACES_ZERO_GPU"):
        return work
    import spaces

    return spaces.GPU(work, duration=SECONDS)


def with_result(work: Generator[float, None, T]) -> Iterator[tuple[float, T | None]]:
    """The shares done of a work, each with None; at last 1, with what the work returns."""
    for share in (told := Work(work)):
        yield share, None
    yield 1.0, told.result
