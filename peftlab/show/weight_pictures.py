"""W of the bundled base as a picture, beside its best approximation. The process for long work imports this."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .. import units
from ..base import architecture, weights
from ..base.models import DEFAULT, MODELS
from ..compare import lowrank
from ..errors import PeftlabError
from . import figures
from .study_figures import picture


def is_here() -> bool:
    """Whether the weights of the bundled base are on this disk."""
    return weights.source_of(MODELS[DEFAULT]) is not None


@lru_cache(maxsize=8)
def _decomposed(role: str, layer: int) -> tuple[Any, lowrank.Factors]:
    """W of the bundled base, and its singular value decomposition. One matrix is read, not the whole model."""
    from safetensors import safe_open

    kinds = [m for m in architecture.of(DEFAULT).linear() if m.role == role]
    name = next((f"{name}.weight" for m in kinds for number, name in m.names() if number == layer), "")
    for file in sorted(weights.folder_of(MODELS[DEFAULT]).glob("*.safetensors")):
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
    limit = 3 * float(weight.std())
    colour = figures.PALETTE["light"]["frozen"]

    def shown(matrix: Any, text: str, said: str) -> str:
        source = picture(matrix, limit, colour)
        return f'<figure><img src="{source}" alt="{said}"><figcaption>{text}</figcaption></figure>'

    d_out, d_in = weight.shape
    return (
        '<div class="weight-pictures">'
        + shown(weight, f"<b>W</b>, {d_out} × {d_in}", f"{d_out} by {d_in} numbers without a visible pattern")
        + shown(
            near, f"<b>the nearest of rank {rank}</b>: off by {units.percent(off)} of ‖W‖",
            f"the nearest matrix of rank {rank}, which is off by {units.percent(off)}",
        )
        + "</div>"
    )  # fmt: skip
