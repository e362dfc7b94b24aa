"""A speed recording to look at: a table in Markdown, and a chart as SVG, which needs no library."""

import statistics
from html import escape

from .. import methods
from ..base import models
from ..spec import Json

WIDTH, LEFT, RIGHT, TOP, LINE, BAR = 760, 190, 130, 52, 30, 18
"""Pixels: the width of the chart, of the names and of the numbers, and the height of the title, a line and a bar."""
STYLE = """\
text { font: 14px system-ui, sans-serif; fill: #1f2328 } .title { font-weight: 600 } .quiet { fill: #57606a }
.ours { fill: #D55E00 } .other { fill: #0072B2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .quiet { fill: #9ca3af } .ours { fill: #FF8F4A } .other { fill: #56B4E9 } }"""
HEAD = """\
| trainer | usual step | faster | of it arithmetic | first step | tokens/s | peak memory | held-out score |
|---|---|---|---|---|---|---|---|"""


def table(document: Json, yardstick: str) -> str:
    """A row for each trainer that ran on a GPU: medians over its seeds, the score as mean and range.

    `faster` compares the usual step with that of `yardstick`; the arithmetic is the time of the step's products at the
    GPU's peak, as a share of the step.
    """
    steps, lines = _steps(document), [HEAD]
    for row in document["rows"]:
        if not (runs := row["runs"]):
            continue
        step, first = steps[row["name"]], statistics.median(run["first_step_seconds"] for run in runs)
        rate, peak = statistics.median(run["tokens_per_second"] for run in runs), max(run["peak_bytes"] for run in runs)
        cells = (
            row["name"], f"{1e3 * step:.1f} ms", f"{steps[yardstick] / step:.1f}×", f"{document['floor_seconds'] / step:.1%}",
            f"{first:.2f} s", f"{rate:,.0f}", f"{peak / 1e6:,.0f} MB", _scores(runs),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def chart(document: Json, yardstick: str) -> str:
    """The usual step of each trainer that ran, as bars from zero."""
    steps, spec = _steps(document), document["spec"]
    longest, height = max(steps.values()), TOP + LINE * len(steps) + 8
    model, method = models.find(spec["model"]).name, methods.find(spec["method"]).name
    title = f"One training step: {model}, {method} rank {spec['rank']}, batches of {spec['batch_size']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f'<text x="0" y="18" class="title">{escape(title)}</text>',
        f'<text x="0" y="38" class="quiet">milliseconds, median, on one {escape(document["hardware"])}</text>',
    ]
    for i, (name, step) in enumerate(steps.items()):
        y, long = TOP + LINE * i, (WIDTH - LEFT - RIGHT) * step / longest
        kind = "ours" if name.startswith("peftlab") else "other"
        faster = f", {steps[yardstick] / step:.1f}× faster" if step < steps[yardstick] else ""
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{max(long, 1):.1f}" height="{BAR}" class="{kind}"/>',
            f'<text x="{LEFT + long + 6:.1f}" y="{y + 14}">{1e3 * step:.1f}<tspan class="quiet">{faster}</tspan></text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def _steps(document: Json) -> dict[str, float]:
    """The seconds of each trainer's usual step, of those that ran."""
    ran = [row for row in document["rows"] if row["runs"]]
    return {row["name"]: statistics.median(run["step_seconds"] for run in row["runs"]) for row in ran}


def _scores(runs: list[Json]) -> str:
    scores = [100 * run["score"] for run in runs if "score" in run]
    if len(scores) < 2:
        return f"{scores[0]:.0f}%" if scores else ""
    return f"{statistics.mean(scores):.0f}% ({min(scores):.0f} to {max(scores):.0f}, {len(scores)} seeds)"
