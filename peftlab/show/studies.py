"""What adapters did to the weights of the bundled model: one matrix, its updates, what these share, by layer."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from PIL import Image
from safetensors import safe_open

from .. import adapters, units
from ..base import architecture, fetching
from ..base.models import DEFAULT, MODELS
from ..compare import lowrank, study
from ..compare.study import MatrixStudy, Study
from ..data import tasks
from ..errors import PeftlabError, SpecError
from .figures import DASHES, PALETTE, Chart, blank, themed
from .marks import bold, how, table
from .methods import paper_link

if TYPE_CHECKING:
    from torch import Tensor

Spectra = Mapping[str, lowrank.Spectrum]
SHOWN = ("ticket-lora-r8", "ticket-lora-r64", "ticket-full")
"""Bundled adapters of one task and the same matrices, each of its own seed: the smallest rank first, full fine-tuning last."""
SHARE = 0.9
"""The sentence compares how many directions keep this share of the energy."""
LOOK = (
    (
        "Spectrum", "W's curve rises slowly: no few directions hold it. The update's rises at once.",
        "energy(r) = Σᵢ₌₁ʳ σᵢ² / Σ σᵢ²", "lora", "section 7.2",
    ),
    (
        "Best rank r", "No matrix of rank r is nearer to W than its r largest singular directions.",
        "W_r = Σᵢ₌₁ʳ σᵢ uᵢ vᵢᵀ, with ‖W − W_r‖² = Σᵢ>ᵣ σᵢ²", "", "Eckart and Young (1936)",
    ),
    (
        "Shared subspace",
        "1 where the smaller subspace lies in the larger; two random ones of ℝⁿ share max(i, j) / n. Left singular vectors: "
        "what an update writes into, for B starts at zero, while two runs of one seed start from the same A.",
        "φ(i, j) = ‖Aᵢᵀ Bⱼ‖² / min(i, j)", "lora", "section 7.2, appendix G",
    ),
    (
        "Amplification",
        "How much louder the update is than W in the update's own directions; compare the factor for random ones.",
        "‖ΔW‖ / ‖Uᵀ W V‖, with U, V the top directions of ΔW", "lora", "section 7.3, table 7",
    ),
    (
        "Intruder dimensions",
        "Top directions of the tuned matrix that the base has nothing like: no singular vector within a cosine of 0.5.",
        "maxᵢ |cos(u′ⱼ, uᵢ)| < 0.5", "intruders", "section 3",
    ),
)  # fmt: skip
"""Each picture's name, what it shows, its formula, and the paper and section it follows."""


@lru_cache(maxsize=1)
def bundled() -> dict[str, Study]:
    """The studies of SHOWN, by the names they are shown by."""
    found = (Study.from_dict(json.loads((adapters.BUNDLED / name / study.FILE).read_text())) for name in SHOWN)
    return {
        "full fine-tuning" if s.method == "full" else f"LoRA, rank {max(m.delta.rank for m in s.matrices)}": s
        for s in found
    }


def studies(mine: Study | None) -> dict[str, Study]:
    """Every study by name, a visitor's own first."""
    return {**({"yours": mine} if mine else {}), **bundled()}


def roles(mine: Study | None) -> list[str]:
    """Kinds of module that any study has a matrix of."""
    every = {**bundled(), **studies(mine)}  # the bundled ones first
    return list(dict.fromkeys(m.role for s in every.values() for m in s.matrices))


def about() -> str:
    """Which updates are shown, and how well each learned the task."""
    made = [adapters.read(adapters.BUNDLED / name) for name in SHOWN]
    task = tasks.find(made[0].spec.task or tasks.DEFAULT)
    said = ", ".join(
        f"{name} ({units.score(a.result['eval']['after'][task.metric])}, after {a.spec.steps:,} steps)"
        for name, a in zip(bundled(), made, strict=True)
    )
    return (
        f"{escape(MODELS[DEFAULT].name)}, its weights and what three runs on one task changed of them, each with the share of "
        f"{made[0].result['eval']['items']} held-out items that it then got right: {said}."
    )


def changed(mine: Study | None, role: str, layer: int) -> dict[str, MatrixStudy]:
    """What each study has of one matrix. Raises SpecError where none has it."""
    here = {name: m for name, s in studies(mine).items() for m in s.matrices if m.role == role and m.layer == layer}
    if not here:
        raise SpecError(f"matrix={role}: no studied adapter changes it in layer {layer}; try {roles(mine)[0]}")
    return here


def pictures(mine: Study | None, role: str, layer: int) -> dict[str, object]:
    """Sentence, four charts and a table for one matrix, of the bundled studies and a visitor's own, by panel."""
    here, every = changed(mine, role, layer), studies(mine)
    weight = next(iter(here.values())).weight
    deltas = {name: m.delta for name, m in here.items()}
    shared, said = _shared(here)
    return {
        "study": _sentence(role, layer, weight, deltas),
        "energy": themed(energy, weight, deltas),
        "singular_values": themed(singular_values, weight, deltas),
        "update_sizes": themed(sizes, {name: every[name] for name in here}, role),
        "shared": shared,
        "shared_said": said,
        "matrix_table": _table(here, every, role),
    }


def _sentence(role: str, layer: int, weight: lowrank.Spectrum, deltas: Spectra) -> str:
    """How many directions hold SHARE of the energy of W, and of each update by name."""
    most = weight.rank_for(SHARE)
    needs = {name: delta.rank_for(SHARE) for name, delta in deltas.items()}
    said = ", ".join(f"of {escape(name)} {bold(str(n), 'trained')}" for name, n in needs.items())
    widest = max(needs.values())
    end = (
        f"Only the updates are low-rank: W needs {units.significant(most / widest, 2)} times as many as the widest of them."
        if widest < most / 2
        else "Not every update here is low-rank."
    )
    return (
        f"{units.percent(SHARE)} of the energy of layer {layer}'s {escape(role)} matrix needs {bold(str(most), 'frozen')} of "
        f"its {len(weight.values)} directions; of the update {said}. {end}"
    )


def _shared(here: dict[str, MatrixStudy]) -> tuple[dict[str, Chart] | None, str]:
    """What two updates share, as a chart and in words: the visitor's or the smallest, and the one after it."""
    kept = [(name, m.directions) for name, m in here.items() if m.directions]
    if len(kept) < 2:
        return None, ""
    (a, of_a), (b, of_b) = kept[:2]
    overlap = lowrank.overlap(of_a, of_b, "left")  # B starts at zero, and A may have started alike in both
    i, j = len(overlap.grid), len(overlap.grid[0])
    said = (
        f"What {escape(a)} and {escape(b)} write into: φ({i}, {j}) is "
        f"<b>{overlap.grid[-1][-1]:.2f}</b>; random subspaces of {overlap.n} dimensions would share {overlap.random(i, j):.3f}."
    )
    return themed(shared, overlap, a, b), said


def _table(here: dict[str, MatrixStudy], every: dict[str, Study], role: str) -> str:
    """What each study finds of the matrix, a column for each."""

    def factor(value: float | None) -> str:
        return "none" if value is None else f"{units.significant(value)}×"

    matrices = here.values()
    alike = [[m.intruders for m in every[name].matrices if m.role == role] for name in here]
    rows = {
        "rank of ΔW": [f"{m.delta.rank}" for m in matrices],
        "‖ΔW‖ / ‖W‖": [units.percent(m.relative_size or 0) for m in matrices],
        "amplification": [factor(m.amplification.factor) for m in matrices],
        "amplification of random directions": [factor(m.amplification.factor_of_random) for m in matrices],
        "intruders among its top 10": [f"{len(m.intruders.directions)}" for m in matrices],
        "intruders in all layers": [f"{sum(len(i.directions) for i in layers)}" for layers in alike],
    }
    mark = how("exact", "From singular value decompositions of the real weights; python -m peftlab study makes them.")
    return table((mark, *map(escape, here)), [(name, *values) for name, values in rows.items()])


def look() -> str:
    """What each of these pictures shows, its formula and its source."""
    said = ""
    for name, shows, formula, paper, section in LOOK:
        source = f"{paper_link(paper)}, {section}" if paper else section
        said += f"<dt>{name}</dt><dd>{shows}<br><code>{escape(formula)}</code> <small>{source}</small></dd>"
    return f'<dl class="look">{said}</dl>'


@lru_cache(maxsize=1)
def telling() -> int:
    """The layer that the smallest adapter changes most, of the matrix that is shown first."""
    smallest = [m for m in next(iter(bundled().values())).matrices if m.role == roles(None)[0]]
    return max(smallest, key=lambda m: m.relative_size or 0).layer or 0


def energy(weight: lowrank.Spectrum, deltas: Spectra, theme: str) -> go.Figure:
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


def singular_values(weight: lowrank.Spectrum, deltas: Spectra, theme: str) -> go.Figure:
    """Singular values over the largest of each matrix, so that their shapes compare."""
    hover = ", number %{x}: %{y:.3g} of the largest"
    chart = _by_rank(weight, deltas, lambda of, r: of.values[r - 1] / of.values[0], hover, theme)
    chart.update_xaxes(title_text="number")
    chart.update_yaxes(type="log", tickvals=[1, 0.1, 0.01, 0.001], range=[-3.2, 0.1])
    return chart.update_layout(title="Singular values over the largest (log scales)")


def _by_rank(
    weight: lowrank.Spectrum, deltas: Spectra, value: Callable[[lowrank.Spectrum, int], float], hover: str, theme: str
) -> go.Figure:
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
    for (name, of), dash in zip(studies.items(), DASHES, strict=False):
        rows = [m for m in of.matrices if m.role == role and m.layer is not None]
        chart.add_scatter(
            x=[m.layer for m in rows], y=[100 * (m.relative_size or 0) for m in rows], mode="lines+markers", name=name,
            line={"color": PALETTE[theme]["trained"], "width": 3, "dash": dash},
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.2f}}%<extra></extra>",
        )  # fmt: skip
    chart.update_xaxes(title_text="layer")
    chart.update_yaxes(rangemode="tozero")
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return chart.update_layout(showlegend=len(studies) > 1, legend=legend)


def shared(overlap: lowrank.Overlap, rows: str, columns: str, theme: str) -> go.Figure:
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


def is_here() -> bool:
    """Whether the weights of the bundled base are on this disk."""
    return fetching.source_of(MODELS[DEFAULT]) is not None


@lru_cache(maxsize=8)
def _decomposed(role: str, layer: int) -> tuple[Tensor, lowrank.Factors]:
    """W of the bundled base, d_out × d_in, and its singular value decomposition. One matrix is read, not the whole model.

    Raises PeftlabError where the weights on this disk have no such matrix.
    """
    kinds = [m for m in architecture.of(DEFAULT).linear() if m.role == role]
    name = next((f"{name}.weight" for m in kinds for number, name in m.names() if number == layer), "")
    for file in sorted(fetching.folder_of(MODELS[DEFAULT]).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  it is no dict
                weight = tensors.get_tensor(name).float()
                return weight, lowrank.factors(weight)
    raise PeftlabError(f"{MODELS[DEFAULT].name} has no {role} of layer {layer} on this disk; choose another one")


def images(role: str, layer: int, rank: int) -> str:
    """W beside its best approximation of a rank, number for number. It takes seconds, and a process of its own."""
    weight, found = _decomposed(role, layer)
    rank = min(int(rank), len(found.s))
    near, off = lowrank.best(found, rank)
    limit, (d_out, d_in) = 3 * float(weight.std()), weight.shape

    def shown(matrix: Tensor, caption: str, spoken: str) -> str:
        source = picture(matrix, limit, PALETTE["light"]["frozen"])
        return f'<figure><img src="{source}" alt="{spoken}"><figcaption>{caption}</figcaption></figure>'

    whole = shown(weight, f"<b>W</b>, {d_out} × {d_in}", f"{d_out} by {d_in} numbers without a visible pattern")
    caption = f"<b>the nearest of rank {rank}</b>: off by {units.percent(off)} of ‖W‖"
    nearest = shown(near, caption, f"the nearest matrix of rank {rank}, which is off by {units.percent(off)}")
    return f'<div class="weight-pictures">{whole}{nearest}</div>'


def picture(matrix: Tensor, limit: float, colour: str) -> str:
    """A matrix as a PNG in a data URI, a pixel a number: clear at 0, the palette's `colour` at ±`limit` and beyond."""
    import torch

    strength = (matrix.float().abs() / limit).clamp(max=1) * 255
    image = torch.empty((*matrix.shape, 4), dtype=torch.uint8)
    image[..., :3] = torch.tensor(list(bytes.fromhex(colour[1:])), dtype=torch.uint8)
    image[..., 3] = strength.to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(image.numpy(), "RGBA").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
