"""W of the bundled base as an image, beside its best approximation. The process for long work imports this."""

import base64
import io
from functools import lru_cache

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from .. import units
from ..base import architecture, fetching
from ..base.models import DEFAULT, MODELS
from ..compare import lowrank
from ..errors import PeftlabError
from .figures import PALETTE


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
    strength = (matrix.float().abs() / limit).clamp(max=1) * 255
    image = torch.empty((*matrix.shape, 4), dtype=torch.uint8)
    image[..., :3] = torch.tensor(list(bytes.fromhex(colour[1:])), dtype=torch.uint8)
    image[..., 3] = strength.to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(image.numpy(), "RGBA").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
