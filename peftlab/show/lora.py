"""LoRA beside other methods, in words: where each touches the data, what the lectures say, and the layer as code."""

from __future__ import annotations

from html import escape

from .. import units
from ..base import architecture
from ..count import count
from ..errors import SpecError
from ..lectures import scratch
from ..methods import METHODS
from ..resolve import resolve
from ..spec import RunSpec
from .figures import Chart, themed
from .lora_figures import percent_by_size
from .method_figures import data_path
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


def notes() -> str:
    """NOTES as a list."""
    said = "".join(f"<li>{escape(text)} <small>{escape(source)}</small></li>" for text, source in NOTES)
    return f'<ul class="notes">{said}</ul>'


def flows(model: str) -> str:
    """Each way to change the forward pass, drawn, with what it trains on this model."""
    return f'<div class="flows">{"".join(_flow(model, key, says) for key, says in FLOWS.items())}</div>'


def _flow(model: str, key: str, says: str) -> str:
    try:
        report = count(resolve(RunSpec(model=model, method=key)))
        trains = f"{report.trainable_parameters:,} parameters: {units.percent(report.trainable_percent / 100)}"
    except SpecError as error:
        trains = escape(str(error))
    method = METHODS[key]
    drawn = data_path(method.drawing, method.name)
    return f"<section><h3>{method.name}</h3>{drawn}<p>{says} <b>{trains}</b></p></section>"


def code(spec: RunSpec) -> str:
    """A LoRA layer from scratch with the settings on screen, for the first matrix that they adapt."""
    of = resolve(of_family(spec))
    module = architecture.of(of.model).targets(of.target_modules)[0]
    rank = min(of.rank, module.d_in, module.d_out)
    return scratch.lora_layer(module.d_in, module.d_out, rank, of.alpha or 2.0 * rank)  # VeRA has no alpha


def by_size(spec: RunSpec) -> dict[str, Chart]:
    """`percent_by_size` with the settings on screen, in both themes."""
    of = resolve(of_family(spec))
    return themed(percent_by_size, of.rank, of.target_modules, of.model)
