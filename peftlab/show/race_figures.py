"""Charts of a race: where each racer ended, with its interval, and the losses on the way."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest
from statistics import fmean

import plotly.graph_objects as go

from .. import units
from ..race import Line
from .figures import PALETTE, QUARTERS, Chart, blank

ROW = 25
"""The height of a racer's row in pixels. Names in two lines take ROW_LINE more."""
ROW_LINE = 16
WRAPPED = 24
"""A name with more letters is written in two lines."""
NAMED = 6
"""Up to so many curves each have their name in the legend; among more, only the best and full fine-tuning do."""
MOST = 24
"""A chart with more curves shows each racer only at its best learning rate."""
BELOW = {"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}
"""A legend below the chart, where it hides nothing."""
INSIDE = {"x": 0.99, "y": 0.99, "xanchor": "right", "yanchor": "top"}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def scores(lines: Sequence[Line], setting: str, metric: str, theme: str) -> go.Figure:
    """The held-out score of each finished line with its 95% interval, across the values of a setting or one below another."""
    done = [line for line in lines if line.scores]
    values = {line.spec[setting] for line in done}
    numbers = len(values) > 1 and all(isinstance(value, int | float) for value in values)
    return _against(done, setting, metric, theme) if numbers else _ranking(done, metric, theme)


def _ranking(lines: Sequence[Line], metric: str, theme: str) -> go.Figure:
    c = PALETTE[theme]
    order = sorted(best_rates(lines), key=lambda line: line.score)
    names = [_wrapped(_without(line, "learning rate") or line.name) for line in order]
    height = 70 + (ROW + ROW_LINE * any("<br>" in name for name in names)) * max(3, len(order))
    figure = blank(theme, height, title={"text": f"{metric} on held-out items, %, with 95% intervals"})
    colours = [c["frozen"] if line.spec["method"] == "full" else c["trained"] for line in order]
    figure.add_scatter(
        x=[100 * line.score for line in order], y=names, mode="markers", error_x=_errors(order, c), **_hover(order),
        marker={"size": 11, "color": colours, "symbol": ["diamond" if x == c["frozen"] else "circle" for x in colours]},
    )  # fmt: skip
    for name, line, colour in zip(names, order, colours, strict=True):
        figure.add_annotation(
            x=1, xref="paper", y=name, text=f"<b>{units.score(line.score)}</b>", showarrow=False,
            xanchor="left", font={"color": colour, "size": 15},
        )  # fmt: skip
    figure.update_layout(margin_r=44)  # for the numbers
    figure.update_xaxes(range=[-3, 103], tickvals=[0, 50, 100], zeroline=False)
    figure.update_yaxes(showgrid=False, tickfont={"size": 14}, range=[-0.7, len(order) - 0.3])
    return figure


def best_rates(lines: Sequence[Line]) -> list[Line]:
    """The best of the finished lines that differ in nothing but the learning rate; the first of equals."""
    done = sorted(reversed([line for line in lines if line.scores]), key=lambda line: line.score)
    return list({json.dumps(line.spec | {"learning_rate": 0}): line for line in done}.values())


def _without(line: Line, setting: str) -> str:
    """A line's name without the part that tells a setting."""
    return ", ".join(part for part in line.name.split(", ") if not part.startswith(setting))


def _wrapped(name: str) -> str:
    """A name as markup. A long one is in two lines, broken at the comma that leaves the longer line shortest."""
    parts = name.split(", ")
    if len(name) <= WRAPPED or len(parts) == 1:
        return escape(name)
    halves = [(", ".join(parts[:i]), ", ".join(parts[i:])) for i in range(1, len(parts))]
    first, second = min(halves, key=lambda half: max(map(len, half)))
    return f"{escape(first)},<br>{escape(second)}"


def _against(lines: Sequence[Line], setting: str, metric: str, theme: str) -> go.Figure:
    c = PALETTE[theme]
    name = setting.replace("_", " ")
    figure = blank(theme, 380, title={"text": f"{metric} on held-out items, %, by {name} (log scale)"})
    groups = _grouped(lines, setting)
    methods = len({group[0].spec["method"] for group in groups.values()}) == len(groups)
    crowd = methods and len(groups) > len(DASHES)  # the legend of a crowd names only the two that everyone knows
    for i, (label, group) in enumerate(groups.items()):
        group = sorted(group, key=lambda line: line.spec[setting])
        method = group[0].spec["method"]
        known = method in ("full", "lora") and methods
        width = 3 if known or not crowd else 1.5
        colour = c["frozen"] if method == "full" else c["trained"] if method == "lora" else c["overhead"]
        figure.add_scatter(
            x=[line.spec[setting] for line in group], y=[100 * line.score for line in group], mode="lines+markers", name=label,
            line={"color": colour, "width": width, "dash": "solid" if known else DASHES[i % len(DASHES)]},
            marker={"size": 9 if known else 5}, error_y=_errors(group, c) if len(groups) <= 2 else None,
            showlegend=known or not crowd, cliponaxis=False, **_hover(group),
        )  # fmt: skip
    ticks = sorted({line.spec[setting] for line in lines})
    shown = ticks if len(ticks) <= 9 else [tick for tick in ticks if f"{tick:.0e}".startswith("1")]
    figure.update_xaxes(
        type="log", title_text=name, tickvals=shown, ticktext=[f"{tick:g}" for tick in shown], zeroline=False,
        tickangle=0, tickfont={"size": 12},
    )  # fmt: skip
    figure.update_yaxes(range=[-2, 108], tickvals=QUARTERS)
    figure.update_layout(showlegend=True, legend=BELOW)
    return figure


def _grouped(lines: Sequence[Line], setting: str) -> Mapping[str, list[Line]]:
    """Groups of lines that differ in `setting` only, by the rest of their names. LoRA and full fine-tuning come last, so
    that they are drawn over the others.
    """
    groups: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.spec["method"] in ("full", "lora")):
        groups.setdefault(_without(line, setting.replace("_", " ")), []).append(line)
    return groups


def _errors(lines: Sequence[Line], colours: Mapping[str, str]) -> Chart:
    """Error bars over the 95% intervals."""
    return {
        "type": "data", "symmetric": False, "color": colours["muted"], "thickness": 1.5, "width": 4,
        "array": [100 * (line.interval[1] - line.score) for line in lines],
        "arrayminus": [100 * (line.score - line.interval[0]) for line in lines],
    }  # fmt: skip


def _hover(lines: Sequence[Line]) -> Chart:
    """What hovering over the points of these lines tells."""
    return {"customdata": [_told(line) for line in lines], "hovertemplate": "%{customdata}<extra></extra>"}


def _told(line: Line) -> str:
    low, high = line.interval
    runs = "1 seed" if len(line.scores) == 1 else f"{len(line.scores)} seeds"
    return (
        f"<b>{escape(line.name)}</b><br>{units.score(line.score)} ({units.score(low)} to {units.score(high)}), {runs}"
        f"<br>{line.trainable_parameters:,} trained<br>held-out loss {fmean(line.loss):.3f}"
        f"<br>forgetting {fmean(line.forgetting):.2f}"
    )


def curves(lines: Sequence[Line], steps: int, theme: str) -> go.Figure:
    """Training loss by step, the mean over the seeds run so far. While a race goes on, a later call only adds points."""
    c = PALETTE[theme]
    shown = lines if len(lines) <= MOST else best_rates(lines)
    running = [(line, _mean_curve(line)) for line in shown if line.losses and line.losses[0]]
    figure = blank(theme, 340, title={"text": "Training loss, nats per answer token (log scale)"}, uirevision="race")
    leader = max((line for line in lines if line.scores), key=lambda line: line.score, default=None)
    running.sort(key=lambda pair: (pair[0] is leader, pair[0].spec["method"] == "full"))  # the last is drawn on top
    yardsticks = sum(line.spec["method"] == "full" for line, _ in running)
    for i, (line, losses) in enumerate(running):
        ours, full = line is leader, line.spec["method"] == "full" and yardsticks == 1
        named = len(running) <= NAMED or ours or full
        colour = c["trained"] if ours else c["frozen"] if full else c["overhead"]
        dash = DASHES[i % len(DASHES)] if named and not (ours or full) else "solid"
        figure.add_scatter(
            x=list(range(1, len(losses) + 1)), y=losses, mode="lines", name=_wrapped(line.name), showlegend=named,
            line={"color": colour, "width": 3 if named else 1.2, "dash": dash},
            hovertemplate="%{fullData.name}<br>step %{x}: %{y:.3f}<extra></extra>",
        )  # fmt: skip
    long = any("<br>" in trace.name for trace in figure.data if trace.showlegend)
    figure.update_layout(showlegend=True, legend=BELOW if long else INSIDE)
    figure.update_xaxes(range=[0, steps * 1.02], title_text="step")
    figure.update_yaxes(type="log", dtick=1, exponentformat="none")
    return figure


def _mean_curve(line: Line) -> list[float]:
    """The mean loss at each step over the seeds that have come so far."""
    return [fmean(loss for loss in losses if loss is not None) for losses in zip_longest(*line.losses)]
