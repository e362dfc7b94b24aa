"""What is found here of a lecture's statement, by counting or by a race."""

from __future__ import annotations

from collections.abc import Sequence

from ..race import Line, recordings
from ..race.recordings import Board
from . import by_counting, by_racing
from .statements import STATEMENTS, Finding, Statement

TESTS = {**by_counting.TESTS, **by_racing.TESTS}
"""Every test of a statement by its name; those of `by_racing` take a board first."""


def finding(id: str) -> Finding:
    """The finding of a statement; a race's is that of the fullest recording.

    Raises KeyError for an unknown id and LookupError where no recorded race has the racers that it needs.
    """
    statement = STATEMENTS[id]
    if statement.same_as:
        return finding(statement.same_as)
    if statement.lesson:
        return raced(statement, recordings.of(statement.lesson)[0].lines)
    return TESTS[statement.test](**statement.given)


def raced(statement: Statement, lines: Sequence[Line]) -> Finding:
    """The finding of a statement in one race. Raises LookupError or ValueError where a racer has not finished."""
    return TESTS[statement.test](Board(lines), **statement.given)
