"""The chart of memory through one training step.

Every click on Memory draws it anew, so it is made as plain JSON: plotly's own objects take ten times as long.
"""

from __future__ import annotations

from .. import units
from ..memory import MemoryReport, Moment
from .figures import PALETTE, Chart, look

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
"""Each kind of allocated memory with its colour in the palette and its name."""


def memory_timeline(report: MemoryReport, theme: str) -> Chart:
    """Allocated memory through one training step, stacked by kind, with the peak marked. The report must have moments."""
    wide = max(1.0, len(report.moments) / 16)  # the optimizer is one moment, and would be a hairline
    points = [(float(i), m) for i, m in enumerate(report.moments)]
    points += [(x + wide, m) for x, m in points[-1:] if m.phase == "optimizer"]
    end = points[-1][0]
    at, peak = max(points, key=lambda point: point[1].total)
    mark = {
        "x": at, "y": peak.total / 1e9, "text": f"<b>peak {units.size(peak.total)}</b><br>{_place(peak, report)}",
        "showarrow": True, "ax": 0, "ay": -34, "arrowcolor": PALETTE[theme]["text"],
        "xanchor": "right" if at > 0.8 * end else "left" if at < 0.2 * end else "center",
    }  # fmt: skip
    phases = list(dict.fromkeys(m.phase.split()[0] for m in report.moments))
    places = [[x for x, m in points if m.phase.startswith(phase)] for phase in phases]
    layout = {
        "template": {"layout": look(theme)}, "height": 320, "hovermode": "x unified", "annotations": [mark],
        "title": {"text": "Through one training step: allocated memory, GB"},
        "xaxis": {
            "tickvals": [(min(xs) + max(xs)) / 2 for xs in places], "ticktext": phases, "showgrid": False,
            "range": [0, end],
        },
        "yaxis": {"range": [0, 1.28 * peak.total / 1e9], "rangemode": "tozero"},
    }  # fmt: skip
    return {"data": _areas(points, report, theme), "layout": layout}


def _areas(points: list[tuple[float, Moment]], report: MemoryReport, theme: str) -> list[Chart]:
    """A stacked area for each kind that has bytes at any point; the lowest one also tells where in the step a point is."""
    areas: list[Chart] = []
    for kind, colour, name in COMPONENTS:
        values = [m.bytes.get(kind, 0) for _, m in points]
        if any(values):
            areas.append({
                "type": "scatter", "mode": "lines", "stackgroup": "memory", "name": name,
                "fillcolor": PALETTE[theme][colour],
                "line": {"width": 0.5, "color": PALETTE[theme][colour], "shape": "linear"},
                "x": [x for x, _ in points],
                "y": [v / 1e9 for v in values],
                "customdata": [units.size(v) for v in values],
                "hovertemplate": "%{customdata}",
            })  # fmt: skip
    areas[0] |= {
        "text": [_place(m, report) for _, m in points],
        "hovertemplate": "<b>%{text}</b><br>%{customdata}",
    }
    return areas


def _place(moment: Moment, report: MemoryReport) -> str:
    """Where in a step a moment is: `forward, layer 3`. A closed form knows the phase only."""
    if report.source != "trace" or moment.phase == "optimizer":
        return moment.phase
    depth = max(m.part for m in report.moments)
    part = "embedding" if moment.part < 0 else "head and loss" if moment.part == depth else f"layer {moment.part + 1}"
    return f"{moment.phase}, {part}"
