"""Decoding and scoring: the one way a model's text is made."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .. import seam
from ..data import tasks
from ..data.tasks import Row, Task
from ..errors import SpecError
from ..places import ASSETS
from . import graphs

if TYPE_CHECKING:
    from torch import Tensor

PUBLIC_DOMAIN = ASSETS / "text" / "public-domain.txt"


@dataclass(frozen=True)
class Decoding:
    """Settings that base and adapted model share, so that only the weights differ."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token every time."""
    top_p: float = 1.0
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


SHARED = 8
"""Fewest leading tokens, the same in all prompts of a batch, that are read once for all of them."""


def decode(
    model: Any, prompts: Sequence[list[int]], eos: int, decoding: Decoding, alike: bool = True
) -> Iterator[list[int | None]]:
    """One token for each prompt at a time; None for a row that has ended. Stops when all have.

    `prompts` are token ids of any lengths; shorter ones are padded on the left. Rows are `alike` where the model does the
    same to each: what prompts share is then read once. On a GPU a token's numbers are fetched while the next is under way.
    """
    import torch

    device = next(model.parameters()).device
    draw = torch.Generator(device=device).manual_seed(decoding.seed)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    reader: _Reader | None = None
    under_way: deque[_Fetched] = deque()
    try:
        for step in range(decoding.max_new_tokens):
            with torch.inference_mode():
                if reader is None:
                    reader = _Reader(model, prompts, max(eos, 0), alike)
                elif step == 1 and device.type == "cuda":
                    reader = _Replayed.of(reader, decoding.max_new_tokens) or reader
                token = _pick(reader.logits(), decoding, draw)
                ended = ended | (token == eos)
                reader.feed(token)
                under_way.append(_Fetched(token, ended))
            if step == 0 or device.type == "cpu" or len(under_way) > 1:
                column = under_way.popleft().column()
                yield column  # outside inference_mode, which would hold for the caller too, where streams interleave
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
        import torch

        both = torch.stack((token, ended.to(token)))
        self.done = None
        self.host = both
        if both.is_cuda:
            self.host = graphs.pinned(torch.empty(both.shape, dtype=both.dtype)).copy_(both, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def column(self) -> list[int | None]:
        if self.done:
            self.done.synchronize()
        return [None if end else token for token, end in zip(*self.host.tolist(), strict=True)]


class _Reader:
    """A model that reads token by token, with a cache that grows. It begins with the prompts, what they share only once."""

    def __init__(self, model: Any, prompts: Sequence[list[int]], pad: int, alike: bool = True) -> None:
        import torch

        self.model = model
        self.cache: Any = None
        device = next(model.parameters()).device
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
        """Of each row's next token, in fp32."""
        import torch

        last = torch.full((1,), -1, device=self.ids.device)  # as a slice, the head would copy its weight for each row
        out, self.cache = seam.read(
            self.model, self.cache, input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions,
            logits_to_keep=last,
        )  # fmt: skip
        return out.logits[:, -1].float()

    def seen(self) -> int:
        """Tokens in the cache, virtual ones too."""
        return int(self.cache.get_seq_length())

    def close(self) -> None:
        """Once it is read no further."""

    def feed(self, token: Tensor) -> None:
        import torch

        self.ids = token[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.positions = self.positions[:, -1:] + 1


def _common(prompts: Sequence[list[int]]) -> int:
    """How many leading tokens all prompts share, but for each one's last; 0 where they are not worth a pass of their own."""
    if len(prompts) < 2:
        return 0
    longest = min(map(len, prompts)) - 1
    first, last = min(prompts), max(prompts)
    shared = next((i for i in range(longest) if first[i] != last[i]), longest)
    return shared if shared >= SHARED else 0


STRIDE = 128
"""A fixed cache holds a multiple of this many tokens for each row, so that later prompts find one that fits."""
KEPT = 100e6
"""Bytes of a fixed cache up to which it and its graph are kept for the model's next prompts."""


@dataclass
class _Fixed:
    """A cache of fixed size, what one token's step reads beside it, and that step as a CUDA graph once it is recorded."""

    cache: Any
    at: Tensor
    """Tokens in the cache, which all its layers share."""
    ids: Tensor
    mask: Tensor
    positions: Tensor
    steps: int = 0
    graph: Any = None
    out: Any = None

    @classmethod
    def like(cls, reader: _Reader, width: int) -> _Fixed:
        """Empty, for a mask of `width`, which a model's virtual tokens are not in."""
        import torch

        room = width + reader.seen() + 1 - reader.mask.shape[1]
        at = torch.zeros((), dtype=torch.long, device=reader.ids.device)
        cache = seam.fixed_cache(reader.cache, room, at)
        mask = reader.mask.new_zeros(len(reader.mask), width)
        return cls(cache, at, reader.ids.clone(), mask, reader.positions.clone())

    def tensors(self) -> list[Tensor]:
        return [t for layer in self.cache.layers for t in (layer.keys, layer.values)]

    def take(self, reader: _Reader) -> None:
        """What `reader` has read, and the token that it was fed."""
        import torch

        seen, masked = reader.seen(), reader.mask.shape[1]
        read = [t for layer in reader.cache.layers for t in (layer.keys, layer.values)]
        torch._foreach_zero_(self.tensors())  # what is masked counts nothing, unless it is NaN
        torch._foreach_copy_([t[:, :, :seen] for t in self.tensors()], read)
        self.at.fill_(seen)
        self.mask.fill_(0)
        self.mask[:, :masked] = reader.mask
        self.ids.copy_(reader.ids)
        self.positions.copy_(reader.positions)


_kept: WeakKeyDictionary[Any, dict[tuple[int, int], _Fixed]] = WeakKeyDictionary()
"""Model → rows and width → what no one is using. A model's weights may change in place; its modules may not."""


class _Replayed(_Reader):
    """One token as a CUDA graph, over a cache of fixed size. Where it cannot be recorded, the same step runs eagerly."""

    def __init__(self, model: Any, fixed: _Fixed, at: int) -> None:
        self.model, self.cache, self.fixed, self.at = model, fixed.cache, fixed, at
        self.ids, self.mask, self.positions = fixed.ids, fixed.mask, fixed.positions

    @classmethod
    def of(cls, reader: _Reader, tokens: int) -> _Replayed | None:
        """Goes on where `reader` is; None where its cache has let go of tokens that a sliding window no longer sees."""
        if any(layer.keys.shape[-2] != reader.seen() for layer in reader.cache.layers):
            return None
        rows, masked = reader.mask.shape
        width = math.ceil((masked + tokens) / STRIDE) * STRIDE
        fixed = _kept.setdefault(reader.model, {}).pop((rows, width), None) or _Fixed.like(reader, width)
        fixed.take(reader)
        return cls(reader.model, fixed, masked)

    def close(self) -> None:
        import torch

        if self.fixed.graph:  # its last step may be under way, and it may be the last of its graph
            torch.cuda.current_stream(self.ids.device).synchronize()
        if self.fixed.graph and sum(t.nbytes for t in self.fixed.tensors()) < KEPT:
            _kept[self.model][len(self.mask), self.mask.shape[1]] = self.fixed

    def logits(self) -> Tensor:
        import torch

        fixed = self.fixed
        fixed.steps += 1
        if fixed.steps == 2 and self.ids.is_cuda:  # the first warmed up
            graph = torch.cuda.CUDAGraph()
            try:
                with graphs.apart(), graphs.recording(graph):
                    fixed.out = super().logits()
                fixed.graph = graph
            except RuntimeError:
                pass
        if fixed.graph is None:
            return super().logits()
        fixed.graph.replay()
        return fixed.out

    def feed(self, token: Tensor) -> None:
        self.ids.copy_(token[:, None])
        self.mask[:, self.at : self.at + 1] = 1
        self.positions += 1
        self.fixed.at += 1
        self.at += 1


def _pick(logits: Any, decoding: Decoding, draw: Any) -> Any:
    """A token for each row; where they are drawn, all rows have the same luck, so that only their models differ."""
    import torch

    if decoding.temperature == 0:
        return logits.argmax(-1)
    ranked, order = (logits / decoding.temperature).softmax(-1).sort(-1, descending=True)
    ranked[ranked.cumsum(-1) - ranked > decoding.top_p] = 0
    below = ranked.cumsum(-1)
    luck = torch.rand(1, generator=draw, device=draw.device)
    place = (below <= luck * below[:, -1:]).sum(-1, keepdim=True).clamp(max=ranked.shape[-1] - 1)
    return order.gather(-1, place)[:, 0]


def stream(model: Any, tokenizer: Any, prompt: list[int], decoding: Decoding, rows: int = 1) -> Iterator[list[str]]:
    """The texts so far, after each token: one of each of a model's `rows`, which may go through other weights."""
    said: list[list[int]] = [[] for _ in range(rows)]
    for column in decode(model, [prompt] * rows, tokenizer.eos_token_id, decoding, alike=False):
        for tokens, token in zip(said, column, strict=True):
            if token is not None:
                tokens.append(token)
        yield [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]


@dataclass(frozen=True)
class Answer:
    """A held-out row, what a model said, and its score (0 or 1)."""

    prompt: str
    reference: str
    text: str
    score: float


def answer(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row]) -> Generator[float, None, list[Answer]]:
    """Answers `rows` in one batch, greedily, and scores them. Yields the share done; returns the answers."""
    prompts = [tasks.prompt_ids(tokenizer, task.instruction, row.prompt) for row in rows]
    said: list[list[int]] = [[] for _ in rows]
    decoding = Decoding(task.max_new_tokens)
    for step, column in enumerate(decode(model, prompts, tokenizer.eos_token_id, decoding), 1):
        for tokens, token in zip(said, column, strict=True):
            if token is not None:
                tokens.append(token)
        yield step / task.max_new_tokens
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
    return [
        Answer(row.prompt, row.answer, text, tasks.score(text, row, task))
        for row, text in zip(rows, texts, strict=True)
    ]


def answer_loss(model: Any, tokenizer: Any, task: Task) -> float:
    """Mean cross-entropy of the held-out answers given their prompts, in nats per answer token."""
    import torch

    total, count = 0.0, 0
    device = next(model.parameters()).device
    for row in task.heldout:
        prompt, said = (
            tasks.prompt_ids(tokenizer, task.instruction, row.prompt),
            tasks.answer_ids(tokenizer, row.answer),
        )
        ids = torch.tensor([prompt + said], device=device)
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(said) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, -len(said) :], reduction="sum").item()
        count += len(said)
    return total / count


def mean_score(answers: Sequence[Answer]) -> float:
    return sum(a.score for a in answers) / len(answers)


def nats_per_token(model: Any, tokenizer: Any, text: str | None = None, window: int = 512) -> float:
    """Mean cross-entropy on bundled public-domain prose, in nats; its rise after a run is what the model forgot."""
    import torch

    ids = tokenizer(text or PUBLIC_DOMAIN.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    begin = tasks.opening(tokenizer)
    before = len(begin) + getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    window = max(1, min(window, (getattr(model.config, "max_position_embeddings", None) or window) - before))
    device = next(model.parameters()).device
    for start in range(0, len(ids) - 1, window):
        read = torch.tensor([[*begin, *ids[start : start + window + 1]]], device=device)
        told = read[0, len(begin) + 1 :]
        if not len(told):
            continue
        with torch.inference_mode():
            logits = model(input_ids=read[:, :-1]).logits[0, len(begin) :].float()
        total += torch.nn.functional.cross_entropy(logits, told, reduction="sum").item()
        count += len(told)
    return total / count if count else math.nan
