"""A prefix in the cache of a model whose layers keep unlike things, which peft's one shape for all of them does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, dtype, nn

from .. import caches, seam
from ..errors import SpecError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Kept:
    """What the cache of one layer keeps of a token."""

    layer: int
    heads: tuple[int, int]
    """Heads of the keys and of the values; one of the latents that a low-rank attention keeps instead."""
    sizes: tuple[int, int]
    """Numbers in a head of the keys and of the values."""
    indexed: int
    """Numbers by which an indexer finds the token; 0 where there is no indexer."""

    @property
    def widths(self) -> tuple[int, int]:
        return self.heads[0] * self.sizes[0], self.heads[1] * self.sizes[1]


def layers_of(held: Cache | None) -> list[Any]:
    """The layers of a cache; BERT as a decoder keeps room for those of an encoder beside."""
    return getattr(getattr(held, "self_attention_cache", held), "layers", [])


def numbers(held: Cache | None) -> Tensor | None:
    """The keys and values in a cache, tokens × the sum of all widths; None where a window keeps fewer than all tokens."""
    layers = [layer for layer in layers_of(held) if getattr(layer, "keys", None) is not None]
    parts = [t[0].transpose(0, 1).flatten(1) for layer in layers for t in (layer.keys, layer.values)]
    return torch.cat(parts, 1) if len({len(part) for part in parts}) == 1 else None


def _kept(layers: list[Any]) -> list[Kept]:
    """What each of a cache's layers keeps of a token, layers without keys left out."""
    found = []
    for n, layer in enumerate(layers):
        if (keys := getattr(layer, "keys", None)) is not None:
            heads, sizes = zip(*((t.shape[1], t.shape[3]) for t in (keys, layer.values)), strict=True)
            index = getattr(layer, "indexer_keys", None)
            found.append(Kept(n, heads, sizes, 0 if index is None else index.shape[-1]))
    return found


def attach(model: PreTrainedModel, tokens: int, width: int, type_: dtype) -> PreTrainedModel:
    """The model with a parameter `prefix`, tokens × width, which stands before each text in its cache.

    It starts from the keys and values of random tokens. Raises SpecError where the layers keep another number than `width`.
    """
    vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
    ids = torch.randint(0, vocabulary, (1, tokens)).to(model.device)
    with torch.no_grad():
        _, held = seam.read(model.eval(), None, input_ids=ids)
    layout = _kept(layers_of(held))
    if (found := sum(sum(kept.widths) for kept in layout)) != width:
        name = type(model).__name__
        raise SpecError(
            f"method=prefix: {name} keeps {found:,} numbers for a token, not {width:,} as its maps say; use prompt"
        )
    if any(getattr(layer, "indexer_position_ids", None) is not None for layer in layers_of(held)):
        raise SpecError(
            f"method=prefix: the indexer of {type(model).__name__} asks where each token stands; use prompt"
        )
    start = numbers(held)
    noise = torch.randn(tokens, width, device=model.device) if start is None or len(start) != tokens else start
    model.register_parameter("prefix", nn.Parameter(noise.detach().to(type_, copy=True)))
    model.register_forward_pre_hook(partial(_begin, layout=layout), with_kwargs=True)
    return model


def _begin(model: PreTrainedModel, args: Any, inputs: dict[str, Any], layout: list[Kept]) -> tuple[Any, dict[str, Any]]:
    """The inputs of a text that begins after the prefix, whose tokens take the first positions."""
    prefix, name = model.get_parameter("prefix"), seam.cache_name()
    tokens, (mask, positions) = len(prefix), (inputs.get(place) for place in seam.PLACES)
    if mask is not None:
        inputs |= {seam.PLACES[0]: torch.cat([mask.new_ones(len(mask), tokens), mask], 1)}
    if positions is not None:
        inputs |= {seam.PLACES[1]: positions + tokens}
    if inputs.get(name) is None:
        inputs |= {name: _filled(model, prefix.to(model.dtype), layout, len(inputs["input_ids"]))}
    return args, inputs


def _filled(model: PreTrainedModel, prefix: Tensor, layout: list[Kept], rows: int) -> Cache:
    """A cache that holds `prefix` for each of `rows`. States of another kind are empty.

    To an indexer its tokens are zeros: they score 0, and all are seen while the text is no longer than what it lets through.
    """
    held: Any = caches.empty_cache(model)
    for kept, part in zip(layout, prefix.split([sum(kept.widths) for kept in layout], 1), strict=True):
        both = zip(part.split(kept.widths, 1), kept.heads, strict=True)
        keys, values = (t.unflatten(1, (n, -1)).transpose(0, 1).expand(rows, -1, -1, -1) for t, n in both)
        held.update(keys, values, kept.layer)
        if kept.indexed:
            held.layers[kept.layer].update_indexer(prefix.new_zeros(rows, len(prefix), kept.indexed))
    return held
