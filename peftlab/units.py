"""Numbers with their units as people read them: bytes, operations, seconds, shares."""

from __future__ import annotations

from functools import lru_cache
from math import floor, log10

BYTES = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
OPERATIONS = {"PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}


def significant(value: float, digits: int = 3) -> str:
    """`value` to that many significant digits, without an exponent: 3240 → 3,240; 0.2749 → 0.275."""
    if value == 0:
        return "0"
    places = digits - 1 - floor(log10(abs(value)))
    text = f"{round(value, places):,.{max(0, places)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _scaled(n: float, scales: dict[str, float]) -> str:
    """`n` in the largest unit that it reaches, or else in the smallest."""
    unit = next((unit for unit, scale in scales.items() if abs(n) >= scale), [*scales][-1])
    return f"{significant(n / scales[unit])} {unit}"


@lru_cache(maxsize=4096)  # a chart says the same bytes many times
def size(n: float | None) -> str:
    """Bytes in decimal units, as vendors and lectures use them; 'not known' for None."""
    if n is None:
        return "not known"
    return f"{n:.0f} B" if abs(n) < BYTES["kB"] else _scaled(n, BYTES)


def operations(n: float) -> str:
    """Floating-point operations: 16.1 GFLOP."""
    return _scaled(n, OPERATIONS)


def percent(share: float) -> str:
    """A share between 0 and 1 in percent, to three significant digits."""
    return f"{significant(100 * share)}%"


def score(value: float) -> str:
    """A score between 0 and 1 in whole percent."""
    return f"{100 * value:.0f}%"


def seconds(s: float) -> str:
    if s < 120:
        return f"{s:.1f} s" if s < 10 else f"{s:.0f} s"
    return f"{s // 60:.0f} min {s % 60:.0f} s" if s < 7200 else f"{s // 3600:.0f} h {s % 3600 // 60:.0f} min"
