"""What every chart shares: palette, plotly templates, log axes. What draws is pure: results and a theme in, a figure out.

plotly is imported where a figure is made: the command line uses this folder's words without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil, floor, log10
from typing import TYPE_CHECKING

from .. import units

if TYPE_CHECKING:
    import plotly.graph_objects as go

Chart = dict[str, object]
"""A plotly figure as plain JSON: its `data` and its `layout`."""
THEMES = ("light", "dark")
PALETTE = {
    "light": {
        "frozen": "#0072B2", "trained": "#D55E00", "gradients": "#E69F00", "optimizer": "#CC79A7",
        "activations": "#009E73", "logits": "#8C7A00", "overhead": "#6B7280", "text": "#1A1D21", "muted": "#565D66",
        "border": "#D9DCE0", "surface": "#FFFFFF",
    },
    "dark": {
        "frozen": "#56B4E9", "trained": "#FF8F4A", "gradients": "#F2B84B", "optimizer": "#E3A0C5",
        "activations": "#3CC79E", "logits": "#F0E442", "overhead": "#9CA3AF", "text": "#ECEEF1", "muted": "#A6ADB7",
        "border": "#3A3F47", "surface": "#16181C",
    },
}  # fmt: skip
"""A colour for each meaning, after Okabe and Ito, which colour-blind readers can tell apart. The CSS has the same values."""
QUARTERS = [0, 25, 50, 75, 100]
"""Ticks of an axis in percent."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""These tell lines of one colour apart."""


def themed(draw: Callable[..., go.Figure | Chart], *args: object) -> dict[str, Chart]:
    """`draw(*args, theme)` in both themes, as plain JSON: the page knows which one its reader uses, the server does not."""
    figures = {theme: draw(*args, theme) for theme in THEMES}
    return {theme: f if isinstance(f, dict) else f.to_plotly_json() for theme, f in figures.items()}


def blank(theme: str, height: int, **layout: object) -> go.Figure:
    """A figure without traces, `height` pixels high; `layout` takes what plotly's `update_layout` takes."""
    from plotly.graph_objects import Figure

    return Figure(layout={"template": {"layout": look(theme)}, "height": height, **layout})


@cache
def look(theme: str) -> Chart:
    """The layout of a theme's plotly template."""
    c = PALETTE[theme]
    axis = {
        "gridcolor": c["border"], "zerolinecolor": c["border"], "linecolor": c["border"], "automargin": True,
        "title": {"standoff": 8}, "fixedrange": True,
    }  # fmt: skip
    return {
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "xaxis": axis, "yaxis": axis,
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 16, "color": c["text"]},
        "title": {"font": {"size": 17}, "x": 0, "xref": "container", "xanchor": "left"},
        "margin": {"l": 8, "r": 8, "t": 12, "b": 8}, "showlegend": False, "bargap": 0.35,
        "uniformtext": {"minsize": 13, "mode": "hide"},
        "hoverlabel": {"bgcolor": c["surface"], "bordercolor": c["border"], "font": {"color": c["text"], "size": 15}},
    }  # fmt: skip


def decades(low: float, high: float) -> Chart:
    """A log axis from `low` to `high`, a tick at each power of ten, or at every other one of many: 0.01, 1, 100M, 10B."""
    powers = range(ceil(log10(low)), floor(log10(high)) + 1)
    powers = powers[:: 2 if len(powers) > 5 else 1]
    names = [f"{10 ** (p % 3)}{'KMBT'[p // 3 - 1]}" if p >= 3 else units.significant(10.0**p) for p in powers]
    return {
        "type": "log", "range": [log10(low), log10(high)], "tickvals": [10.0**p for p in powers], "ticktext": names,
    }  # fmt: skip
