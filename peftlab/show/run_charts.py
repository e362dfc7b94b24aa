"""The curves of a training run: its loss, raw and smoothed, its held-out metric, and small lines that stand beside a number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ..data import tasks
from ..run.events import Event, last_of
from .figures import PALETTE, QUARTERS, Chart, blank, themed

if TYPE_CHECKING:
    import plotly.graph_objects as go

HEIGHT = 260
"""Pixels. Two charts side by side and the figures below them are on a laptop's first screen."""
LOSS = "Training loss, nats per answer token"
ROOM = 0.65
"""After so large a share of the steps, there is no room for words at the right of a curve's end."""
NEAR = 0.3
"""Points that are a smaller share of the steps apart have their scores at either side."""
POINTS = 120
"""Most points of a small line."""


def weight(steps: int) -> float:
    """How much the newest loss of a run of so many `steps` counts in the smoothed one.

    The average reaches over about a tenth of the run. It depends on the steps that are planned, so no point moves later.
    """
    return 1 / max(4, steps / 10)


def smoothed(losses: Sequence[float], steps: int) -> list[float]:
    """The exponential moving average of each loss and those before it, corrected for its start at zero.

    Without the correction the first averages would be near zero (Kingma and Ba 2015, section 3). A sudden change of the
    loss reaches the average over about 1 / `weight(steps)` steps.
    """
    new, mean, found = weight(steps), 0.0, []
    for n, loss in enumerate(losses, 1):
        mean += new * (loss - mean)
        found.append(mean / (1 - (1 - new) ** n))
    return found


def losses_of(events: Sequence[Event]) -> list[float]:
    """The loss of each step, in nats per answer token."""
    return [e["loss"] for e in events if e["type"] == "step"]


def charts(events: Sequence[Event]) -> dict[str, dict[str, Chart]]:
    """The loss and the metric of a run so far, by panel."""
    start = last_of(events, "start")
    steps = start["spec"]["steps"] if start else 40
    name = tasks.METRICS[start["metric"]].name if start else "Score"
    return {"loss": themed(loss_curve, events, steps), "metric": themed(metric_curve, events, steps, name)}


def loss_curve(events: Sequence[Event], steps: int, theme: str) -> go.Figure:
    """Training loss by step. Only points are added between calls, so the page keeps its reader's zoom."""
    done = [e["step"] for e in events if e["type"] == "step"]
    losses, colour = losses_of(events), PALETTE[theme]["trained"]
    smooth = smoothed(losses, steps)
    figure = blank(theme, HEIGHT, title=LOSS, uirevision="loss")
    figure.add_scatter(
        x=done, y=losses, mode="lines+markers", line={"color": colour, "width": 1.5}, marker={"size": 3, "color": colour},
        opacity=0.55, hovertemplate="step %{x}: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=done, y=smooth, mode="lines", line={"color": colour, "width": 3.5},
        hovertemplate="smoothed to step %{x}: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    if done:
        last = f"smoothed <b>{smooth[-1]:.2f}</b>"
        has_room = done[-1] < ROOM * steps
        figure.add_annotation(
            x=done[-1], y=smooth[-1], text=last, showarrow=False, font={"size": 16},
            **{"xanchor": "left", "xshift": 6} if has_room else {"xanchor": "right", "yshift": 38},
        )  # fmt: skip
    figure.update_xaxes(range=[0, steps * 1.05], title_text="step")
    return figure.update_yaxes(range=[0, max(losses, default=4) * 1.12])


def metric_curve(events: Sequence[Event], steps: int, name: str, theme: str) -> go.Figure:
    """The held-out metric each time it was measured, in percent."""
    c = PALETTE[theme]
    measured = [e for e in events if e["type"] == "eval"]
    values = [100 * next(iter(e["metrics"].values())) for e in measured]
    items = [e.get("items", 0) for e in measured]
    of = [f" of {n}" if n < max(items) else "" for n in items]  # midway a CPU scores fewer
    colours = [c["frozen"]] + [c["trained"]] * (len(measured) - 1)
    at = [e["step"] for e in measured]
    near = [b - a < NEAR * steps for a, b in pairwise(at)]
    sides = [
        "right" if follows else "left" if leads else "center"
        for follows, leads in zip([False, *near], [*near, False], strict=True)
    ]
    figure = blank(theme, HEIGHT, title=f"{name} on held-out items, %", uirevision="metric")
    figure.add_scatter(
        x=at, y=values, mode="lines+markers+text", line={"color": c["trained"], "width": 3},
        marker={"size": 13, "color": colours}, text=[f"<b>{v:.0f}%{n}</b>" for v, n in zip(values, of, strict=True)],
        textposition=[f"top {side}" for side in sides], textfont={"size": 18, "color": colours}, cliponaxis=False,
        hovertemplate="step %{x}: %{y:.1f}%<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(range=[-0.06 * steps, steps * 1.08], title_text="step", zeroline=False)
    return figure.update_yaxes(range=[0, 118], tickvals=QUARTERS)


def small_line(values: Sequence[float], steps: int, colour: str) -> str:
    """A line without axes, from zero to the largest value, as wide as a run of so many `steps`; an SVG."""
    top, every = max(values, default=0.0) or 1.0, -(-len(values) // POINTS) or 1
    kept = [*range(0, len(values), every)]
    if values and kept[-1] != len(values) - 1:
        kept.append(len(values) - 1)
    points = " ".join(f"{100 * (n + 1) / max(steps, 1):.1f},{19 - 18 * values[n] / top:.1f}" for n in kept)
    return (
        f'<svg class="small-line {colour}" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{points}"/></svg>'
    )
