"""Our decoding beside transformers' generate: the same model, prompts and number of tokens."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..base import weights
from ..data import tasks
from ..measured import provenance
from ..resolve import resolve, resolve_here
from ..run import engine
from ..run.generate import Decoding, decode
from ..spec import RunSpec

STREAMS = (1, 4)
TOKENS = 128
ROUNDS = 2
CHECKED = 48
"""Tokens whose text is compared in fp32, where rounding does not decide which is the likeliest."""


def record_generation(spec: RunSpec, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Tokens a second of the base and of it with an untrained adapter, both ways, the rounds in turn; to `out`.

    And whether the greedy text is the same in fp32.
    """
    spec = resolve_here(spec)
    base, task = weights.load(spec), tasks.find(spec.task)
    prompts = [tasks.prompt_ids(base.tokenizer, task.instruction, row.prompt) for row in task.heldout]
    rows = []
    adapted = [engine._attached(base, spec).eval() for _ in range(2)]
    engine._quickened(adapted[0], spec)
    for name, quick, plain in (("base", base.quick, base.model), (spec.method, *adapted)):
        for streams in STREAMS:
            asked = prompts[:streams]
            _ours(quick, asked, TOKENS), _theirs(plain, asked, 2)  # warms up
            took: dict[str, list[float]] = {"peftlab": [], "transformers": []}
            for _ in range(ROUNDS):
                for who, model, answer in (("peftlab", quick, _ours), ("transformers", plain, _theirs)):
                    began = time.perf_counter()
                    answer(model, asked, TOKENS)
                    took[who].append(time.perf_counter() - began)
            row: dict[str, Any] = {"model": name, "streams": streams, "tokens": TOKENS}
            row |= {who: streams * TOKENS / statistics.median(seconds) for who, seconds in took.items()}
            rows.append(row)
            say(f"{name}, {streams} at once: {row['peftlab']:.0f} tokens/s against {row['transformers']:.0f}")
    exact = weights.load(resolve(spec.but(precision="fp32")))
    same = [
        _ours(exact.quick, prompts[:streams], CHECKED) == _theirs(exact.model, prompts[:streams], CHECKED)
        for streams in STREAMS
    ]
    say(f"the same text in fp32: {all(same)}")
    document = provenance() | {
        "kind": "generation",
        "spec": spec.to_dict(),
        "rows": rows,
        "same_text_in_fp32": all(same),
        "tokens_compared": CHECKED,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    return document


def _ours(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    columns = list(decode(model, prompts, -1, Decoding(tokens)))
    return [[token for token in row if token is not None] for row in zip(*columns, strict=True)]


def _theirs(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    import torch

    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return [row[width:].tolist() for row in out]
