"""A derivation's lines: bytes as sums of products of named sizes, which are polynomials in batch, length and rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Exponents = tuple[int, int, int]
"""Exponents of batch (examples), length (tokens) and rank."""


@dataclass(frozen=True)
class Polynomial:
    terms: Mapping[Exponents, float] = field(default_factory=dict)
    """Coefficients of the products."""

    def __add__(self, other: Polynomial | float) -> Polynomial:
        sums = dict(self.terms)
        for powers, x in constant(other).terms.items():
            sums[powers] = sums.get(powers, 0) + x
        return Polynomial(sums)

    def __mul__(self, other: Polynomial | float) -> Polynomial:
        found: dict[Exponents, float] = {}
        for (a, b, c), x in self.terms.items():
            for (d, e, f), y in constant(other).terms.items():
                key = (a + d, b + e, c + f)
                found[key] = found.get(key, 0) + x * y
        return Polynomial(found)

    __radd__, __rmul__ = __add__, __mul__

    def value(self, batch: float, length: float, rank: float) -> float:
        return sum(x * batch**i * length**j * rank**k for (i, j, k), x in self.terms.items()) if self.terms else 0

    def to_data(self) -> list[list[float]]:
        """[coefficient, batch's exponent, length's, rank's] of each term."""
        return [[x, *powers] for powers, x in self.terms.items() if x]


def constant(value: Polynomial | float) -> Polynomial:
    """A number as a polynomial; a polynomial as it is."""
    return value if isinstance(value, Polynomial) else Polynomial({(0, 0, 0): value} if value else {})


def total(parts: Iterable[Polynomial | float]) -> Polynomial:
    """The sum of `parts`, which may be none."""
    return sum(map(constant, parts), Polynomial())


BATCH, LENGTH, RANK = (Polynomial({powers: 1}) for powers in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))


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
    """What a symbol of a formula stands for that is no plain number."""

    value: Polynomial
    shown: str
    """How it reads among numbers."""


Sizes = Mapping[str, Size | float]
Sum = Mapping[str, float]
"""A sum of products. Keys are symbols with spaces between them, values their coefficients: {"h": 8, "S n_q": 4, "": 16}."""


def product(sizes: Sizes, symbols: str) -> Polynomial:
    """The product of the sizes of `symbols`, which have spaces between them."""
    found = (sizes[symbol] for symbol in symbols.split())
    return math.prod((s.value if isinstance(s, Size) else constant(s) for s in found), start=constant(1))


def formula(times: str, parts: Sum, sizes: Sizes | None = None) -> str:
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
    if sizes is None:
        return key.split()
    found = (sizes[symbol] for symbol in key.split())
    return [s.shown if isinstance(s, Size) else _number(s) for s in found]


def _number(value: float) -> str:
    return f"{round(value):,}" if value == round(value) else f"{value:,.4g}"
