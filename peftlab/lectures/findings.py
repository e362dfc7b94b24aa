"""What is found here of a lecture's statement, by counting or by a race."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..race import Line, recordings
from ..race.recordings import Board
from . import by_counting, by_racing
from .statements import STATEMENTS, Finding, Statement


def finding(id: str) -> Finding:
    """The finding of a statement; a race's is that of the fullest recording.

    Raises KeyError for an unknown id and LookupError where no recorded race has the racers that it needs.
    """
    statement = STATEMENTS[id]
    if statement.same_as:
        return finding(statement.same_as)
    if statement.lesson:
        return raced(statement, recordings.of(statement.lesson)[0].lines)
    test: Callable[..., Finding] = getattr(by_counting, statement.test)
    return test(**statement.given)


def raced(statement: Statement, lines: Sequence[Line]) -> Finding:
    """The finding of a statement in one race. Raises LookupError or ValueError where a racer has not finished."""
    test: Callable[..., Finding] = getattr(by_racing, statement.test)
    return test(Board(lines), **statement.given)
