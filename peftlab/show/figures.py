"""Pictures of results: plotly figures in the templates `peftlab-light` and `peftlab-dark`, and data paths as SVG.

Every function is pure: a result dataclass (or a run's events) and a theme in, a figure out. `themed` makes both themes at
once, because the page knows which one its reader uses and the server does not. The chart that every click on Memory draws
anew is made as plain JSON: plotly's own objects take ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from math import ceil, floor, log10
from typing import Any

from .. import units
from ..base import architecture as architectures
from ..base.models import MODELS
from ..compare import BASE, ComparisonReport
from ..count import ParameterReport, count
from ..errors import SpecError
from ..lectures.claims import CLAIMS
from ..memory import MemoryReport, Moment
from ..methods import Drawing
from ..methods.where import where
from ..resolve import resolve
from ..spec import RunSpec

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
"""The semantic palette: Okabe and Ito's colours, safe for colour-blind readers. The page's CSS has the same values."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def themed(draw: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """`draw(*args, theme)` in both themes, as plain JSON for the page."""
    figures = {theme: draw(*args, theme) for theme in THEMES}
    return {theme: f if isinstance(f, dict) else f.to_plotly_json() for theme, f in figures.items()}


def blank(theme: str, height: int, **layout: Any) -> Any:
    import plotly.graph_objects as go
    import plotly.io as pio

    name = f"peftlab-{theme}"
    if name not in pio.templates:
        for each in THEMES:
            pio.templates[f"peftlab-{each}"] = go.layout.Template(layout=_look(each))
    figure = go.Figure()
    figure.update_layout(template=pio.templates[name], height=height, **layout)
    return figure


@cache
def _look(theme: str) -> dict[str, Any]:
    """What every chart of a theme looks like, as the layout of a plotly template."""
    c = PALETTE[theme]
    axis = {
        "gridcolor": c["border"], "zerolinecolor": c["border"], "linecolor": c["border"], "automargin": True,
        "title": {"standoff": 8}, "fixedrange": True,
    }  # fmt: skip
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 16, "color": c["text"]},
        "title": {"font": {"size": 17}, "x": 0, "xref": "container", "xanchor": "left"},
        "margin": {"l": 8, "r": 8, "t": 12, "b": 8},
        "uniformtext": {"minsize": 13, "mode": "hide"},
        "xaxis": axis,
        "yaxis": axis,
        "showlegend": False,
        "bargap": 0.35,
        "hoverlabel": {
            "bgcolor": c["surface"],
            "bordercolor": c["border"],
            "font": {"color": c["text"], "size": 15},
        },
    }


COMPONENTS = (
    ("frozen_weights", "frozen", "frozen weights"),
    ("trainable_weights", "trained", "trained weights"),
    ("gradients", "gradients", "gradients"),
    ("optimizer", "optimizer", "optimizer states"),
    ("temporaries", "overhead", "temporaries"),
    ("activations", "activations", "activations"),
    ("logits", "logits", "logits"),
    ("communication", "overhead", "buffers between GPUs"),
    ("workspace", "overhead", "cuBLAS workspace"),
)
"""Of allocated memory: kind, colour and name."""


def _bar_label(figure: Any, y: str, text: str) -> None:
    """A bar's name above it, where a phone has room."""
    figure.add_annotation(x=0, y=y, text=text, showarrow=False, xanchor="left", yanchor="bottom", yshift=34)


def memory_timeline(report: MemoryReport, theme: str) -> dict[str, Any]:
    """Memory through one training step, stacked by kind, with the peak marked: plotly's JSON. For a report that has moments."""
    c = PALETTE[theme]
    wide = max(1.0, len(report.moments) / 16)  # the optimizer is one moment, and would be a hairline
    points = [(float(i), m) for i, m in enumerate(report.moments)]
    points += [(x + wide, m) for x, m in points[-1:] if m.phase == "optimizer"]
    end = points[-1][0]
    traces: list[dict[str, Any]] = []
    for kind, colour, label in COMPONENTS:
        values = [m.bytes.get(kind, 0) for _, m in points]
        if any(values):
            traces.append({
                "type": "scatter", "mode": "lines", "stackgroup": "memory", "name": label, "fillcolor": c[colour],
                "line": {"width": 0.5, "color": c[colour], "shape": "linear"},
                "x": [x for x, _ in points],
                "y": [v / 1e9 for v in values],
                "customdata": [units.size(v) for v in values],
                "hovertemplate": "%{customdata}",
            })  # fmt: skip
    traces[0] |= {
        "text": [_place(m, report) for _, m in points],
        "hovertemplate": "<b>%{text}</b><br>%{customdata}",
    }
    at, peak = max(points, key=lambda point: point[1].total)
    mark = {
        "x": at, "y": peak.total / 1e9, "text": f"<b>peak {units.size(peak.total)}</b><br>{_place(peak, report)}",
        "showarrow": True, "ax": 0, "ay": -34, "arrowcolor": c["text"],
        "xanchor": "right" if at > 0.8 * end else "left" if at < 0.2 * end else "center",
    }  # fmt: skip
    phases = list(dict.fromkeys(m.phase.split()[0] for m in report.moments))
    places = [[x for x, m in points if m.phase.startswith(phase)] for phase in phases]
    layout = {
        "template": {"layout": _look(theme)}, "height": 320, "hovermode": "x unified", "annotations": [mark],
        "title": {"text": "Through one training step: allocated memory, GB"},
        "xaxis": {
            "tickvals": [(min(xs) + max(xs)) / 2 for xs in places], "ticktext": phases, "showgrid": False,
            "range": [0, end],
        },
        "yaxis": {"range": [0, 1.28 * peak.total / 1e9], "rangemode": "tozero"},
    }  # fmt: skip
    return {"data": traces, "layout": layout}


def _place(moment: Moment, report: MemoryReport) -> str:
    """Where in a step a moment is, in words."""
    if report.source != "trace" or moment.phase == "optimizer":
        return moment.phase
    depth = max(m.part for m in report.moments)
    where = "embedding" if moment.part < 0 else "head and loss" if moment.part == depth else f"layer {moment.part + 1}"
    return f"{moment.phase}, {where}"


def percent_by_size(rank: int, target_modules: str, marked: str, theme: str) -> Any:
    """Percent that LoRA trains, in every layer, against a model's parameters: the catalogue, with `marked` in colour.

    A percent that the lecture gives for this rank and these modules is a dotted line: it holds it constant. Raises
    SpecError where LoRA does not suit `marked`.
    """
    c = PALETTE[theme]
    spec = RunSpec(model=marked, method="lora", rank=rank, target_modules=target_modules)
    mine, roles = count(resolve(spec)), _by_role(marked, target_modules)
    models = [*_others(spec.but(target_modules=roles)), mine]
    sizes, shares = [r.total_parameters for r in models], [r.trainable_percent for r in models]
    title = f"LoRA of rank {rank} on {where(mine.spec)}: % trained, by the model's size (log scales)"
    figure = blank(theme, 360, title={"text": title})
    top = max(shares) * max(2, (max(shares) / min(shares)) ** 0.3)
    for claimed in _claimed_percents(rank, roles):
        figure.add_scatter(
            x=[min(sizes) / 1.5, max(sizes) * 1.5], y=[claimed] * 2, mode="lines+markers+text", hoverinfo="skip",
            line={"color": c["overhead"], "width": 2, "dash": "dot"},
            marker={"size": 8, "opacity": 0},  # unseen, it holds the text off the line
            text=[f"the lecture:<br>{units.percent(claimed / 100)}", ""], textposition="bottom right",
        )  # fmt: skip
    figure.add_scatter(  # the name stands above every point, so that it covers none
        x=[mine.total_parameters] * 2, y=[mine.trainable_percent, top], mode="lines+text", hoverinfo="skip",
        line={"color": c["trained"], "width": 1.5},
        text=["", f" <b>{escape(mine.model_name)}</b> <br> {units.percent(mine.trainable_percent / 100)} "],
        textposition="bottom left" if mine.total_parameters**2 > min(sizes) * max(sizes) else "bottom right",
    )  # fmt: skip
    for reports, colour, size in ((models[:-1], "frozen", 10), (models[-1:], "trained", 16)):
        figure.add_scatter(
            x=[r.total_parameters for r in reports],
            y=[r.trainable_percent for r in reports],
            mode="markers+text",
            marker={"color": c[colour], "size": size, "line": {"color": c["surface"], "width": 1}},
            text=["with experts " if _experts(r) else "" for r in reports],  # why these are far below the others
            textposition="middle left",
            customdata=[_derived(r) for r in reports],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_xaxes(**_decades(min(sizes) / 1.5, max(sizes) * 1.5), title_text="parameters of the model")
    figure.update_yaxes(**_decades(min(shares) / 1.4, top * 1.1))
    return figure


def _by_role(model: str, target_modules: str) -> str:
    """Modules that one model names, in words that every family understands."""
    if target_modules == "all-linear":
        return target_modules
    found = architectures.of(model).targets(target_modules)
    return ",".join(sorted({role for m in found for role in (m.role or m.short_name).split("+")}))


def _others(spec: RunSpec) -> list[ParameterReport]:
    """Counts for the catalogue's models that `spec` suits, but for its own and for those of another's shapes."""
    shape = MODELS[spec.model].shape_of if spec.model in MODELS else None
    reports = []
    for key, entry in MODELS.items():
        if entry.config is None or entry.shape_of or key in (spec.model, shape):
            continue
        try:
            reports.append(count(resolve(spec.but(model=key))))
        except SpecError:  # without modules of these roles, or too narrow for the rank
            continue
    return reports


def _claimed_percents(rank: int, roles: str) -> list[float]:
    """What the lecture gives for LoRA of this rank on modules of these roles: one number, whatever the size."""
    runs = [(c.claimed, c.run) for c in CLAIMS if c.quantity == "trainable_percent" and c.least is None]
    return sorted({n for n, r in runs if r.rank == rank and _by_role(r.model or "", r.target_modules or "") == roles})


def _experts(report: ParameterReport) -> int:
    return architectures.of(report.spec.model).facts.experts


def _derived(report: ParameterReport) -> str:
    rank, trained = report.spec.rank, report.trainable_parameters
    return (
        f"<b>{escape(report.model_name)}</b><br>{rank} × {trained // rank:,} inputs and outputs<br>"
        f"= {trained:,} trained,<br>{units.percent(report.trainable_percent / 100)} of {report.total_parameters:,}"
        + ("<br>(its experts get no adapter)" if _experts(report) else "")
    )


def _decades(low: float, high: float) -> dict[str, Any]:
    """A log axis with a tick for each power of ten, written as people do: 0.01, 1, 100M, 10B."""
    powers = range(ceil(log10(low)), floor(log10(high)) + 1)
    names = [f"{10 ** (p % 3)}{'KMBT'[p // 3 - 1]}" if p >= 3 else units.significant(10.0**p) for p in powers]
    return {
        "type": "log", "range": [log10(low), log10(high)], "tickvals": [10.0**p for p in powers], "ticktext": names,
    }  # fmt: skip


def loss_curve(events: Sequence[dict[str, Any]], steps: int, theme: str) -> Any:
    """Training loss by step. Only points are added between calls, so the page keeps its reader's zoom."""
    c = PALETTE[theme]
    points = [(e["step"], e["loss"]) for e in events if e["type"] == "step"]
    figure = blank(theme, 300, title={"text": "Training loss, nats per answer token"}, uirevision="loss")
    figure.add_scatter(
        x=[p[0] for p in points],
        y=[p[1] for p in points],
        mode="lines+markers",
        line={"color": c["trained"], "width": 3},
        marker={"size": 5},
        hovertemplate="step %{x}: %{y:.3f}<extra></extra>",
    )
    if points:
        figure.add_annotation(
            x=points[-1][0],
            y=points[-1][1],
            text=f"<b>{points[-1][1]:.2f}</b>",
            showarrow=False,
            yshift=16,
            font={"size": 17},
        )
    figure.update_xaxes(range=[0, steps * 1.05], title_text="step")
    figure.update_yaxes(range=[0, max([p[1] for p in points], default=4) * 1.12])
    return figure


def metric_curve(events: Sequence[dict[str, Any]], steps: int, name: str, theme: str) -> Any:
    """The held-out metric each time it was measured."""
    c = PALETTE[theme]
    points = [(e["step"], 100 * next(iter(e["metrics"].values()))) for e in events if e["type"] == "eval"]
    figure = blank(theme, 300, title={"text": f"{name} on held-out items, %"}, uirevision="metric")
    colours = [c["frozen"]] + [c["trained"]] * (len(points) - 1)
    figure.add_scatter(
        x=[p[0] for p in points],
        y=[p[1] for p in points],
        mode="lines+markers+text",
        text=[f"<b>{p[1]:.0f}%</b>" for p in points],
        textposition="top center",
        textfont={"size": 18, "color": colours},
        line={"color": c["trained"], "width": 3},
        marker={"size": 13, "color": colours},
        cliponaxis=False,
        hovertemplate="step %{x}: %{y:.1f}%<extra></extra>",
    )
    figure.update_xaxes(range=[-0.06 * steps, steps * 1.08], title_text="step", zeroline=False)
    figure.update_yaxes(range=[0, 118], tickvals=[0, 25, 50, 75, 100])
    return figure


def score_bars(report: ComparisonReport, name: str, theme: str) -> Any:
    """The metric of base and adapters with 95% intervals."""
    c = PALETTE[theme]
    figure = blank(
        theme,
        60 + 80 * len(report.scores),
        bargap=0.55,
        title={"text": f"{name} on {len(report.exchanges)} held-out items, %"},
    )
    scores = list(reversed(report.scores))
    labels = ["base model" if s.model == BASE else escape(s.model) for s in scores]
    figure.add_bar(
        y=labels,
        x=[100 * s.mean for s in scores],
        orientation="h",
        marker={"color": [c["frozen"] if s.model == BASE else c["trained"] for s in scores]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [100 * (s.high - s.mean) for s in scores],
            "arrayminus": [100 * (s.mean - s.low) for s in scores],
            "color": c["muted"],
        },
        hovertemplate="%{y}: %{x:.1f}%<extra></extra>",
    )
    for s, label in zip(scores, labels, strict=True):
        figure.add_annotation(
            x=100 * s.high, y=label, text=f"<b>{units.score(s.mean)}</b>", showarrow=False, xanchor="left", xshift=8,
            font={"size": 18},
        )  # fmt: skip
        _bar_label(figure, label, label)
    figure.update_xaxes(range=[0, 115], tickvals=[0, 25, 50, 75, 100])
    figure.update_yaxes(showgrid=False, showticklabels=False, range=[-0.5, len(scores) - 0.2])
    return figure


BOX, GAP, ROW = 36, 34, 62
"""Of a data path, in pixels: a box's height, the least room between two, and from one line to the next."""


def data_path(drawing: Drawing, name: str) -> str:
    """How the data flows through one adapted place, as SVG in the page's colours: what is trained stands out."""
    main, branch = [_width(t) for t in drawing.main], [_width(t) for t in drawing.branch]
    leaves, joins = drawing.leaves, drawing.joins if drawing.joins is not None else len(main)
    inner = sum(branch) + GAP * (len(branch) + 1)
    span = sum(main[leaves or 0 : joins]) + GAP * (joins - (leaves or 0))
    spread = max(0, inner - span) / (joins - (leaves or 0)) if branch else 0
    x, gaps, boxes = 26.0, [], []
    for i, (text, width) in enumerate(zip(drawing.main, main, strict=True)):
        wide = spread if (leaves or 0) <= i < joins else 0
        gaps.append(x + GAP / 2)
        boxes.append(_box(text, x + GAP + wide / 2, 4, width))
        x += GAP + wide + width
    gaps.append(x + GAP / 2)
    end, middle, low = x + GAP + 22, 4 + BOX / 2, 4 + BOX / 2 + ROW
    lines = [f"M22 {middle}H{end - 20}"]
    if drawing.joins is not None:
        to = gaps[joins]
        start = gaps[leaves] if leaves is not None else None
        lines.append(f"M{start} {middle}V{low}H{to}V{middle}" if start is not None else f"M{GAP} {low}H{to}V{middle}")
        x = (start if start is not None else 0.0) + GAP
        for text, width in zip(drawing.branch, branch, strict=True):
            boxes.append(_box(text, x, low - BOX / 2, width))
            x += width + GAP
        sign = drawing.how
        boxes.append(
            f'<circle cx="{to}" cy="{middle}" r="11"/><text x="{to}" y="{middle + 6}">+</text>'
            if sign == "+"
            else f'<text class="how-joined" x="{to + 10}" y="{middle + 34}">{escape(sign)}</text>'
        )
    height = (low + BOX / 2 if drawing.joins is not None else middle + BOX / 2) + 4
    flow, beside = (" → ".join(_spoken(t) for t in line) for line in (drawing.main, drawing.branch))
    said = f"{name}: {flow}" + (f"; beside it {beside}" if beside else "")
    return (
        f'<div class="wide"><svg class="data-path" role="img" aria-label="{escape(said)}" width="{end:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {end:.0f} {height:.0f}"><path d="{" ".join(lines)}"/>'
        f'<text x="11" y="{middle + 6}">x</text><text x="{end - 9}" y="{middle + 6}">h</text>{"".join(boxes)}</svg></div>'
    )


def _width(text: str) -> float:
    return 9 * len(text.lstrip("*~")) + 22


def _spoken(text: str) -> str:
    return f"trained {text[1:]}" if text[0] == "*" else text.lstrip("~")


def _box(text: str, x: float, y: float, width: float) -> str:
    meaning = {"*": "trained", "~": "operation"}.get(text[0], "frozen")
    return (
        f'<rect class="{meaning}" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{BOX}" rx="3"/>'
        f'<text x="{x + width / 2:.0f}" y="{y + BOX / 2 + 6:.0f}">{escape(text.lstrip("*~"))}</text>'
    )
