"""Charts of a race: where each racer ended, with its interval, and the losses on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest
from statistics import fmean
from typing import Any

from .. import units
from ..race import Line
from .figures import PALETTE, blank

ROW = 25
"""Pixels for a racer, and ROW_LINE more for names in two lines."""
ROW_LINE = 16
WRAPPED = 24
"""Letters of the longest name in one line."""
NAMED = 6
"""Most curves that each get their name; of more, only the best and full fine-tuning do."""
MOST = 24
"""Curves in one chart; of more, each racer's at its best learning rate."""
BELOW = {"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}
"""Where a legend is in nobody's way."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


def scores(lines: Sequence[Line], setting: str, metric: str, theme: str) -> Any:
    """The held-out score of each finished line with its 95% interval: against a setting of numbers, else one below another."""
    done = [line for line in lines if line.scores]
    values = [line.spec[setting] for line in done]
    if len(set(values)) > 1 and all(isinstance(value, int | float) for value in values):
        return _against(done, setting, metric, theme)
    return _ranking(done, metric, theme)


def _ranking(lines: Sequence[Line], metric: str, theme: str) -> Any:
    c = PALETTE[theme]
    order = sorted(best_rates(lines), key=lambda line: line.score)
    names = [_wrapped(_without(line, "learning rate") or line.name) for line in order]
    row = ROW + ROW_LINE * any("<br>" in name for name in names)
    figure = blank(
        theme, 70 + row * max(3, len(order)), title={"text": f"{metric} on held-out items, %, with 95% intervals"}
    )
    colours = [c["frozen"] if line.spec["method"] == "full" else c["trained"] for line in order]
    figure.add_scatter(
        x=[100 * line.score for line in order],
        y=names,
        mode="markers",
        marker={"size": 11, "color": colours, "symbol": ["diamond" if x == c["frozen"] else "circle" for x in colours]},
        error_x=_errors(order, c),
        customdata=[_told(line) for line in order],
        hovertemplate="%{customdata}<extra></extra>",
    )
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
    """Of those that finished and differ in the learning rate only, the best; of equals the first."""
    done = sorted(reversed([line for line in lines if line.scores]), key=lambda line: line.score)
    return list({json.dumps(line.spec | {"learning_rate": 0}): line for line in done}.values())


def _without(line: Line, setting: str) -> str:
    """Its name without the part that tells a setting."""
    return ", ".join(part for part in line.name.split(", ") if not part.startswith(setting))


def _wrapped(name: str) -> str:
    """A long name in two lines, of lengths as near as its commas allow."""
    parts = name.split(", ")
    if len(name) <= WRAPPED or len(parts) == 1:
        return escape(name)
    halves = [(", ".join(parts[:i]), ", ".join(parts[i:])) for i in range(1, len(parts))]
    first, second = min(halves, key=lambda half: max(map(len, half)))
    return f"{escape(first)},<br>{escape(second)}"


def _against(lines: Sequence[Line], setting: str, metric: str, theme: str) -> Any:
    c = PALETTE[theme]
    name = setting.replace("_", " ")
    title = f"{metric} on held-out items, %, by {name} (log scale)"
    figure = blank(theme, 380, title={"text": title})
    groups = _grouped(lines, setting)
    methods = len({group[0].spec["method"] for group in groups.values()}) == len(groups)
    crowd = methods and len(groups) > len(DASHES)  # of which the legend names the two that all know
    for i, (label, group) in enumerate(groups.items()):
        group = sorted(group, key=lambda line: line.spec[setting])
        method = group[0].spec["method"]
        known = method in ("full", "lora") and methods
        colour = c["frozen"] if method == "full" else c["trained"] if method == "lora" else c["overhead"]
        figure.add_scatter(
            x=[line.spec[setting] for line in group],
            y=[100 * line.score for line in group],
            mode="lines+markers",
            name=label,
            showlegend=known or not crowd,
            line={
                "color": colour,
                "width": 3 if known or not crowd else 1.5,
                "dash": "solid" if known else DASHES[i % len(DASHES)],
            },
            marker={"size": 9 if known else 5},
            error_y=_errors(group, c) if len(groups) <= 2 else None,
            cliponaxis=False,
            customdata=[_told(line) for line in group],
            hovertemplate="%{customdata}<extra></extra>",
        )
    ticks = sorted({line.spec[setting] for line in lines})
    few = len(ticks) <= 9
    shown = ticks if few else [tick for tick in ticks if f"{tick:.0e}".startswith("1")]
    figure.update_xaxes(
        type="log", title_text=name, tickvals=shown, ticktext=[f"{tick:g}" for tick in shown], zeroline=False,
        tickangle=0, tickfont={"size": 12},
    )  # fmt: skip
    figure.update_yaxes(range=[-2, 108], tickvals=[0, 25, 50, 75, 100])
    figure.update_layout(showlegend=True, legend=BELOW)
    return figure


def _grouped(lines: Sequence[Line], setting: str) -> Mapping[str, list[Line]]:
    """Lines that differ in `setting` only, by what else their names tell. LoRA and full fine-tuning last, to be drawn over
    the others.
    """
    groups: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.spec["method"] in ("full", "lora")):
        groups.setdefault(_without(line, setting.replace("_", " ")), []).append(line)
    return groups


def _errors(lines: Sequence[Line], colours: Mapping[str, str]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [100 * (line.interval[1] - line.score) for line in lines],
        "arrayminus": [100 * (line.score - line.interval[0]) for line in lines],
        "color": colours["muted"],
        "thickness": 1.5,
        "width": 4,
    }


def _told(line: Line) -> str:
    low, high = line.interval
    runs = "1 seed" if len(line.scores) == 1 else f"{len(line.scores)} seeds"
    return (
        f"<b>{escape(line.name)}</b><br>{units.score(line.score)} ({units.score(low)} to {units.score(high)}), {runs}"
        f"<br>{line.trainable_parameters:,} trained<br>held-out loss {fmean(line.loss):.3f}"
        f"<br>forgetting {fmean(line.forgetting):.2f}"
    )


def curves(lines: Sequence[Line], steps: int, theme: str) -> Any:
    """Training loss by step, the mean over the seeds run so far. Only points are added between calls."""
    c = PALETTE[theme]
    shown = lines if len(lines) <= MOST else best_rates(lines)
    running = [(line, _mean_curve(line)) for line in shown if line.losses and line.losses[0]]
    figure = blank(theme, 340, title={"text": "Training loss, nats per answer token (log scale)"}, uirevision="race")
    leader = max((line for line in lines if line.scores), key=lambda line: line.score, default=None)
    running.sort(key=lambda pair: (pair[0] is leader, pair[0].spec["method"] == "full"))  # these over the others
    yardsticks = sum(line.spec["method"] == "full" for line, _ in running)
    for i, (line, losses) in enumerate(running):
        ours, full = line is leader, line.spec["method"] == "full" and yardsticks == 1
        named = len(running) <= NAMED or ours or full
        colour = c["trained"] if ours else c["frozen"] if full else c["overhead"]
        figure.add_scatter(
            x=list(range(1, len(losses) + 1)),
            y=losses,
            mode="lines",
            name=_wrapped(line.name),
            line={
                "color": colour,
                "width": 3 if named else 1.2,
                "dash": DASHES[i % len(DASHES)] if named and not (ours or full) else "solid",
            },
            hovertemplate="%{fullData.name}<br>step %{x}: %{y:.3f}<extra></extra>",
            showlegend=named,
        )
    long = any("<br>" in trace.name for trace in figure.data if trace.showlegend)
    inside = {"x": 0.99, "y": 0.99, "xanchor": "right", "yanchor": "top"}
    figure.update_layout(showlegend=True, legend=BELOW if long else inside)
    figure.update_xaxes(range=[0, steps * 1.02], title_text="step")
    figure.update_yaxes(type="log", dtick=1, exponentformat="none")
    return figure


def _mean_curve(line: Line) -> list[float]:
    """Over the seeds that came so far."""
    steps = zip_longest(*line.losses)
    return [fmean(loss for loss in losses if loss is not None) for losses in steps]
