"""The caches of transformers: what of a text a model keeps, layer by layer. A part of the seam to that library."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from . import seam

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import Cache, PreTrainedConfig, PreTrainedModel


def has_plain_cache(model: PreTrainedModel) -> bool:
    """Whether the model takes transformers' own cache, and keeps all that it keeps of a text there."""
    from transformers import cache_utils

    own = vars(sys.modules[type(model).__module__])
    kinds = {n for n, kind in own.items() if isinstance(kind, type) and issubclass(kind, cache_utils.Cache)}
    parts = [part for part in model.modules() if isinstance(part, seam.library().PreTrainedModel)]
    asked = [seam.arguments_of(part).get(seam.cache_name()) for part in parts]
    taken = " ".join(str(argument) for argument in asked if argument)
    named = {*kinds, "tuple", "list"}  # some families still say of it what it was before there was a class
    known = bool(kinds and set(re.findall(r"\w+", taken)) & named) and kinds <= set(vars(cache_utils))
    return known and not any(hasattr(part, "_setup_cache") for part in parts) and not sums_up_by_itself(model)


def cached_by_layer(model: PreTrainedModel) -> list[str]:
    """What the cache of each layer holds: `keys` and values, `more` beside them, or `other` where it holds none of its own."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return [
        "keys" if type(v) in plain else "more" if isinstance(v, plain) else "other"
        for v in getattr(empty_cache(model), "layers", [])
    ]


class Layer(NamedTuple):
    """What a layer's cache holds."""

    window: int
    """How many tokens it keeps at most; 0 for all."""
    is_state: bool
    """Whether it holds a state that sums up the text, alone or beside keys and values."""
    is_indexed: bool
    """Whether it holds what an indexer finds tokens by."""


def layers_of(config: PreTrainedConfig) -> list[Layer]:
    """Of each layer of a model with this config; none where transformers makes no cache for it."""
    from transformers import DynamicCache, cache_utils

    def is_a(layer: object, name: str) -> bool:
        return isinstance(layer, getattr(cache_utils, name, ()))  # not in every version

    try:
        held: list[Any] = DynamicCache(config=config).layers
    except Exception:  # layers of a kind that only the model itself can make, or none
        return []
    return [
        Layer(
            getattr(layer, "sliding_window", 0) or 0,
            is_a(layer, "LinearAttentionCacheLayerMixin"),
            is_a(layer, "DynamicIndexedLayer"),
        )
        for layer in held
    ]


def keeps_only_tokens(held: object) -> bool:
    """Whether a cache is keys and values of single tokens, layer after layer, and no state that sums up all of them."""
    from transformers import cache_utils

    names = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")  # the last keeps nothing, being another's
    plain = [getattr(cache_utils, name, None) for name in names]
    layers: list[Any] = getattr(held, "layers", [])
    return bool(layers) and all(type(layer) in plain for layer in layers)


def empty_cache(model: Module) -> Cache | None:
    """A cache as the config of the model asks for; None where transformers cannot make one."""
    from transformers import DynamicCache

    inner: Any = seam.writer(model)
    try:
        return DynamicCache(config=inner.config)
    except Exception:  # layers of a kind that only the model itself can make, or none
        return None


def reads_by_attention(model: Module) -> bool:
    """Whether the model says of itself that attention, told where each token stands, is all that reads a text."""
    inner: Any = seam.writer(model)
    told = inner and all(seam.takes(model, name) for name in (*seam.PLACES, seam.cache_name()))
    return told and not inner._is_stateful and keeps_only_tokens(empty_cache(model))


def sums_up_by_itself(model: Module) -> bool:
    """Whether the model's family brings a cache of its own, which may sum up tokens in blocks that padding would shift."""
    from transformers import cache_utils

    return any(type(layer).__module__ != cache_utils.__name__ for layer in getattr(empty_cache(model), "layers", []))


def kept_by(held: Cache) -> list[Tensor]:
    """The keys and values of layer after layer, each rows × heads × tokens × d, where a layer has them."""
    layers: list[Any] = held.layers
    return [t for layer in layers if getattr(layer, "keys", None) is not None for t in (layer.keys, layer.values)]


def fixed_cache(held: Cache, room: int, at: Tensor) -> Cache:
    """An empty cache of `room` tokens for the layers of `held`, which all write at `at`, a tensor that the caller moves."""
    from transformers.cache_utils import Cache, StaticLayer

    class Layer(StaticLayer):
        cumulative_length: Any  # a number or a tensor, by the version of transformers

        def __init__(self, keys: Tensor, values: Tensor, room: int, at: Tensor) -> None:
            super().__init__(max_cache_len=room)
            self.lazy_initialization(keys, values)
            self.cumulative_length = at

        def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
            at = self.cumulative_length.view(1)
            assert self.keys is not None and self.values is not None
            return self.keys.index_copy_(2, at, key_states), self.values.index_copy_(2, at, value_states)

    layers: list[Any] = held.layers
    return Cache(
        layers=[layer if layer.keys is None else Layer(layer.keys, layer.values, room, at) for layer in layers]
    )
