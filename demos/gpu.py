"""Where training runs: on the shared GPU of a ZeroGPU Space through its decorator, anywhere else directly."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

SECONDS = 120
"""Longest that one run may hold a shared GPU."""


def on_gpu(work: Callable[..., Any]) -> Callable[..., Any]:
    if not os.environ.get("SPACES_ZERO_GPU"):
        return work
    import spaces

    return spaces.GPU(work, duration=SECONDS)
