"""Proofs by doing, in words: merged against apart, the dial on the update, and the time that each way to serve takes."""

from __future__ import annotations

import json
from html import escape

from .. import units
from ..compare import proofs
from ..compare.proofs import LatencyReport, MergeReport
from .marks import how, libraries, table

NAMES = {
    proofs.BASE: "base",
    proofs.APART: "adapter beside its weights",
    proofs.MERGED: "adapter merged into them",
    proofs.SERIAL: "serial adapter (Houlsby)",
}
"""What each way to serve an adapter is called on the page."""


def merged_said(report: MergeReport) -> str:
    """How far merging moves the logits, in words, in a table, and token by token where it changes the likeliest."""
    whole, half = report.agreements
    said = (
        f"<p>The adapter moves a logit by up to <b>{units.significant(report.adapter_moves)}</b>. In fp32, merging moves one "
        f"by at most <b>{_two(whole.largest_difference)}</b> and changes {len(whole.flips)} of {whole.positions} likeliest "
        f"tokens. In bf16 it moves one by up to <b>{_two(half.largest_difference)}</b> and changes {len(half.flips)}, where "
        f"bf16 alone, unmerged, is off by {_two(half.apart_off)}.</p>"
    )
    differs = "largest logit difference, apart to merged"
    heads = ("", differs, "likeliest token differs", "apart, off fp32", "merged, off fp32")
    rows = []
    for a in report.agreements:
        most, apart, merged = map(_two, (a.largest_difference, a.apart_off, a.merged_off))
        rows.append((a.precision, most, f"{len(a.flips)} of {a.positions}", apart, merged))
    flips = "; ".join(
        f"token {f.position}: <code>{_quoted(f.apart)}</code> becomes <code>{_quoted(f.merged)}</code>, which trailed by "
        f"{_two(f.margin)}"
        for a in report.agreements
        for f in a.flips
    )
    return said + table(heads, rows) + (f'<p class="note">{flips}</p>' if flips else "")


def _two(value: float) -> str:
    return units.significant(value, 2)


def _quoted(token: str) -> str:
    """A token in quotes, so that one sees its blanks."""
    return escape(json.dumps(token, ensure_ascii=False), quote=False)


def dialled(stops: list[tuple[float, str]]) -> str:
    """The answer at each strength λ of the update."""
    known = {0.0: "the base", 1.0: "the adapter"}
    rows = (
        f"<tr><td>λ = {stop:g}<br><small>{known.get(stop, '')}</small></td>"
        f'<td class="said">{escape(text.strip())}</td></tr>'
        for stop, text in stops
    )
    return table(("W₀ + λΔW", "answer"), rows, "answers dial")


def timed(report: LatencyReport) -> str:
    """The time of a token in each way to serve an adapter, over the base's time."""
    base = report.speeds[0].seconds
    mark = how(
        "measured",
        f"{report.device}, {report.precision}, batch 1; medians of {report.rounds} rounds of {report.tokens} tokens, taken in "
        f"turn; in brackets the quartiles. {libraries(report.versions)}",
    )
    rows = []
    for s in report.speeds:
        ratio = f"<b>{s.ratio:.2f}×</b> <small>({s.lower / base:.2f} to {s.upper / base:.2f})</small>"
        added = (f"{s.added_modules:,}", f"{s.added_parameters:,}")
        rows.append((NAMES[s.what], ratio, f"{1000 * s.seconds:.1f} ms", *added))
    return table((mark, "time a token over the base's", "a token", "modules added", "parameters added"), rows)
