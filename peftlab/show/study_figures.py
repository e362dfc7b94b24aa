"""Charts of what an adapter did to the weights: spectra, sizes by layer, shared subspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..compare.lowrank import Overlap, Spectrum
from ..compare.study import Study
from .figures import PALETTE, blank

if TYPE_CHECKING:
    import plotly.graph_objects as go

Spectra = Mapping[str, Spectrum]
Value = Callable[[Spectrum, int], float]
DASHES = ("solid", "dash", "dot", "dashdot")
"""These tell several updates apart, which all have the colour of what is trained."""


def energy(weight: Spectrum, deltas: Spectra, theme: str) -> go.Figure:
    """Share of the energy that the first r directions keep, in percent, for W and for each update by name."""
    hover = ": the first %{x} keep %{y:.1f}%"
    chart = _by_rank(weight, deltas, lambda of, r: 100 * of.energy(r), hover, theme)
    chart.update_traces(mode="lines")
    chart.add_hline(y=90, line={"color": PALETTE[theme]["overhead"], "width": 1.5, "dash": "dot"})
    chart.update_xaxes(title_text="r, directions")
    chart.update_yaxes(range=[0, 106], tickvals=[0, 25, 50, 75, 90, 100])
    legend = {"x": 0.99, "y": 0.02, "xanchor": "right", "yanchor": "bottom"}
    title = "Energy kept by the first r directions, % (r on a log scale)"
    return chart.update_layout(title=title, showlegend=True, legend=legend)


def singular_values(weight: Spectrum, deltas: Spectra, theme: str) -> go.Figure:
    """Singular values over the largest of each matrix, so that their shapes compare."""
    hover = ", number %{x}: %{y:.3g} of the largest"
    chart = _by_rank(weight, deltas, lambda of, r: of.values[r - 1] / of.values[0], hover, theme)
    chart.update_xaxes(title_text="number")
    chart.update_yaxes(type="log", tickvals=[1, 0.1, 0.01, 0.001], range=[-3.2, 0.1])
    return chart.update_layout(title="Singular values over the largest (log scales)")


def _by_rank(weight: Spectrum, deltas: Spectra, value: Value, hover: str, theme: str) -> go.Figure:
    """A line for W and one for each update: `value` of its spectrum by rank, on a log scale."""
    c, chart = PALETTE[theme], blank(theme, 360)
    looks = [{"color": c["frozen"], "width": 4}, *({"color": c["trained"], "width": 3, "dash": d} for d in DASHES)]
    for (name, of), line in zip({"W": weight, **deltas}.items(), looks, strict=False):
        ranks = _ranks(of.rank)
        chart.add_scatter(
            x=ranks, y=[value(of, r) for r in ranks], mode="lines+markers" if of.rank < 12 else "lines", name=name,
            line=line, hovertemplate=f"{name}{hover}<extra></extra>",
        )  # fmt: skip
    return chart.update_xaxes(type="log", range=[-0.03, 2.9], tickvals=[1, 2, 4, 8, 16, 64, 192, 576])


def _ranks(last: int) -> list[int]:
    """Every rank to 32, then ever fewer, and the last."""
    step, ranks = 1, [1]
    while ranks[-1] + step < last:
        ranks.append(ranks[-1] + step)
        step = max(1, ranks[-1] // 24)
    return [*ranks, last] if last > 1 else ranks


def sizes(studies: Mapping[str, Study], role: str, theme: str) -> go.Figure:
    """‖ΔW‖ / ‖W‖ by layer, in percent, for one kind of module."""
    chart = blank(theme, 320, title="Size of the update by layer: ‖ΔW‖ / ‖W‖, %")
    for (name, study), dash in zip(studies.items(), DASHES, strict=False):
        rows = [m for m in study.matrices if m.role == role and m.layer is not None]
        chart.add_scatter(
            x=[m.layer for m in rows], y=[100 * (m.relative_size or 0) for m in rows], mode="lines+markers", name=name,
            line={"color": PALETTE[theme]["trained"], "width": 3, "dash": dash},
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.2f}}%<extra></extra>",
        )  # fmt: skip
    chart.update_xaxes(title_text="layer")
    chart.update_yaxes(rangemode="tozero")
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return chart.update_layout(showlegend=len(studies) > 1, legend=legend)


def shared(overlap: Overlap, rows: str, columns: str, theme: str) -> go.Figure:
    """φ(i, j): how much of the first i directions of one update lies in the first j of the other, from 0 to 1."""
    c, (height, width) = PALETTE[theme], (len(overlap.grid), len(overlap.grid[0]))
    chart = blank(theme, 340, title="φ(i, j): what the two updates share, 0 to 1")
    chart.add_heatmap(
        z=overlap.grid, x=list(range(1, width + 1)), y=list(range(1, height + 1)), zmin=0, zmax=1,
        colorscale=[[0, c["surface"]], [1, c["trained"]]],
        colorbar={"thickness": 14, "tickvals": [0, 0.5, 1], "outlinewidth": 0},
        customdata=[[overlap.random(i, j) for j in range(1, width + 1)] for i in range(1, height + 1)],
        hovertemplate="φ(%{y}, %{x}) = %{z:.2f}; at random %{customdata:.3f}<extra></extra>",
    )  # fmt: skip
    chart.update_xaxes(title_text=f"j, of {columns}", showgrid=False)
    return chart.update_yaxes(title_text=f"i, of {rows}", showgrid=False)
