"""What the lectures say of numbers, beside what is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from .. import units
from ..lectures.claims import CLAIMS
from .marks import heading, table, verdict


def claims_table(tab: str) -> str:
    """What the lectures say beside what is computed here, table by table, as HTML."""
    rows: list[Sequence[str] | str] = []
    for source, claims in groupby((c for c in CLAIMS if c.tab == tab), key=lambda c: c.source):
        rows.append(heading(source))
        for c in claims:
            show = {"bytes": units.size, "percent": lambda n: units.percent(n / 100)}.get(c.unit, lambda n: f"{n:,.0f}")
            begin = "" if c.least is None else f"{show(c.least)} to " if c.least else "under "
            found = f"{verdict(not c.differs)}<br><small>{escape(c.why)}</small>"
            rows.append((escape(c.says), begin + show(c.claimed), show(c.computed()), found))
    return table(("", "claimed", "exact", ""), rows, "claims")
