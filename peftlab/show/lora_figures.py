"""The chart of what LoRA trains of each model in the catalogue, in percent, by the model's size."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from .. import units
from ..base import architecture as architectures
from ..base.models import MODELS
from ..count import ParameterReport, count
from ..errors import SpecError
from ..lectures.recomputed import percents
from ..methods.selection import where
from ..resolve import resolve
from ..spec import RunSpec
from .figures import PALETTE, blank, decades

if TYPE_CHECKING:
    import plotly.graph_objects as go


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
    for claimed in _claimed_percents(rank, roles):
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
            text=["with experts " if _experts(r) else "" for r in reports],  # why these are far below the others
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
    found = architectures.of(model).targets(target_modules)
    return ",".join(sorted({role for m in found for role in (m.role or m.short_name).split("+")}))


def _others(spec: RunSpec) -> list[ParameterReport]:
    """Counts of the catalogue's models that `spec` suits, without its own model and without copies of another's shapes."""
    shape = MODELS[spec.model].shape_of if spec.model in MODELS else None
    reports = []
    for key, entry in MODELS.items():
        if entry.config is None or entry.shape_of or key in (spec.model, shape):
            continue
        try:
            reports.append(count(resolve(spec.but(model=key))))
        except SpecError:  # it has no modules of these roles, or is too narrow for the rank
            continue
    return reports


def _claimed_percents(rank: int, roles: str) -> list[float]:
    """What the lecture gives for LoRA of this rank on modules of these roles: one number, whatever the size."""
    return sorted(
        {n for n, r in percents() if r.rank == rank and _by_role(r.model or "", r.target_modules or "") == roles}
    )


def _experts(report: ParameterReport) -> int:
    return architectures.of(report.spec.model).facts.experts


def _derived(report: ParameterReport) -> str:
    """How a model's percent comes about, for those who point at it."""
    rank, trained = report.spec.rank, report.trainable_parameters
    return (
        f"<b>{escape(report.model_name)}</b><br>{rank} × {trained // rank:,} inputs and outputs<br>"
        f"= {trained:,} trained,<br>{units.percent(report.trainable_percent / 100)} of {report.total_parameters:,}"
        + ("<br>(its experts get no adapter)" if _experts(report) else "")
    )
