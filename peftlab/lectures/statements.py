"""What the lectures state, from `statements.json`, and what a test, of `by_counting` or `by_racing`, finds of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from . import data

Verdict = Literal["holds", "does not hold", "not decided by these runs"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "not decided by these runs"


@dataclass(frozen=True)
class Finding:
    """What a test finds of a statement."""

    verdict: Verdict
    words: str
    """The figures behind the verdict."""
    interval: tuple[float, float] | None = None
    """The 95% interval of the difference between the scores that the statement compares; 0.05 is 5 points of 100.
    None for a statement that compares no scores."""
    read: bool = False
    """A person compared the words with the lecture's; no computer can."""

    @property
    def points(self) -> str:
        """The interval as people read it, `−8 to +4 points`; empty where there is none."""
        ends = [f"{round(100 * end):+d}".replace("-", "−") for end in self.interval or ()]
        return f"{' to '.join(ends)} points" if ends else ""


def decided(so: bool, words: str) -> Finding:
    """The finding of a test that always decides."""
    return Finding(HOLDS if so else FAILS, words)


@dataclass(frozen=True)
class Statement:
    id: str
    source: str
    """The text and, where it has any, the slide or table."""
    says: str
    subject: str = ""
    """What it is about: in a table, the row and column. Empty for a statement that a race tests, which is a sentence."""
    test: str = ""
    """A function of `by_racing` where a lesson's race tests it, else of `by_counting`."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the test."""
    why: str = ""
    """Our remark: the convention behind it, the limit of the test, or the reason why it does not hold."""
    same_as: str = ""
    """The id of the statement whose test this one shares; it has none of its own then."""
    lesson: str = ""
    """The lesson whose race tests it; empty where no race is needed."""
    tabs: tuple[str, ...] = ()
    """The tabs that show it, beside that of its lesson."""


STATEMENTS: dict[str, Statement] = {
    entry["id"]: Statement(**(group | entry)) for group in data("statements.json") for entry in group.pop("statements")
}
"""Every statement by its id, in the order in which they are shown: those of one source together."""
