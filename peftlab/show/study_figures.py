"""Charts of what an adapter did to the weights: spectra, sizes by layer, shared subspaces; and matrices as pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..compare.lowrank import Overlap, Spectrum
from ..compare.study import Study
from .figures import PALETTE, blank

if TYPE_CHECKING:
    from torch import Tensor

DASHES = ("solid", "dash", "dot", "dashdot")
"""Of several updates, which all have the colour of what is trained."""


def energy(weight: Spectrum, deltas: Mapping[str, Spectrum], theme: str) -> Any:
    """Share of the energy that the first r directions keep, of W and of each update by name."""
    c = PALETTE[theme]
    chart = blank(theme, 360, title={"text": "Energy kept by the first r directions, % (r on a log scale)"})
    for name, of, ranks, line in _lines(weight, deltas, c):
        chart.add_scatter(
            x=ranks,
            y=[100 * of.energy(r) for r in ranks],
            mode="lines",
            name=name,
            line=line,
            hovertemplate=f"{name}: the first %{{x}} keep %{{y:.1f}}%<extra></extra>",
        )
    chart.add_hline(y=90, line={"color": c["overhead"], "width": 1.5, "dash": "dot"})
    chart.update_xaxes(
        type="log", title_text="r, directions", range=[-0.03, 2.9], tickvals=[1, 2, 4, 8, 16, 64, 192, 576]
    )
    chart.update_yaxes(range=[0, 106], tickvals=[0, 25, 50, 75, 90, 100])
    chart.update_layout(showlegend=True, legend={"x": 0.99, "y": 0.02, "xanchor": "right", "yanchor": "bottom"})
    return chart


def _lines(weight: Spectrum, deltas: Mapping[str, Spectrum], colours: Mapping[str, str]) -> Iterator[tuple]:
    """W and each update: name, spectrum, the ranks to draw, and how its line looks."""
    yield "W", weight, _ranks(weight.rank), {"color": colours["frozen"], "width": 4}
    for (name, delta), dash in zip(deltas.items(), DASHES, strict=False):
        yield name, delta, _ranks(delta.rank), {"color": colours["trained"], "width": 3, "dash": dash}


def _ranks(last: int) -> list[int]:
    """Every rank to 32, then ever fewer, and the last."""
    step, ranks = 1, [1]
    while ranks[-1] + step < last:
        ranks.append(ranks[-1] + step)
        step = max(1, ranks[-1] // 24)
    return [*ranks, last] if last > 1 else ranks


def singular_values(weight: Spectrum, deltas: Mapping[str, Spectrum], theme: str) -> Any:
    """Singular values over the largest of each matrix, so that their shapes compare."""
    c = PALETTE[theme]
    chart = blank(theme, 360, title={"text": "Singular values over the largest (log scales)"})
    for name, of, ranks, line in _lines(weight, deltas, c):
        chart.add_scatter(
            x=ranks,
            y=[of.values[r - 1] / of.values[0] for r in ranks],
            mode="lines+markers" if of.rank < 12 else "lines",
            name=name,
            line=line,
            hovertemplate=f"{name}, number %{{x}}: %{{y:.3g}} of the largest<extra></extra>",
        )
    chart.update_xaxes(type="log", title_text="number", range=[-0.03, 2.9], tickvals=[1, 2, 4, 8, 16, 64, 192, 576])
    chart.update_yaxes(type="log", tickvals=[1, 0.1, 0.01, 0.001], range=[-3.2, 0.1])
    return chart


def sizes(studies: Mapping[str, Study], role: str, theme: str) -> Any:
    """‖ΔW‖ / ‖W‖ by layer, for one kind of module."""
    c = PALETTE[theme]
    chart = blank(theme, 320, title={"text": "Size of the update by layer: ‖ΔW‖ / ‖W‖, %"})
    for (name, study), dash in zip(studies.items(), DASHES, strict=False):
        rows = [m for m in study.matrices if m.role == role and m.layer is not None]
        chart.add_scatter(
            x=[m.layer for m in rows],
            y=[100 * (m.relative_size or 0) for m in rows],
            mode="lines+markers",
            name=name,
            line={"color": c["trained"], "width": 3, "dash": dash},
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.2f}}%<extra></extra>",
        )
    chart.update_xaxes(title_text="layer")
    chart.update_yaxes(rangemode="tozero")
    chart.update_layout(
        showlegend=len(studies) > 1, legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    )
    return chart


def shared(overlap: Overlap, rows: str, columns: str, theme: str) -> Any:
    """φ(i, j): how much of the first i directions of one update lies in the first j of the other."""
    c = PALETTE[theme]
    chart = blank(theme, 340, title={"text": "φ(i, j): what the two updates share, 0 to 1"})
    chart.add_heatmap(
        z=overlap.grid,
        x=list(range(1, len(overlap.grid[0]) + 1)),
        y=list(range(1, len(overlap.grid) + 1)),
        zmin=0,
        zmax=1,
        colorscale=[[0, c["surface"]], [1, c["trained"]]],
        colorbar={"thickness": 14, "tickvals": [0, 0.5, 1], "outlinewidth": 0},
        customdata=[[overlap.random(i + 1, j + 1) for j in range(len(row))] for i, row in enumerate(overlap.grid)],
        hovertemplate="φ(%{y}, %{x}) = %{z:.2f}; at random %{customdata:.3f}<extra></extra>",
    )
    chart.update_xaxes(title_text=f"j, of {columns}", showgrid=False)
    chart.update_yaxes(title_text=f"i, of {rows}", showgrid=False)
    return chart


def picture(matrix: Tensor, limit: float, colour: str) -> str:
    """A matrix as a PNG in a data URI, a pixel a number: none at 0, the palette's `colour` at ±`limit` and beyond."""
    import torch
    from PIL import Image

    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    strength = (matrix.float().abs() / limit).clamp(max=1) * 255
    image = torch.empty((*matrix.shape, 4), dtype=torch.uint8)
    image[..., 0], image[..., 1], image[..., 2], image[..., 3] = red, green, blue, strength.to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(image.numpy(), "RGBA").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
