"""Attention that takes its mask as the kernels are fastest with: none at all, or one that is ready to be added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .. import seam

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

NAME = "peftlab"  # the name under which transformers knows our attention
ROWS = "peftlab_rows"
"""The attribute of a packed sequence's mask: (rows × width, the token at each place; for each token, its place there)."""


def take(model: Module) -> tuple[int, list[str]]:
    """Puts `attend` in place of sdpa in the configs of a private copy: (how many attend so, how the others do, in words)."""
    configs, looked_up = seam.configs_of(model), seam.attending_by_name(model)
    for config in configs:
        if seam.attention_of(config) == "sdpa" and id(config) in looked_up:
            seam.register_attention(NAME, attend, _mask)
            seam.set_attention(config, NAME)
    ways = [seam.attention_of(config) for config in configs]
    return ways.count(NAME), [f"masks of {way} attention" for way in sorted({*ways} - {NAME})]


def attend(
    module: Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, but the rows of a packed sequence are read side by side, and a single token's heads that share keys
    as so many tokens of one head. Queries are rows × heads × length × d; the output is rows × length × heads × d.
    """
    rows, heads, length, _ = query.shape
    if (packed := getattr(attention_mask, ROWS, None)) is not None:
        side, back = packed
        query, key, value = (
            x[0].index_select(1, side.flatten()).unflatten(1, side.shape).transpose(0, 1) for x in (query, key, value)
        )
        out, _ = seam.sdpa(module, query, key, value, None, **more)
        return out.flatten(0, 1).index_select(0, back)[None], None
    if attention_mask is None or length > 1 or any(more.get(name) is not None for name in ("softcap", "position_bias")):
        return seam.sdpa(module, query, key, value, attention_mask, **more)
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(grouped, key, value, attention_mask.to(query.dtype), scale=more.get("scaling"))
    return out.reshape(rows, 1, heads, -1), None


def _mask(**asked: Any) -> Tensor | None:
    """The mask for scaled_dot_product_attention; None where it would only be causal, while a graph is recorded too."""
    length, window = asked["q_length"], asked.get("local_size")
    whole = asked.get("attention_mask") is None and asked["kv_length"] == length and (not window or length < window)
    if whole and not asked.get("use_vmap") and recording():
        return None
    mask = seam.sdpa_mask(**asked)
    if mask is None or length > 1:
        return mask
    return torch.zeros_like(mask, dtype=asked["dtype"]).masked_fill_(~mask, -torch.inf)


def recording() -> bool:
    """Whether a CUDA graph is being recorded; transformers would always make a mask then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
