"""Decoding: the one way a model's text is made."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..errors import SpecError
from . import graphs
from .reader import Reader, Replayed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
            raise SpecError(
                f"temperature={self.temperature:g}: it must be at least 0; try 0 for the likeliest token, or 0.7"
            )
        if not 0 < self.top_p <= 1:
            raise SpecError(f"top-p={self.top_p:g}: it must be more than 0 and at most 1; try 1")


def decode(
    model: PreTrainedModel, prompts: Sequence[list[int]], eos: int, decoding: Decoding, alike: bool = True
) -> Iterator[list[int | None]]:
    """Yields one token for each prompt at a time, None for a row that has ended; stops when all have.

    `prompts` are token ids of any lengths; shorter ones are padded on the left. Rows are `alike` where the model does the
    same to each: what prompts share is then read once. On a GPU a token's numbers are fetched while the next is under way.
    """
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
        if reader:
            reader.close()


class _Fetched:
    """Tokens on their way to the host."""

    def __init__(self, token: Tensor, ended: Tensor) -> None:
        both = torch.stack((token, ended.to(token)))
        self.done = None
        self.host = both
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
    """Picks a token for each row of `logits` (rows × vocabulary).

    Where tokens are drawn, one random number serves all rows, so that what they say differs by their models alone.
    """
    if decoding.temperature == 0:
        return logits.argmax(-1)
    ranked, order = (logits / decoding.temperature).softmax(-1).sort(-1, descending=True)
    ranked[ranked.cumsum(-1) - ranked > decoding.top_p] = 0
    below = ranked.cumsum(-1)
    luck = torch.rand(1, generator=draw, device=draw.device)
    place = (below <= luck * below[:, -1:]).sum(-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    return order.gather(-1, place)[:, 0]


def gather(columns: Iterator[list[int | None]], said: list[list[int]]) -> Iterator[None]:
    """Adds each column of tokens that `decode` gives to the rows of `said`, and yields after each."""
    for column in columns:
        for tokens, token in zip(said, column, strict=True):
            if token is not None:
                tokens.append(token)
        yield


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], decoding: Decoding, rows: int = 1
) -> Iterator[list[str]]:
    """Yields the texts so far after each token, one for each of the model's `rows`, which may go through other weights."""
    columns = decode(model, [prompt] * rows, tokenizer.eos_token_id, decoding, alike=False)
    said: list[list[int]] = [[] for _ in range(rows)]
    for _ in gather(columns, said):
        yield [text_of(tokenizer, tokens) for tokens in said]
