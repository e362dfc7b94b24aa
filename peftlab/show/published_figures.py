"""The chart of the published benchmark: a point for each run, the front, and the names of a few runs."""

from __future__ import annotations

from html import escape
from math import ceil, floor, log10
from typing import TYPE_CHECKING

from .. import units
from ..lectures import published
from ..lectures.published import METRICS, Metric, Run
from .figures import PALETTE, Chart, blank

if TYPE_CHECKING:
    import plotly.graph_objects as go

MARKS = {"full": "star", "additive": "circle", "selective": "square", "prompt-based": "diamond"}
"""The shape of each family's points. Colour says only whether the app has the method."""
DEEP, LINE = 380, 20
"""The approximate height of the plot area and the height of a name, in pixels."""


def benchmark(x_key: str, y_key: str, theme: str) -> go.Figure:
    """Every run by two metrics. Raises SpecError for an unknown metric."""
    c, x, y = PALETTE[theme], published.metric(x_key), published.metric(y_key)
    scales = ", ".join(name for name, m in (("across", x), ("up", y)) if m.log)
    title = f"{y.title[0].upper()}{y.title[1:]}, by {x.title}{f' (log scale {scales})' if scales else ''}"
    chart = blank(theme, 460, title={"text": title})
    line = published.front(x, y)
    chart.add_scatter(
        x=_values(line, x), y=_values(line, y), mode="lines", hoverinfo="skip", name="front",
        line={"color": c["text"], "width": 2, "dash": "dot"},
    )  # fmt: skip
    for family, mark in ((None, "circle"), *MARKS.items()):
        of = [r for r in published.runs() if r.family == family]
        chart.add_scatter(
            x=_values(of, x), y=_values(of, y), mode="markers", name=family or "other",
            marker={
                "symbol": mark, "size": 18 if mark == "star" else 11, "color": c["trained" if family else "overhead"],
                "opacity": 1 if family else 0.65, "line": {"color": c["surface"], "width": 1},
            },
            customdata=[_all_of(r) for r in of], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    _names(chart, x, y, c)
    chart.update_xaxes(**_axis(x), title_text=x.title)
    chart.update_yaxes(**_axis(y))
    return chart


def _values(of: list[Run], m: Metric) -> list[float]:
    """The runs' values in the unit of the axis."""
    return [m.of(r) / m.scale for r in of]


def _all_of(run: Run) -> str:
    """What hovering over a run's point tells: all its figures."""
    figures = "<br>".join(f"{m.title.split(',')[0]} {m.show(m.of(run))}" for m in METRICS.values())
    return f"<b>{escape(run.label)}</b><br>{figures}<br>{escape(run.date)}"


def _names(chart: go.Figure, x: Metric, y: Metric, c: dict[str, str]) -> None:
    """Writes names above their points, one under another where they would overlap on a narrow screen."""
    (left, right), (low, high) = _range(x), _range(y)
    named = sorted(published.notable(), key=lambda pair: -y.of(pair[1]))
    line = -float(LINE)
    for text, run in named:
        at = [log10(m.of(run) / m.scale) if m.log else m.of(run) / m.scale for m in (x, y)]
        point = DEEP * (high - at[1]) / (high - low)  # pixels from the top
        line = max(point - 1.5 * LINE, line + LINE)
        ends = at[0] > (left + right) / 2
        chart.add_annotation(
            x=at[0], y=at[1], text=f"<b>{escape(text)}</b>", showarrow=True, arrowhead=0, arrowwidth=1.5,
            arrowcolor=c["text"], ax=-20 if ends else 20, ay=line - point, xanchor="right" if ends else "left",
            font={"size": 15},
        )  # fmt: skip


def _range(m: Metric) -> tuple[float, float]:
    """The ends of an axis with some room around the runs; powers of ten on a logarithmic one."""
    values = [m.of(r) / m.scale for r in published.runs()]
    low, high = (log10(min(values)), log10(max(values))) if m.log else (_start(values), max(values))
    room = 0.06 * (high - low)
    return low - room, high + 2 * room


def _start(values: list[float]) -> float:
    """Where a linear axis starts: at zero, unless more than half of the axis would be empty then."""
    return 0.0 if min(values) < max(values) / 2 else min(values)


def _axis(m: Metric) -> Chart:
    """A linear axis, or a logarithmic one with a tick at every power of ten, or at every other one where they are many."""
    low, high = _range(m)
    if not m.log:
        return {"range": [low, high], "zeroline": True}
    powers = list(range(ceil(low), floor(high) + 1))
    powers = powers[:: 2 if len(powers) > 5 else 1]
    return {
        "type": "log", "range": [low, high], "tickvals": [10.0**p for p in powers], "ticktext": [_tick(p) for p in powers],
    }  # fmt: skip


def _tick(power: int) -> str:
    """A power of ten as people write it: 10K, 1M, 0.01."""
    return f"{10 ** (power % 3)}{'KMB'[power // 3 - 1]}" if power >= 3 else units.significant(10.0**power)
