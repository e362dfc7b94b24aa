"""What the lectures state beside what is found here: one table, wherever verdicts are shown."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from itertools import groupby
from typing import NamedTuple

from ..lectures.lessons import finding
from ..lectures.statements import FAILS, HOLDS, OPEN, STATEMENTS, Finding, Statement, Verdict
from .marks import explained, heading, how, row, table

CLASSES: dict[Verdict, str] = {HOLDS: "good", FAILS: "bad", OPEN: "undecided"}
"""The style of each verdict; its words carry the meaning without it."""


def verdict_mark(verdict: Verdict) -> str:
    """A verdict as HTML, in its colour."""
    return f'<span class="{CLASSES[verdict]}">{verdict}</span>'


def statements_table(found: Iterable[tuple[Statement, Finding]]) -> str:
    """Statements with their findings as HTML, those of one table of a lecture under its heading; empty for none.

    A statement that stands for itself, as in a race, has its source in the place of the table's row and column.
    """
    rows: list[Sequence[str] | str] = []
    for source, pairs in groupby(found, key=lambda pair: pair[0].source if pair[0].subject else ""):
        rows += [heading(source)] if source else []
        rows.append(row(("", "the lecture", "here", ""), "th"))
        rows += [_cells(statement, found_of_it) for statement, found_of_it in pairs]
    return explained(table((), rows, "prose checks")) if rows else ""


def _cells(statement: Statement, found: Finding) -> tuple[str, ...]:
    why = statement.why or (STATEMENTS[statement.same_as].why if statement.same_as else "")
    remark = f"<br><small>{escape(why)}</small>" if why else ""
    tip = "Our reading: a sentence of the registry, held against the lecture's by a person."
    reading = f" {how('read', tip)}" if found.read else ""
    interval = f"<br><small>{found.points}, 95% interval</small>" if found.interval else ""
    first = escape(statement.subject) or f"<small>{escape(statement.source)}</small>"
    return first, escape(statement.says), escape(found.words) + remark, verdict_mark(found.verdict) + reading + interval


class Checked(NamedTuple):
    """The statements that a tab shows."""

    counted: str
    """How many hold and how many do not, in words."""
    html: str


@lru_cache(maxsize=16)
def tab_table(tab: str, traced: tuple[bool, ...] = ()) -> Checked:
    """The statements of a tab. `traced` says which memory predictions are traced by now: their words change with it."""
    found = [(statement, finding(statement.id)) for statement in STATEMENTS.values() if tab in statement.tabs]
    verdicts = Counter(each.verdict for _, each in found)
    counted = f"{verdicts[HOLDS]} statements hold, {verdicts[FAILS]} do not"
    undecided = f", {verdicts[OPEN]} not decided" if verdicts[OPEN] else ""
    return Checked(counted + undecided, statements_table(found))
