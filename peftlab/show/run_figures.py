"""Charts of a training run: its loss, its held-out metric, and the scores of base and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .. import units
from ..compare import BASE, ComparisonReport
from ..run.events import Event
from .figures import PALETTE, blank

if TYPE_CHECKING:
    import plotly.graph_objects as go

QUARTERS = [0, 25, 50, 75, 100]
"""Ticks of an axis in percent."""


def loss_curve(events: Sequence[Event], steps: int, theme: str) -> go.Figure:
    """Training loss by step. Only points are added between calls, so the page keeps its reader's zoom."""
    done = [e["step"] for e in events if e["type"] == "step"]
    losses = [e["loss"] for e in events if e["type"] == "step"]
    figure = blank(theme, 300, title="Training loss, nats per answer token", uirevision="loss")
    figure.add_scatter(
        x=done, y=losses, mode="lines+markers", line={"color": PALETTE[theme]["trained"], "width": 3}, marker={"size": 5},
        hovertemplate="step %{x}: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    if done:
        last = f"<b>{losses[-1]:.2f}</b>"
        figure.add_annotation(x=done[-1], y=losses[-1], text=last, showarrow=False, yshift=16, font={"size": 17})
    figure.update_xaxes(range=[0, steps * 1.05], title_text="step")
    return figure.update_yaxes(range=[0, max(losses, default=4) * 1.12])


def metric_curve(events: Sequence[Event], steps: int, name: str, theme: str) -> go.Figure:
    """The held-out metric each time it was measured, in percent."""
    c = PALETTE[theme]
    measured = [e for e in events if e["type"] == "eval"]
    values = [100 * next(iter(e["metrics"].values())) for e in measured]
    colours = [c["frozen"]] + [c["trained"]] * (len(measured) - 1)
    figure = blank(theme, 300, title=f"{name} on held-out items, %", uirevision="metric")
    figure.add_scatter(
        x=[e["step"] for e in measured], y=values, mode="lines+markers+text", line={"color": c["trained"], "width": 3},
        marker={"size": 13, "color": colours}, text=[f"<b>{value:.0f}%</b>" for value in values],
        textposition="top center", textfont={"size": 18, "color": colours}, cliponaxis=False,
        hovertemplate="step %{x}: %{y:.1f}%<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(range=[-0.06 * steps, steps * 1.08], title_text="step", zeroline=False)
    return figure.update_yaxes(range=[0, 118], tickvals=QUARTERS)


def score_bars(report: ComparisonReport, name: str, theme: str) -> go.Figure:
    """The metric of base and adapters, in percent with 95% intervals."""
    c = PALETTE[theme]
    scores = list(reversed(report.scores))
    labels = ["base model" if s.model == BASE else escape(s.model) for s in scores]
    title = f"{name} on {len(report.exchanges)} held-out items, %"
    figure = blank(theme, 60 + 80 * len(scores), bargap=0.55, title=title)
    figure.add_bar(
        y=labels, x=[100 * s.mean for s in scores], orientation="h",
        marker={"color": [c["frozen"] if s.model == BASE else c["trained"] for s in scores]},
        error_x={
            "type": "data", "symmetric": False, "color": c["muted"],
            "array": [100 * (s.high - s.mean) for s in scores],
            "arrayminus": [100 * (s.mean - s.low) for s in scores],
        },
        hovertemplate="%{y}: %{x:.1f}%<extra></extra>",
    )  # fmt: skip
    for s, label in zip(scores, labels, strict=True):
        value = f"<b>{units.score(s.mean)}</b>"
        place = {"y": label, "showarrow": False, "xanchor": "left"}
        figure.add_annotation(place, x=100 * s.high, text=value, xshift=8, font={"size": 18})
        figure.add_annotation(place, x=0, text=label, yanchor="bottom", yshift=34)  # above, where a phone has room
    figure.update_xaxes(range=[0, 115], tickvals=QUARTERS)
    return figure.update_yaxes(showgrid=False, showticklabels=False, range=[-0.5, len(scores) - 0.2])
