"""A model with random weights and rows of one length, for the speed and memory of models whose weights are not at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import hardware, seam
from ..base import configs, models, weights
from ..data import tasks
from ..errors import SpecError
from ..run.generate import PUBLIC_DOMAIN
from ..spec import RunSpec

ROWS = 16
STEPS = 20
PROMPT = 16
"""Tokens of a row that are read only: nearly all are learned, as in pre-training."""
SPREAD = 0.02
"""Standard deviation of the weights, as most models start."""


def random_weights(spec: RunSpec, folder: Path) -> RunSpec:
    """`spec` on a model and a task in `folder`: its model's shapes with the default model's tokenizer, its sequence length
    filled with public-domain prose. Raises SpecError for a model without a config, and WeightsError.
    """
    import torch

    from ..memory import step

    entry = models.find(spec.model or models.DEFAULT)
    if entry.config is None:
        raise SpecError(f"model={spec.model}: random weights need its config; name a model, not a count")
    if not spec.sequence_length:
        raise SpecError(
            "sequence-length is not set: rows of random weights have one length; set it, for instance to 256"
        )
    for _ in weights.fetch(models.DEFAULT):
        pass
    tokenizer = seam.library().AutoTokenizer.from_pretrained(weights.folder_of(models.find(models.DEFAULT)))
    device = hardware.here().device

    def draw(_: str, tensor: Any) -> Any:
        drawn = torch.empty_like(tensor, device=device)
        return drawn.normal_(0, SPREAD) if drawn.is_floating_point() else drawn.zero_()

    model = configs.build_meta(entry.config).to(torch.bfloat16)
    step.materialize(model, draw)
    made = folder / Path(entry.key).name
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    task = folder / "prose.json"
    rows = [{"prompt": p, "answer": a} for p, a in _rows(tokenizer, spec.sequence_length)]
    task.write_text(
        json.dumps({
            "name": "Prose", "teaches": "Nothing: its rows have one length.", "instruction": "", "metric": "exact_match",
            "train": rows, "heldout": rows[:1], "max_new_tokens": 1, "steps": STEPS,
        })
    )  # fmt: skip
    return spec.but(model=str(made), task=str(task))


def _rows(tokenizer: Any, length: int) -> list[tuple[str, str]]:
    """Prompts and answers which make `length` tokens together, or a few less."""
    ids = tokenizer(PUBLIC_DOMAIN.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    ids = ids * (1 + ROWS * length // len(ids))
    rows = []
    for start in range(0, ROWS * length, length):
        prompt, kept = tokenizer.decode(ids[start : start + PROMPT]), length
        while True:
            row = tasks.Row(prompt, tokenizer.decode(ids[start + PROMPT : start + kept]))
            over = len(tasks.prompt_ids(tokenizer, "", prompt) + tasks.answer_ids(tokenizer, row.answer)) - length
            if over <= 0:
                break
            kept -= over
        rows.append((row.prompt, row.answer))
    return rows
