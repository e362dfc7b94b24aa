"""Attention that takes its mask as the kernels want it: not at all, or ready to be added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .. import seam

if TYPE_CHECKING:
    from torch import Tensor

NAME = "peftlab"
"""Our name among transformers' ways to attend."""
ROWS = "peftlab_rows"
"""The attribute of a mask that says which tokens of a packed sequence make which row: (rows × width, place of each token among
all those)."""


@dataclass(frozen=True)
class Masks:
    taken: int
    others: Counter[str]
    """How the other configs attend."""

    def kept(self) -> Iterator[str]:
        for name in sorted(self.others):
            yield f"masks of {name} attention"


def take(model: Any) -> Masks:
    """Has the configs of a private copy that attend by sdpa attend by `attend`."""
    ways = Counter[str]()
    for config in seam.configs_of(model):
        ways[way := seam.attention_of(config)] += 1
        if way == "sdpa":
            _register()
            seam.set_attention(config, NAME)
    return Masks(ways.pop("sdpa", 0) + ways.pop(NAME, 0), ways)


@cache
def _register() -> None:
    seam.register_attention(NAME, attend, _mask)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """transformers' own, but that the heads of a single token which share keys are read as that many tokens of one head."""
    rows, heads, length, _ = query.shape
    if (packed := getattr(mask, ROWS, None)) is not None:
        side, back = packed
        apart = (
            x[0].index_select(1, side.flatten()).unflatten(1, side.shape).transpose(0, 1) for x in (query, key, value)
        )
        out, _ = seam.sdpa(module, *apart, None, **more)
        return out.flatten(0, 1).index_select(0, back)[None], None
    if mask is None or length > 1 or any(more.get(name) is not None for name in ("softcap", "position_bias")):
        return seam.sdpa(module, query, key, value, mask, **more)
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(grouped, key, value, mask.to(query.dtype), scale=more.get("scaling"))
    return out.reshape(rows, 1, heads, -1), None


def _mask(**asked: Any) -> Tensor | None:
    """Of scaled_dot_product_attention: None where it is causal and no more, as transformers has it outside of recordings."""
    length, window = asked["q_length"], asked.get("local_size")
    whole = asked.get("attention_mask") is None and asked["kv_length"] == length and (not window or length < window)
    if whole and not asked.get("use_vmap") and recording():
        return None
    mask = seam.sdpa_mask(**asked)
    if mask is None or length > 1:
        return mask
    return torch.zeros_like(mask, dtype=asked["dtype"]).masked_fill_(~mask, -torch.inf)


def recording() -> bool:
    """Whether a CUDA graph is being recorded here, in which transformers always makes a mask."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
