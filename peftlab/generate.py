"""Decoding and scoring: the one way a model's text is made."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import tasks
from .errors import SpecError
from .tasks import Row, Task

PUBLIC_DOMAIN = Path(__file__).parent.parent / "assets" / "text" / "public-domain.txt"


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


def decode(model: Any, prompts: Sequence[list[int]], eos: int, decoding: Decoding) -> Iterator[list[int | None]]:
    """One token for each prompt at a time; None for a row that has ended. Stops when all have.

    `prompts` are token ids of any lengths; shorter ones are padded on the left.
    """
    import torch

    device = next(model.parameters()).device
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[eos] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    draw = torch.Generator(device=device).manual_seed(decoding.seed)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache = None
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(decoding.max_new_tokens):
        with torch.inference_mode():
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            token = _pick(out.logits[:, -1].float(), decoding, draw)
            ended |= token == eos
            ids = token[:, None]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
            column = [None if end else t for end, t in zip(ended.tolist(), token.tolist(), strict=True)]
        yield column  # outside inference_mode, which would hold for the caller too, and for good where streams interleave
        if all(token is None for token in column):
            return


def _pick(logits: Any, decoding: Decoding, draw: Any) -> Any:
    import torch

    if decoding.temperature == 0:
        return logits.argmax(-1)
    ranked, order = (logits / decoding.temperature).softmax(-1).sort(-1, descending=True)
    ranked[ranked.cumsum(-1) - ranked > decoding.top_p] = 0
    return order.gather(-1, torch.multinomial(ranked, 1, generator=draw))[:, 0]


def stream(model: Any, tokenizer: Any, prompt: list[int], decoding: Decoding) -> Iterator[str]:
    """The text so far, after each token."""
    tokens: list[int] = []
    for (token,) in decode(model, [prompt], tokenizer.eos_token_id, decoding):
        if token is not None:
            tokens.append(token)
            yield tokenizer.decode(tokens, skip_special_tokens=True)


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


def mean_score(answers: Sequence[Answer]) -> float:
    return sum(a.score for a in answers) / len(answers)


def nats_per_token(model: Any, tokenizer: Any, text: str | None = None, window: int = 512) -> float:
    """Mean cross-entropy on bundled public-domain prose, in nats; its rise after a run is what the model forgot."""
    import torch

    ids = tokenizer(text or PUBLIC_DOMAIN.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    window = max(1, min(window, (getattr(model.config, "max_position_embeddings", None) or window) - virtual))
    device = next(model.parameters()).device
    for start in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[start : start + window + 1]], device=device)
        if piece.shape[1] < 2:
            continue
        with torch.inference_mode():
            logits = model(input_ids=piece[:, :-1]).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0], piece[0, 1:], reduction="sum").item()
        count += piece.shape[1] - 1
    return total / count if count else math.nan
