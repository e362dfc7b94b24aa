"""LoRA beside other methods and on other models: where each touches the data, the layer as code, percents by size."""

import math
from contextlib import suppress
from html import escape
from string import Template

import plotly.graph_objects as go

from .. import lectures, units
from ..base import architecture
from ..base.models import MODELS
from ..count import ParameterReport, count
from ..errors import SpecError
from ..lectures.by_counting import percents
from ..methods import METHODS
from ..methods.selection import where
from ..resolve import resolve
from ..spec import RunSpec
from .figures import PALETTE, Chart, blank, decades, themed
from .methods import data_path
from .shapes import of_family

FLOWS = {
    "lora": "In parallel: the update is added to what W computes.",
    "houlsby": "In series: a small network after each sub-layer, which the data must pass.",
    "ia3": "Scaling: one learned number multiplies each feature.",
    "prompt": "Virtual tokens: learned vectors before the text, at the input alone.",
    "prefix": "Virtual tokens in every layer: learned keys and values before the text's own.",
}
"""Where a method touches the data."""
NOTES = (
    (
        "It calls B (d × r) the down-projection and A (r × k) the up-projection. It is the other way round: A projects down to "
        "r numbers, B projects up again.",
        "lecture-11-2, The Low-Rank Adaptation Hypothesis",
    ),
    (
        "It says that the percentage stays constant across model scales. At a fixed rank it falls as a model widens, as "
        "r(d + k) / dk; only the lecture's own extrapolation is constant.",
        "lecture-11-2, LoRA Parameter Counts",
    ),
    (
        "What it calls the reduction factor, r(d + k) / dk, is the share that remains, not how many times fewer.",
        "lecture-11-2, LoRA: Parameter Count",
    ),
    (
        "2 · d · r for a weight is right for a square matrix only. In general it is r(d + k), and Llama 3.1 8B's v is "
        "1,024 × 4,096.",
        "vanderbilt-slides, LoRA flavors",
    ),
)
"""What the lectures say of LoRA without a number and how it is, each with its source."""
LECTURE = lectures.text("lecture_layer.txt")
"""Lecture 11-2, "LoRA Implementation", parts 1 and 2, with underscores and indents where scanning lost them."""
WHY = lectures.text("why_it_raises.md")
"""Why LECTURE raises, as Markdown."""


def notes() -> str:
    """NOTES as a list."""
    said = "".join(f"<li>{escape(text)} <small>{escape(source)}</small></li>" for text, source in NOTES)
    return f'<ul class="notes">{said}</ul>'


def flows(model: str) -> str:
    """Each way to change the forward pass, drawn, with what it trains on this model."""
    drawn = ""
    for key, says in FLOWS.items():
        try:
            report = count(resolve(RunSpec(model=model, method=key)))
            trains = f"{report.trainable_parameters:,} parameters: {units.percent(report.trainable_percent / 100)}"
        except SpecError as error:
            trains = escape(str(error))
        path = data_path(METHODS[key].drawing, METHODS[key].name)
        drawn += f"<section><h3>{METHODS[key].name}</h3>{path}<p>{says} <b>{trains}</b></p></section>"
    return f'<div class="flows">{drawn}</div>'


def code(spec: RunSpec) -> str:
    """A LoRA layer from scratch with the settings on screen, for the first matrix that they adapt."""
    of = resolve(of_family(spec))
    module = architecture.of(of.model).targets(of.target_modules, METHODS[of.method].low_rank)[0]
    d_in, d_out = module.features
    rank = min(of.rank, d_in, d_out)
    return lora_layer(d_in, d_out, rank, of.alpha or 2.0 * rank)  # VeRA has no alpha


def lora_layer(d_in: int, d_out: int, rank: int, alpha: float) -> str:
    """A complete script: the layer for a weight of d_out × d_in, checks of its start and its merging, and its size.

    It runs as it is and needs nothing but torch. Raises SpecError for sizes below 1, for a rank above the matrix's own and
    for an alpha that is not a positive number.
    """
    for name, size in (("d_in", d_in), ("d_out", d_out), ("rank", rank)):
        if size < 1:
            raise SpecError(f"{name}={size}: a matrix needs at least 1; try {8 if name == 'rank' else 64}")
    if rank > (limit := min(d_in, d_out)):
        raise SpecError(
            f"rank={rank}: this matrix has a rank of at most {limit}, so more is wasted; try {min(limit, 8)}"
        )
    if not 0 < alpha < math.inf:
        raise SpecError(f"alpha={alpha:g}: it must be more than 0; try {2 * rank}")
    shown = int(alpha) if alpha == int(alpha) else alpha
    return Template(lectures.text("lora_layer.txt")).substitute(d_in=d_in, d_out=d_out, rank=rank, alpha=shown)


def by_size(spec: RunSpec) -> dict[str, Chart]:
    """`percent_by_size` with the settings on screen, in both themes."""
    of = resolve(of_family(spec))
    return themed(percent_by_size, of.rank, of.target_modules, of.model)


def percent_by_size(rank: int, target_modules: str, marked: str, theme: str) -> go.Figure:
    """Percent that LoRA trains, in every layer, against a model's parameters: the catalogue, with `marked` in colour.

    A percent that the lecture gives for this rank and these modules is a dotted line, since the lecture holds it constant.
    Raises SpecError where LoRA does not suit `marked`.
    """
    c = PALETTE[theme]
    spec = RunSpec(model=marked, method="lora", rank=rank, target_modules=target_modules)
    mine, roles = count(resolve(spec)), _by_role(marked, target_modules)
    models = [*_others(spec.but(target_modules=roles)), mine]
    sizes, shares = [r.total_parameters for r in models], [r.trainable_percent for r in models]
    title = f"LoRA of rank {rank} on {where(mine.spec)}: % trained, by the model's size (log scales)"
    figure = blank(theme, 360, title=title)
    top = max(shares) * max(2, (max(shares) / min(shares)) ** 0.3)
    ends = [min(sizes) / 1.5, max(sizes) * 1.5]
    said = {n for n, r in percents() if r.rank == rank and _by_role(r.model or "", r.target_modules or "") == roles}
    for claimed in sorted(said):  # one number, whatever the size
        figure.add_scatter(
            x=ends, y=[claimed] * 2, mode="lines+markers+text", hoverinfo="skip",
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
            x=[r.total_parameters for r in reports], y=[r.trainable_percent for r in reports], mode="markers+text",
            marker={"color": c[colour], "size": size, "line": {"color": c["surface"], "width": 1}},
            # why these are far below the others
            text=["with experts " if architecture.of(r.spec.model).facts.experts else "" for r in reports],
            textposition="middle left",
            customdata=[_derived(r) for r in reports],
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(**decades(*ends), title_text="parameters of the model")
    return figure.update_yaxes(**decades(min(shares) / 1.4, top * 1.1))


def _by_role(model: str, target_modules: str) -> str:
    """The roles of the modules that one model names, which every family of models understands."""
    if target_modules == "all-linear":
        return target_modules
    found = architecture.of(model).targets(target_modules, low_rank=True)
    return ",".join(sorted({role for m in found for role in (m.role or m.short_name).split("+")}))


def _others(spec: RunSpec) -> list[ParameterReport]:
    """Counts of the catalogue's models that `spec` suits, without its own model and without copies of another's shapes."""
    shape = MODELS[spec.model].shape_of if spec.model in MODELS else None
    reports = []
    for key, entry in MODELS.items():
        if entry.config is not None and not entry.shape_of and key not in (spec.model, shape):
            with suppress(SpecError):  # it has no modules of these roles, or is too narrow for the rank
                reports.append(count(resolve(spec.but(model=key))))
    return reports


def _derived(report: ParameterReport) -> str:
    """How a model's percent comes about, for those who point at it."""
    rank, trained = report.spec.rank, report.trainable_parameters
    return (
        f"<b>{escape(report.model_name)}</b><br>{rank} × {trained // rank:,} inputs and outputs<br>"
        f"= {trained:,} trained,<br>{units.percent(report.trainable_percent / 100)} of {report.total_parameters:,}"
        + "".join(f"<br>({escape(text)})" for text in report.frozen)
    )
