"""How a model reads token by token: with a cache that grows or, on a GPU, as a CUDA graph over one of fixed size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.cuda import CUDAGraph

from .. import seam
from . import graphs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARED = 8
"""Fewest leading tokens, the same in all prompts of a batch, that are read once for all of them."""
STRIDE = 128
"""A fixed cache has room for a multiple of this many tokens a row, so that later prompts find one that fits."""
KEPT = 100e6
"""A fixed cache of fewer bytes is kept with its graph, for the model's next prompts."""


class Reader:
    """A model that reads token by token, with a cache that grows. It begins with the prompts, and what they share is read once.

    `logits` reads what was fed last, `feed` gives it the next token of each row, `close` ends the reading.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]], pad: int, alike: bool = True) -> None:
        self.model = model
        self.cache: Any = None
        """transformers' Cache, once something was read."""
        device = model.device
        common = _common(prompts) if alike else 0
        if common:
            ids = torch.tensor([prompts[0][:common]], device=device)
            positions = torch.arange(common, device=device)[None]
            _, self.cache = seam.read(
                model,
                None,
                input_ids=ids,
                position_ids=positions,
                attention_mask=torch.ones_like(ids),
                logits_to_keep=1,
            )
            self.cache.batch_repeat_interleave(len(prompts))
        rest = [p[common:] for p in prompts]
        width = max(map(len, rest))
        self.ids = torch.tensor([[pad] * (width - len(p)) + p for p in rest], device=device)
        own = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rest], device=device)
        self.mask = torch.cat([own.new_ones(len(rest), common), own], 1)
        self.positions = common + (own.cumsum(1) - 1).clamp(min=0)

    def logits(self) -> Tensor:
        """Logits of each row's next token, rows × vocabulary, in fp32."""
        last = torch.full((1,), -1, device=self.ids.device)  # as a slice, the head would copy its weight for each row
        out, self.cache = seam.read(
            self.model, self.cache, input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions,
            logits_to_keep=last,
        )  # fmt: skip
        return out.logits[:, -1].float()

    def seen(self) -> int:
        """How many tokens are in the cache, virtual ones too."""
        return int(self.cache.get_seq_length())

    def close(self) -> None:
        """Ends the reading."""

    def feed(self, token: Tensor) -> None:
        """Gives each row its next token, which `logits` reads."""
        self.ids = token[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.positions = self.positions[:, -1:] + 1


def _held(cache: Any) -> list[Tensor]:
    """The keys and values of all layers, each rows × heads × tokens × size."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _common(prompts: Sequence[list[int]]) -> int:
    """How many leading tokens all prompts share, each one's last left out; 0 where a pass of their own is not worth it."""
    if len(prompts) < 2:
        return 0
    longest = min(map(len, prompts)) - 1
    first, last = min(prompts), max(prompts)
    shared = next((i for i in range(longest) if first[i] != last[i]), longest)
    return shared if shared >= SHARED else 0


_kept: WeakKeyDictionary[PreTrainedModel, dict[tuple[int, int], Replayed]] = WeakKeyDictionary()
"""For each model, the readers that nobody uses by (rows, width). Its weights may change in place; its modules may not."""


class Replayed(Reader):
    """Reads each token by one CUDA graph over a cache of fixed size. Where none can be recorded, the step runs eagerly."""

    def __init__(self, reader: Reader, width: int) -> None:
        """An empty cache for a mask of `width` tokens: the mask leaves out a model's virtual tokens, the cache holds them."""
        room = width + reader.seen() + 1 - reader.mask.shape[1]
        self.at = torch.zeros((), dtype=torch.long, device=reader.ids.device)
        """How many tokens are in the cache: one number for all layers."""
        self.cache = seam.fixed_cache(reader.cache, room, self.at)
        self.ids, self.positions = reader.ids.clone(), reader.positions.clone()
        self.mask = reader.mask.new_zeros(len(reader.mask), width)
        self.masked = self.steps = 0
        self.graph: CUDAGraph | None = None
        self.out: Tensor | None = None

    @classmethod
    def of(cls, reader: Reader, tokens: int) -> Replayed | None:
        """Goes on where `reader` is, for so many `tokens`; None where its cache has dropped what a sliding window passed."""
        if any(tensor.shape[-2] != reader.seen() for tensor in _held(reader.cache)):
            return None
        rows, masked = reader.mask.shape
        width = math.ceil((masked + tokens) / STRIDE) * STRIDE
        made = _kept.setdefault(reader.model, {}).pop((rows, width), None) or cls(reader, width)
        made.take(reader)
        return made

    def take(self, reader: Reader) -> None:
        """Copies what `reader` has read, and the token that it was fed."""
        self.model, self.masked = reader.model, reader.mask.shape[1]
        seen, held = reader.seen(), _held(self.cache)
        torch._foreach_zero_(held)  # what is masked counts nothing, unless it is NaN
        torch._foreach_copy_([t[:, :, :seen] for t in held], _held(reader.cache))
        self.at.fill_(seen)
        self.mask.fill_(0)
        self.mask[:, : self.masked] = reader.mask
        self.ids.copy_(reader.ids)
        self.positions.copy_(reader.positions)

    def close(self) -> None:
        model = self.model
        del self.model  # or the model, of which this is kept, would never be let go
        if self.graph:  # its last step may be under way, and it may be the last of its graph
            torch.cuda.current_stream(self.ids.device).synchronize()
            if sum(t.nbytes for t in _held(self.cache)) < KEPT:
                _kept[model][len(self.mask), self.mask.shape[1]] = self

    def logits(self) -> Tensor:
        self.steps += 1
        if self.steps == 2 and self.ids.is_cuda:  # the first warmed up
            graph = torch.cuda.CUDAGraph()
            try:
                with graphs.apart(), graphs.recording(graph):
                    self.out = super().logits()
                self.graph = graph
            except RuntimeError:
                pass
        if self.graph is None or self.out is None:
            return super().logits()
        self.graph.replay()
        return self.out

    def feed(self, token: Tensor) -> None:
        self.ids.copy_(token[:, None])
        self.mask[:, self.masked : self.masked + 1] = 1
        self.positions += 1
        self.at += 1
        self.masked += 1
