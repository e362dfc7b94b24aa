"""A derivation's lines: bytes as sums of products of named sizes, the same for a reader and for the calculator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .polynomial import Polynomial, constant, total


@dataclass(frozen=True)
class Line:
    """One component of a step's memory."""

    name: str
    kind: str
    """One of `report.KINDS`."""
    symbols: str
    """The bytes as a formula: `L × B × S × (8h + 4q)`."""
    numbers: str
    """The same with this run's sizes; B, S and r stay, as the size is a polynomial in them."""
    size: Polynomial
    """Bytes."""
    moments: tuple[str, ...]
    """High points of the step at which it is there."""
    note: str = ""
    """Why it is there, in a few words."""


@dataclass(frozen=True)
class Size:
    """What a symbol of a formula stands for."""

    value: Polynomial | float
    shown: str = ""
    """How it reads among numbers. Empty for a number, which is then shown itself."""


Sizes = Mapping[str, Size]
Sum = Mapping[str, float]
"""A sum of products. Keys are symbols with spaces between them, values their coefficients: {"h": 8, "S n_q": 4, "": 16}."""


def line(
    sizes: Sizes, name: str, kind: str, times: str, parts: Sum, moments: tuple[str, ...], note: str = ""
) -> list[Line]:
    """The line of `times` × the sum of `parts`, without the parts that are zero; an empty list where all are."""
    parts = {key: c for key, c in parts.items() if c and any(_product(sizes, key).terms.values())}
    size = _product(sizes, times) * total(c * _product(sizes, key) for key, c in parts.items())
    if not any(size.terms.values()):
        return []
    return [Line(name, kind, _formula(times, parts), _formula(times, parts, sizes), size, moments, note)]


def _product(sizes: Sizes, symbols: str) -> Polynomial:
    product = constant(1)
    for symbol in symbols.split():
        product = product * sizes[symbol].value
    return product


def _formula(times: str, parts: Sum, sizes: Sizes | None = None) -> str:
    """`times` × the sum of `parts`, with numbers in place of the symbols where `sizes` are given."""
    front = _factors(times, sizes)
    if len(parts) == 1:
        ((key, coefficient),) = parts.items()
        return " × ".join([_number(coefficient), *front, *_factors(key, sizes)])
    together = " + ".join(_term(coefficient, _factors(key, sizes), sizes is None) for key, coefficient in parts.items())
    return " × ".join([*front, f"({together})"]) if front else together


def _term(coefficient: float, factors: list[str], symbols: bool) -> str:
    """`8h × d` for symbols, `8 × 576 × 64` for numbers."""
    if symbols and factors and factors[0][0].isalpha():
        number = "" if coefficient == 1 else _number(coefficient)
        return " × ".join([number + factors[0], *factors[1:]])
    return " × ".join([_number(coefficient), *factors])


def _factors(key: str, sizes: Sizes | None) -> list[str]:
    return [symbol if sizes is None else _shown(sizes[symbol]) for symbol in key.split()]


def _shown(size: Size) -> str:
    return size.shown or (str(size.value) if isinstance(size.value, Polynomial) else _number(size.value))


def _number(value: float) -> str:
    return f"{round(value):,}" if value == round(value) else f"{value:,.4g}"
