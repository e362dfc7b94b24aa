"""What a tab's own choices may be: those of its settings that are no part of a run."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from peftlab import SpecError
from peftlab.spec import closest

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """`usual` is the value at first; `read` makes a value of what a link or a control says, or raises SpecError."""

    usual: T
    read: Callable[[str], T]


@dataclass(frozen=True)
class Number(Choice[float | None]):
    low: float
    high: float


def number(name: str, usual: float | None, low: float, high: float, whole: bool = True) -> Number:
    """A number from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            try_ = high if value > high else low if value < low or usual is None else usual
            raise SpecError(f"{name}={text[:40]}: {kind} from {said(low)} to {said(high)}; try {said(try_)}")
        return int(value) if whole else value

    return Number(usual, read, low, high)


def one_of(name: str, usual: str | None, known: Collection[str]) -> Choice[str | None]:
    """A key of a registry."""

    def read(text: str) -> str:
        if text not in known:
            raise SpecError(f"{name}={text[:40]}: no such {name}; {closest(text, known)}")
        return text

    return Choice(usual, read)


def several(name: str, usual: tuple[str, ...], known: Collection[str]) -> Choice[tuple[str, ...]]:
    """Any of a registry's keys, by semicolon, in the registry's order; `none` for none of them."""

    def read(text: str) -> tuple[str, ...]:
        keys = {one_of(name, None, known).read(key) for key in text.split(";")} if text != "none" else ()
        return tuple(key for key in known if key in keys)

    return Choice(usual, read)


def words(name: str, usual: str | None = None, most: int = 2000) -> Choice[str | None]:
    """Free text of at most `most` letters."""

    def read(text: str) -> str:
        if len(text) > most:
            raise SpecError(f"{name}: {len(text):,} letters are more than the {most:,} that it takes; shorten it")
        return text

    return Choice(usual, read)


def said(value: object) -> str:
    """A value as a link says it."""
    if isinstance(value, tuple):
        return ";".join(value) or "none"
    return str(value).removesuffix(".0")
