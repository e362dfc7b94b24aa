"""What is found here of a statement, by counting or by a race; and lessons, each a question that a recorded race answers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..race import Line, recordings
from ..race.recordings import Board, Recording
from . import by_counting, by_racing, data
from .by_racing import Settings
from .statements import STATEMENTS, Finding, Statement

NEAR = 0.05
"""Scores no farther apart than this give the answer that there is no difference: two of forty held-out rows."""


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


@dataclass(frozen=True)
class Lesson:
    key: str
    name: str
    setting: str
    """What its racers differ in."""
    values: tuple[str, ...]
    """The racers of a small race to run live."""
    question: str
    options: tuple[str, ...]
    answer: str
    given: Mapping[str, Any] = field(default_factory=dict)
    """The function of ANSWERS that finds which of the options came out, and its arguments."""

    @property
    def statements(self) -> list[Statement]:
        """The lectures' statements that its race tests."""
        return [statement for statement in STATEMENTS.values() if statement.lesson == self.key]

    def recordings(self) -> list[Recording]:
        """The recorded races, the fullest first."""
        return recordings.of(self.key)

    def answered(self, lines: Sequence[Line]) -> str:
        """The option that came out. Raises LookupError where a racer that decides it has not finished."""
        return self.options[ANSWERS[self.answer](Board(lines), **self.given)]

    def findings(self, lines: Sequence[Line]) -> list[tuple[Statement, Finding]]:
        """Each statement that the lines say something to, and what they say."""
        found = []
        for statement in self.statements:
            with suppress(LookupError, ValueError):  # a racer that the test needs has not finished
                found.append((statement, raced(statement, lines)))
        return found


def _change(board: Board, one: Settings, other: Settings, higher: int = 0, lower: int = 1, alike: int = 2) -> int:
    """The option for `one` scoring above `other`, below it, or within NEAR of it."""
    change = board.score(**one) - board.score(**other)
    return higher if change > NEAR else lower if change < -NEAR else alike


def _best_group(board: Board) -> int:
    groups = (("full",), ("lora",), ("houlsby", "pfeiffer", "parallel"), ("prompt", "prefix", "p-tuning"))
    scores = [max(board.score(method=key) for key in group) for group in groups]
    return scores.index(max(scores))


def _rate_ratio(board: Board) -> int:
    ratio = board.best("learning_rate", "lora") / board.best("learning_rate", "full")
    return 0 if ratio < 5 else 1 if ratio <= 10 else 2


ANSWERS: dict[str, Callable[..., int]] = {"change": _change, "best_group": _best_group, "rate_ratio": _rate_ratio}
LESSONS: dict[str, Lesson] = {entry["key"]: Lesson(**entry) for entry in data("lessons.json")}
"""Every lesson by its key, in the order in which they are shown."""
