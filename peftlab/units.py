"""Numbers with their units as people read them: bytes, operations, seconds, shares."""

from __future__ import annotations


def significant(value: float, digits: int = 3) -> str:
    """Three significant digits without an exponent: 3240 → 3,240; 0.2749 → 0.275."""
    if value == 0:
        return "0"
    from math import floor, log10

    places = max(0, digits - 1 - floor(log10(abs(value))))
    text = f"{round(value, digits - 1 - floor(log10(abs(value)))):,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size(n: float | None) -> str:
    """Bytes in decimal units, as vendors and lectures use them; 'not known' for None."""
    if n is None:
        return "not known"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= scale:
            return f"{significant(n / scale)} {unit}"
    return f"{n:.0f} B"


def operations(n: float) -> str:
    """Floating-point operations: 16.1 GFLOP."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if n >= scale:
            return f"{significant(n / scale)} {unit}"
    return f"{significant(n / 1e6)} MFLOP"


def percent(share: float) -> str:
    """Of a share between 0 and 1."""
    return f"{significant(100 * share)}%"


def score(value: float) -> str:
    return f"{100 * value:.0f}%"


def seconds(s: float) -> str:
    return f"{s:.1f} s" if s < 10 else f"{s:.0f} s" if s < 120 else f"{s // 60:.0f} min {s % 60:.0f} s"
