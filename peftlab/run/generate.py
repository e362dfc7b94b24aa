"""The one way a model's text is made: token by token, with a cache that grows or, on a GPU, a CUDA graph over a fixed one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile, zip_longest
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor
from torch.cuda import CUDAGraph

from .. import caches, seam
from ..errors import SpecError
from ..fused import trial
from . import graphs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARED = 8
"""Fewest leading tokens, the same in all prompts of a batch, that are read once for all of them."""
STRIDE = 128
"""A fixed cache has room for a multiple of this many tokens a row, so that later prompts find one that fits."""
KEPT = 100e6
"""A fixed cache of fewer bytes is kept with its graph, for the model's next prompts."""


@dataclass(frozen=True)
class Decoding:
    """How text is made: the same for the base and the adapted model, so that only their weights differ."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token every time."""
    top_p: float = 1.0
    """Tokens are drawn from the likeliest ones that have this share of the probability together."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SpecError(f"max-new-tokens={self.max_new_tokens}: an answer takes at least 1 token; try 64")
        if not 0 <= self.temperature < math.inf:
            said = "it must be at least 0; try 0 for the likeliest token, or 0.7"
            raise SpecError(f"temperature={self.temperature:g}: {said}")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"top-p={self.top_p:g}: it must be more than 0 and at most 1; try 1")
        if not 0 <= self.seed < 2**63:
            raise SpecError(f"seed={self.seed}: a seed is a whole number from 0 to {2**63 - 1:,}; try 0")


_padding: dict[tuple[object, ...], bool] = {}
"""What `pads` found of models of a class with a config and a method."""


def pads(model: PreTrainedModel) -> bool:
    """Whether a row that is padded on the left gives the logits that it gives alone, and reads on as it does.

    A recurrent state, or positions that are counted from the first column, may not leave out what is padding. A model is
    tried one time a process, on two rows beside a longer one. One of the two may be off: in a mixture, rounding alone may
    send a token to another expert.
    """
    if caches.sums_up_by_itself(model):
        return False
    method = sorted(str(config.peft_type) for config in getattr(model, "peft_config", {}).values())
    key = (type(seam.writer(model)), str(model.config.to_dict()), str(model.dtype), *method)
    if key not in _padding:
        short, long = [[5, 9], [11, 3]], [7, 4, 8, 3, 6]

        def said(prompts: list[list[int]]) -> Tensor:
            """The logits of the two rows after their prompts and after one more token."""
            reader = Reader(model, prompts, pad=0, alike=False)
            first = reader.logits()
            reader.feed(torch.full((len(prompts),), 2, device=model.device))
            return torch.stack((first[:2], reader.logits()[:2]))

        with torch.inference_mode():
            alone = said(short)
            try:
                off = (said([*short, long]) - alone).abs().amax((0, 2)).amin()
                _padding[key] = bool(off <= trial.rounding(model.dtype) * alone.std())
            except Exception:  # anybody's architecture, in transformers' code
                _padding[key] = False
    return _padding[key]


class Reader:
    """A model that reads token by token, with a cache that grows. What the prompts share is read once.

    A model that keeps nothing in transformers' own cache reads all tokens again for each new one.
    """

    cache: Any = None
    """transformers' Cache, once something was read."""
    again = False
    """Whether each new token takes a reading of all tokens."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[list[int]], pad: int, alike: bool = True) -> None:
        self.model, device = model, model.device
        first = seam.first_position(model)
        alike = alike and len(prompts) > 1 and caches.reads_by_attention(model) and pads(model)
        columns = zip(*(p[:-1] for p in prompts), strict=False) if alike else ()
        shared = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, columns)]
        common = len(shared) if len(shared) >= SHARED else 0
        if common:
            self.ids = torch.tensor([shared], device=device)
            self.mask, self.positions = torch.ones_like(self.ids), first + torch.arange(common, device=device)[None]
            self.logits()
            self.cache.batch_repeat_interleave(len(prompts))
        rest = [p[common:] for p in prompts]
        width = max(map(len, rest))
        self.ids = torch.tensor([[pad] * (width - len(p)) + p for p in rest], device=device)
        own = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rest], device=device)
        self.mask = torch.cat([own.new_ones(len(rest), common), own], 1)
        self.positions = first + common + (own.cumsum(1) - 1).clamp(min=0)

    def logits(self) -> Tensor:
        """Reads what was fed last: logits of each row's next token, rows × vocabulary, in fp32."""
        last = torch.full((1,), -1, device=self.ids.device)  # as a slice, the head would copy its weight for each row
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        if self.again:
            return seam.logits(self.model, last, **inputs)[:, -1].float()
        logits, self.cache = seam.read(self.model, self.cache, last, **inputs)
        self.again = self.cache is None
        return logits[:, -1].float()

    def seen(self) -> int:
        """How many tokens are in the cache, virtual ones too."""
        return int(self.cache.get_seq_length())

    def feed(self, token: Tensor) -> None:
        """Gives each row its next token, which `logits` reads."""
        ids, positions = token[:, None], self.positions[:, -1:] + 1
        self.ids = torch.cat([self.ids, ids], 1) if self.again else ids
        self.positions = torch.cat([self.positions, positions], 1) if self.again else positions
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)


_kept: WeakKeyDictionary[PreTrainedModel, dict[tuple[int, int], Replayed]] = WeakKeyDictionary()
"""For each model, the readers that nobody uses by (rows, width). Its weights may change in place; its modules may not."""


class Replayed(Reader):
    """Reads each token by one CUDA graph over a cache of fixed size. Where none can be recorded, the step runs eagerly."""

    def __init__(self, reader: Reader, width: int) -> None:
        """An empty cache for a mask of `width` tokens: the mask leaves out a model's virtual tokens, the cache holds them."""
        room = width + reader.seen() + 1 - reader.mask.shape[1]
        self.at = torch.zeros((), dtype=torch.long, device=reader.ids.device)
        """How many tokens are in the cache: one number for all layers."""
        self.cache = caches.fixed_cache(reader.cache, room, self.at)
        self.ids, self.positions = reader.ids.clone(), reader.positions.clone()
        self.mask = reader.mask.new_zeros(len(reader.mask), width)
        self.masked = self.steps = 0
        self.graph: CUDAGraph | None = None
        self.out: Tensor | None = None

    @classmethod
    def of(cls, reader: Reader, tokens: int) -> Replayed | None:
        """Goes on where `reader` is, for so many `tokens`; None where its cache holds something else than every token.

        That is a recurrent state, or what a sliding window has not passed yet.
        """
        if not (caches.reads_by_attention(reader.model) and caches.keeps_only_tokens(reader.cache)):
            return None
        if any(tensor.shape[-2] != reader.seen() for tensor in caches.kept_by(reader.cache)):
            return None
        rows, masked = reader.mask.shape
        width = math.ceil((masked + tokens) / STRIDE) * STRIDE
        made = _kept.setdefault(reader.model, {}).pop((rows, width), None) or cls(reader, width)
        made.model, made.masked = reader.model, masked
        seen, held = reader.seen(), caches.kept_by(made.cache)
        torch._foreach_zero_(held)  # what is masked counts nothing, unless it is NaN
        torch._foreach_copy_([t[:, :, :seen] for t in held], caches.kept_by(reader.cache))
        made.at.fill_(seen)
        made.mask.fill_(0)
        made.mask[:, :masked] = reader.mask
        made.ids.copy_(reader.ids)
        made.positions.copy_(reader.positions)
        return made

    def close(self) -> None:
        """Ends the reading."""
        model = self.model
        del self.model  # or the model, of which this is kept, would never be let go
        if self.graph:  # its last step may be under way, and it may be the last of its graph
            torch.cuda.current_stream(self.ids.device).synchronize()
            if sum(t.nbytes for t in caches.kept_by(self.cache)) < KEPT:
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


def decode(
    model: PreTrainedModel, prompts: Sequence[list[int]], eos: int, decoding: Decoding, alike: bool = True
) -> Iterator[list[int | None]]:
    """Yields one token for each prompt at a time, None for a row that has ended; stops when all have.

    `prompts` are token ids of any lengths; shorter ones are padded on the left, where the model `pads`, and else those of
    each length are read apart. Rows are `alike` where the model does the same to each: what prompts share is then read
    once. On a GPU a token's numbers are fetched while the next is under way.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) == 1 or pads(model):
        yield from _decode(model, prompts, eos, decoding, alike)
        return
    rows = [[row for row, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
    apart = [_decode(model, [prompts[row] for row in of_length], eos, decoding, False) for of_length in rows]
    for columns in zip_longest(*apart, fillvalue=[]):
        both = (zip(of_length, column, strict=False) for of_length, column in zip(rows, columns, strict=True))
        said = dict(chain.from_iterable(both))
        yield [said.get(row) for row in range(len(prompts))]


def _decode(
    model: PreTrainedModel, prompts: Sequence[list[int]], eos: int, decoding: Decoding, alike: bool
) -> Iterator[list[int | None]]:
    """Decodes prompts of which shorter ones are padded."""
    device = model.device
    draw = torch.Generator(device=device).manual_seed(decoding.seed)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    reader: Reader | None = None
    under_way: deque[_Fetched] = deque()
    try:
        for step in range(decoding.max_new_tokens):
            with torch.inference_mode():
                if reader is None:
                    reader = Reader(model, prompts, max(eos, 0), alike)
                elif step == 1 and device.type == "cuda":
                    reader = Replayed.of(reader, decoding.max_new_tokens) or reader
                token = _pick(reader.logits(), decoding, draw)
                ended = ended | (token == eos)
                reader.feed(token)
                under_way.append(_Fetched(token, ended))
            if step == 0 or device.type == "cpu" or len(under_way) > 1:
                column = under_way.popleft().column()
                yield column  # outside inference_mode, which would hold for the caller too where streams interleave
                if all(token is None for token in column):
                    return
        for fetched in under_way:
            yield fetched.column()
    finally:
        if isinstance(reader, Replayed):
            reader.close()


class _Fetched:
    """Tokens on their way to the host."""

    def __init__(self, token: Tensor, ended: Tensor) -> None:
        self.host = both = torch.stack((token, ended.to(token)))
        self.done = None
        if both.is_cuda:
            self.host = graphs.pinned(torch.empty(both.shape, dtype=both.dtype)).copy_(both, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def column(self) -> list[int | None]:
        """Waits for the tokens; a row that has ended gives None."""
        if self.done:
            self.done.synchronize()
        return [None if end else token for token, end in zip(*self.host.tolist(), strict=True)]


def _pick(logits: Tensor, decoding: Decoding, draw: Generator) -> Tensor:
    """Picks a token for each row of `logits` (rows × vocabulary); one random number serves all, so that only models differ."""
    if decoding.temperature == 0:
        return logits.argmax(-1)
    ranked, order = (logits / decoding.temperature).softmax(-1).sort(-1, descending=True)
    ranked[ranked.cumsum(-1) - ranked > decoding.top_p] = 0
    below = ranked.cumsum(-1)
    luck = torch.rand(1, generator=draw, device=draw.device)
    place = (below <= luck * below[:, -1:]).sum(-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    return order.gather(-1, place)[:, 0]


def gather(columns: Iterator[list[int | None]], rows: int) -> Iterator[list[list[int]]]:
    """Yields the tokens that each row has so far, after each column of them that `decode` gives."""
    said: list[list[int]] = [[] for _ in range(rows)]
    for column in columns:
        for tokens, token in zip(said, column, strict=True):
            if token is not None:
                tokens.append(token)
        yield said


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], decoding: Decoding, rows: int = 1
) -> Iterator[list[str]]:
    """Yields the texts so far after each token, one for each of the model's `rows`, which may go through other weights."""
    columns = decode(model, [prompt] * rows, tokenizer.eos_token_id, decoding, alike=False)
    for said in gather(columns, rows):
        yield tokenizer.batch_decode(said, skip_special_tokens=True)
