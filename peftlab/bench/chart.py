"""A speed recording to look at: a table in Markdown, and a chart as SVG, which needs nothing to be drawn or shown."""

from __future__ import annotations

import statistics
from html import escape
from typing import Any

from .. import methods
from ..base import models

WIDTH, LEFT, RIGHT, TOP, LINE, BAR = 760, 190, 130, 52, 30, 18
"""Pixels: of the chart, of the names, of the numbers, of the title, from bar to bar, and of a bar."""
STYLE = """\
text { font: 14px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600 } .quiet { fill: #57606a }
.ours { fill: #D55E00 } .other { fill: #0072B2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .quiet { fill: #9ca3af } .ours { fill: #FF8F4A } .other { fill: #56B4E9 } }"""


def table(document: dict[str, Any], yardstick: str) -> str:
    """A row for each trainer that ran: medians over its seeds, the step beside `yardstick`'s; scores as mean and range.

    Of a GPU's recording: the arithmetic is what the step's products take at its peak.
    """
    beside = _median(_row(document, yardstick), "step_seconds")
    lines = [
        "| trainer | usual step | faster | of it arithmetic | first step | tokens/s | peak memory | held-out score |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _ran(document):
        step, first = _median(row, "step_seconds"), _median(row, "first_step_seconds")
        peak, share = max(run["peak_bytes"] for run in row["runs"]) / 1e6, document["floor_seconds"] / step
        lines.append(
            f"| {row['name']} | {1e3 * step:.1f} ms | {beside / step:.1f}× | {share:.1%} | {first:.2f} s "
            f"| {_median(row, 'tokens_per_second'):,.0f} | {peak:,.0f} MB | {_scores(row)} |"
        )
    return "\n".join(lines)


def chart(document: dict[str, Any], yardstick: str) -> str:
    """The usual step of each trainer that ran, as bars from zero."""
    rows = _ran(document)
    beside = _median(_row(document, yardstick), "step_seconds")
    longest = max(_median(row, "step_seconds") for row in rows)
    spec, height = document["spec"], TOP + LINE * len(rows) + 8
    model, method = models.find(spec["model"]).name, methods.find(spec["method"]).name
    title = f"One training step: {model}, {method} rank {spec['rank']}, batches of {spec['batch_size']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text x="0" y="18" class="title">{escape(title)}</text>',
        f'<text x="0" y="38" class="quiet">milliseconds, median, on one {escape(document["hardware"])}</text>',
    ]
    for i, row in enumerate(rows):
        step, y = _median(row, "step_seconds"), TOP + LINE * i
        long, kind = (WIDTH - LEFT - RIGHT) * step / longest, "ours" if row["name"].startswith("peftlab") else "other"
        faster = f", {beside / step:.1f}× faster" if step < beside else ""
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(row["name"])}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{max(long, 1):.1f}" height="{BAR}" class="{kind}"/>',
            f'<text x="{LEFT + long + 6:.1f}" y="{y + 14}">{1e3 * step:.1f}<tspan class="quiet">{faster}</tspan></text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def _ran(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in document["rows"] if row["runs"]]


def _row(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in document["rows"] if row["name"] == name)


def _median(row: dict[str, Any], key: str) -> float:
    return statistics.median(run[key] for run in row["runs"])


def _scores(row: dict[str, Any]) -> str:
    scores = [100 * run["score"] for run in row["runs"] if "score" in run]
    if len(scores) < 2:
        return f"{scores[0]:.0f}%" if scores else ""
    return f"{statistics.mean(scores):.0f}% ({min(scores):.0f} to {max(scores):.0f}, {len(scores)} seeds)"
