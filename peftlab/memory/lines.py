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
    """When it is there."""
    note: str = ""
    """Why, in a few words."""


@dataclass(frozen=True)
class Size:
    """What a symbol stands for."""

    value: Polynomial | float
    shown: str = ""
    """How it reads among numbers; its value where empty."""


Sizes = Mapping[str, Size]
Sum = Mapping[str, float]
"""From a product of symbols, by spaces, to its coefficient: {"h": 8, "S n_q": 4, "": 16}."""


def line(
    sizes: Sizes, name: str, kind: str, times: str, parts: Sum, moments: tuple[str, ...], note: str = ""
) -> list[Line]:
    """The line of `times` × the sum of `parts`; none where nothing is left of it."""
    parts = {key: c for key, c in parts.items() if c and any(_product(sizes, key).terms.values())}
    size = _product(sizes, times) * total(c * _product(sizes, key) for key, c in parts.items())
    if not any(size.terms.values()):
        return []
    return [Line(name, kind, _written(None, times, parts), _written(sizes, times, parts), size, moments, note)]


def _product(sizes: Sizes, symbols: str) -> Polynomial:
    product = constant(1)
    for symbol in symbols.split():
        product = product * sizes[symbol].value
    return product


def _written(sizes: Sizes | None, times: str, parts: Sum) -> str:
    front = [_shown(sizes, s) for s in times.split()]
    inside = [_term(sizes, c, key) for key, c in parts.items()]
    if len(inside) == 1:
        return " × ".join([_term(sizes, next(iter(parts.values())), ""), *front, *_factors(sizes, next(iter(parts)))])
    together = " + ".join(inside)
    return " × ".join([*front, f"({together})"]) if front else together


def _term(sizes: Sizes | None, coefficient: float, key: str) -> str:
    found = _factors(sizes, key)
    number = _number(coefficient)
    if sizes is None and found and found[0][0].isalpha():
        return " × ".join([(number if coefficient != 1 else "") + found[0], *found[1:]])
    return " × ".join([number, *found])


def _factors(sizes: Sizes | None, key: str) -> list[str]:
    return [_shown(sizes, s) for s in key.split()]


def _shown(sizes: Sizes | None, symbol: str) -> str:
    if sizes is None:
        return symbol
    size = sizes[symbol]
    return size.shown or (str(size.value) if isinstance(size.value, Polynomial) else _number(size.value))


def _number(value: float) -> str:
    return f"{round(value):,}" if value == round(value) else f"{value:,.4g}"
