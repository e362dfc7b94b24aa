"""A model with random weights and rows of one length, for the speed and memory of models whose weights are not at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import hardware, seam
from ..base import configs, fetching, models
from ..data import tasks
from ..errors import SpecError
from ..memory import step
from ..run.scoring import PUBLIC_DOMAIN
from ..spec import Json, RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 16
PROMPT = 16
"""Tokens of a row that are only read. The model learns nearly all tokens, as in pre-training."""
SPREAD = 0.02
"""Standard deviation of the weights, as most models start."""


def random_weights(spec: RunSpec, folder: Path) -> RunSpec:
    """`spec` on a model and a task that are made in `folder`: the shapes of its model with the default model's tokenizer,
    and rows of public-domain prose as long as its sequence length.

    Raises SpecError for a model without a config and for an automatic sequence length, and WeightsError.
    """
    entry = models.find(spec.model or models.DEFAULT)
    if entry.config is None:
        raise SpecError(f"model={spec.model}: random weights need its config; name a model, not a count")
    if not spec.sequence_length:
        raise SpecError(
            "sequence-length is not set: rows of random weights have one length; set it, for instance to 256"
        )
    for _ in fetching.fetch(models.DEFAULT):
        pass
    tokenizer = seam.library().AutoTokenizer.from_pretrained(fetching.folder_of(models.find(models.DEFAULT)))
    device = hardware.here().device
    model = torch.nn.Module.to(configs.build_meta(entry.config), torch.bfloat16)
    step.materialize(model, lambda _, tensor: drawn(tensor, device))
    made = folder / Path(entry.key).name
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    task = folder / "prose.json"
    rows = list(_rows(tokenizer, spec.sequence_length))
    task.write_text(
        json.dumps({
            "name": "Prose", "teaches": "Nothing: its rows have one length.", "instruction": "", "metric": "exact_match",
            "train": rows, "heldout": rows[:1], "max_new_tokens": 1, "steps": 20,
        })
    )  # fmt: skip
    return spec.but(model=str(made), task=str(task))


def drawn(tensor: Tensor, device: str) -> Tensor:
    """In place of a tensor without numbers, one of its shape and type with random ones, or zeros where they are whole."""
    if not tensor.is_meta:  # a quantized weight
        return tensor
    made = torch.empty_like(tensor, device=device)
    return made.normal_(0, SPREAD) if made.is_floating_point() else made.zero_()


def _rows(tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Json]:
    """Prompts and answers that have `length` tokens together, or a few less."""
    ids = tokenizer(PUBLIC_DOMAIN.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    ids = ids * (1 + ROWS * length // len(ids))
    for start in range(0, ROWS * length, length):
        prompt, kept = str(tokenizer.decode(ids[start : start + PROMPT])), length
        while True:
            answer = str(tokenizer.decode(ids[start + PROMPT : start + kept]))
            over = len(tasks.prompt_ids(tokenizer, "", prompt) + tasks.answer_ids(tokenizer, answer)) - length
            if over <= 0:
                break
            kept -= over
        yield {"prompt": prompt, "answer": answer}
