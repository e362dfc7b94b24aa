"""How well a model does: its answers to held-out rows, scored, and the cross-entropy of text it is given."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import seam
from ..base import configs
from ..data import tasks
from ..data.tasks import Row, Task
from ..places import ASSETS
from .batches import encode, forget
from .generate import Decoding, decode, gather

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..base import weights

PUBLIC_DOMAIN = ASSETS / "text" / "public-domain.txt"


@dataclass(frozen=True)
class Answer:
    """A held-out row, what a model said, and its score (0 or 1)."""

    prompt: str
    reference: str
    text: str
    score: float


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row]
) -> Generator[float, None, list[Answer]]:
    """Answers `rows` in one batch, greedily, and scores them. Yields the share done, from 0 to 1; returns the answers."""
    prompts = [tasks.prompt_ids(tokenizer, task.instruction, row.prompt) for row in rows]
    columns = decode(model, prompts, tokenizer.eos_token_id, Decoding(task.max_new_tokens))
    for step, said in enumerate(gather(columns, len(rows)), 1):  # noqa: B007  used below
        yield step / task.max_new_tokens
    told = zip(rows, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True)
    return [Answer(row.prompt, row.answer, text, tasks.score(text, row, task)) for row, text in told]


def base_answers(base: weights.Base, task: Task) -> Generator[float, None, list[Answer]]:
    """What the base itself answers to a task's held-out rows: asked once, as it never changes. Yields the share done."""
    known: dict[Task, list[Answer]] = base.measured.setdefault("answers", {})
    if task not in known:
        known[task] = yield from answer(base.quick, base.tokenizer, task, task.heldout)
        forget(known)
    return known[task]


def mean_score(answers: Sequence[Answer]) -> float:
    return sum(a.score for a in answers) / len(answers)


def answer_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> float:
    """Mean cross-entropy of the held-out answers given their prompts, in nats per answer token."""
    pairs = encode(tokenizer, task, task.heldout)
    return sum(_nats(model, p.prompt, p.answer) for p in pairs) / sum(len(p.answer) for p in pairs)


def nats_per_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None = None, window: int = 512
) -> float:
    """Mean cross-entropy of a text, in nats a token, read in windows of so many tokens; NaN for a text of one token.

    By default of bundled public-domain prose: its rise after a run is what the model forgot.
    """
    ids = tokenizer(text or PUBLIC_DOMAIN.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    begin = tasks.opening(tokenizer)
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    before = len(begin) + virtual + seam.first_position(model) + 1  # ProphetNet looks up one place after the last
    window = max(1, min(window, (configs.context(model.config) or window + before) - before))
    total = sum(
        _nats(model, [*begin, ids[start]], ids[start + 1 : start + window + 1])
        for start in range(0, len(ids) - 1, window)
    )
    return total / (len(ids) - 1) if len(ids) > 1 else math.nan


def _nats(model: PreTrainedModel, given: list[int], told: list[int]) -> float:
    """Cross-entropy in nats of the tokens `told` after those `given`, summed."""
    read = torch.tensor([given + told], device=model.device)
    with torch.inference_mode():
        logits = seam.logits(model, input_ids=read[:, :-1])[0, -len(told) :].float()
    return torch.nn.functional.cross_entropy(logits, read[0, -len(told) :], reduction="sum").item()
