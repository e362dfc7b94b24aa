"""Where training runs: on the shared GPU of a ZeroGPU Space through its decorator, anywhere else directly."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

SECONDS = 120
"""Longest that one run may hold a shared GPU."""


def on_gpu(work: Callable[..., Any]) -> Callable[..., Any]:
    if not os.environ.get("SPACES_ZERO_GPU"):
        return work
    import spaces

    return spaces.GPU(work, duration=SECONDS)


def with_result(work: Generator[float, None, Any]) -> Iterator[tuple[float, Any]]:
    """The shares done of a work, each with None; at last 1, with what the work returns."""
    result = None

    def to_its_end() -> Iterator[float]:
        nonlocal result
        result = yield from work

    for share in to_its_end():
        yield share, None
    yield 1.0, result
