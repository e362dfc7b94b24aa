"""Small polynomials in batch, length and rank, as data: Python and the page evaluate the same coefficients."""

from __future__ import annotations

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
        return sum(x * batch**i * length**j * rank**k for (i, j, k), x in self.terms.items())

    def to_data(self) -> list[list[float]]:
        """[coefficient, batch's exponent, length's, rank's] of each term."""
        return [[x, *powers] for powers, x in self.terms.items() if x]


def constant(value: Polynomial | float) -> Polynomial:
    """A number as a polynomial; a polynomial as it is."""
    return value if isinstance(value, Polynomial) else Polynomial({(0, 0, 0): value} if value else {})


def total(parts: Iterable[Polynomial | float]) -> Polynomial:
    """The sum of `parts`, which may be none."""
    whole = Polynomial()
    for part in parts:
        whole = whole + part
    return whole


BATCH, LENGTH, RANK = (Polynomial({powers: 1}) for powers in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
