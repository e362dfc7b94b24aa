"""Our decoding beside that of transformers' generate: the same model, prompts and number of tokens."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from ..base import weights
from ..data import tasks
from ..measured import provenance
from ..resolve import resolve, resolve_here
from ..run.generate import Decoding, decode
from ..run.loop import attached, quickened
from ..spec import Json, RunSpec
from . import Say, write

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

STREAMS = (1, 4)
"""How many prompts are answered at once."""
TOKENS = 128
ROUNDS = 2
CHECKED = 48
"""Tokens whose text is compared in fp32, where rounding does not decide which token is the likeliest."""


def record_generation(spec: RunSpec, out: Path, say: Say) -> Json:
    """Writes to `out` the tokens a second of the base and of it with an untrained adapter, by both ways in turn, and
    whether they say the same in fp32.
    """
    spec = resolve_here(spec)
    base, task = weights.load(spec), tasks.find(spec.task)
    prompts = [tasks.prompt_ids(base.tokenizer, task.instruction, row.prompt) for row in task.heldout]
    quick, plain = (attached(base, spec).eval() for _ in range(2))
    quickened(quick, spec)
    rows = []
    for name, ours, theirs in (("base", base.quick, base.model), (spec.method, quick, plain)):
        for streams in STREAMS:
            rates = _rates(ours, theirs, prompts[:streams])
            rows.append({"model": name, "streams": streams, "tokens": TOKENS} | rates)
            say(f"{name}, {streams} at once: {rates['peftlab']:.0f} tokens/s against {rates['transformers']:.0f}")
    exact = weights.load(resolve(spec.but(precision="fp32")))
    same = all(
        _ours(exact.quick, prompts[:streams], CHECKED) == _theirs(exact.model, prompts[:streams], CHECKED)
        for streams in STREAMS
    )
    say(f"the same text in fp32: {same}")
    found = {"rows": rows, "same_text_in_fp32": same, "tokens_compared": CHECKED}
    return write(provenance() | {"kind": "generation", "spec": spec.to_dict()} | found, out)


def _rates(ours: PreTrainedModel, theirs: PreTrainedModel, prompts: list[list[int]]) -> dict[str, float]:
    """Tokens a second of a model and of its plain twin, in the median round."""
    _ours(ours, prompts, TOKENS), _theirs(theirs, prompts, 2)  # warms up
    ways = (("peftlab", ours, _ours), ("transformers", theirs, _theirs))
    took: dict[str, list[float]] = {who: [] for who, *_ in ways}
    for _ in range(ROUNDS):
        for who, model, answer in ways:
            began = time.perf_counter()
            answer(model, prompts, TOKENS)
            took[who].append(time.perf_counter() - began)
    return {who: len(prompts) * TOKENS / statistics.median(seconds) for who, seconds in took.items()}


def _ours(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    columns = list(decode(model, prompts, -1, Decoding(tokens)))
    return [[token for token in row if token is not None] for row in zip(*columns, strict=True)]


def _theirs(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        out = cast("GenerationMixin", model).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return [row[width:].tolist() for row in out]
