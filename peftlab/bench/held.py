"""How much memory a server held over time, in few numbers: whether it grows, once what it keeps is kept."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..spec import Json

Samples = Sequence[tuple[float, int]]
"""Seconds since some moment, and bytes."""
WARM_UP = 1 / 3
"""The share of the time in which a server fills what it keeps: compiled code, caches up to their limits, its heap."""
POINTS = 40
"""So many points of the course are recorded."""


def summary(held: Samples) -> Json:
    """Bytes: the first, last and most; those `after_warm_up`, with the growth a minute; and the course, a median a point."""
    if not held:
        return {"first": None, "last": None, "most": None, "after_warm_up": None, "course": []}
    sizes = [size for _, size in held]
    begin, end = held[0][0], held[-1][0]
    settled = [(t, size) for t, size in held if t >= begin + WARM_UP * (end - begin)]
    n = max(1, len(settled) // 10)
    about = {
        "seconds": settled[-1][0] - settled[0][0],
        "first": round(statistics.median(size for _, size in settled[:n])),
        "last": round(statistics.median(size for _, size in settled[-n:])),
        "a_minute": slope(settled),
    }
    return {"first": sizes[0], "last": sizes[-1], "most": max(sizes), "after_warm_up": about, "course": course(held)}


def slope(held: Samples) -> float | None:
    """By how many bytes a minute the memory grew, by least squares; None of too little."""
    if len(held) < 3:
        return None
    return 60 * statistics.linear_regression(*zip(*held, strict=True)).slope


def course(held: Samples, points: int = POINTS) -> list[list[float]]:
    """At most `points` of the samples: the middle ones of parts of equal length, each with the median of its part's bytes."""
    n = min(points, len(held))
    parts = [held[i * len(held) // n : (i + 1) * len(held) // n] for i in range(n)]
    return [[round(p[len(p) // 2][0], 1), round(statistics.median(size for _, size in p))] for p in parts]
