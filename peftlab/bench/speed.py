"""Our training beside that of other trainers: the same model, adapter, rows, order, steps and final evaluation."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from .. import hardware, seam
from ..base import configs, fetching, models, weights
from ..data import tasks
from ..errors import PeftlabError, SpecError, plain
from ..measured import provenance
from ..memory import step
from ..memory.compute import compute, peak
from ..resolve import resolve_here
from ..run.scoring import PUBLIC_DOMAIN
from ..spec import Json, Resolved, RunSpec, closest
from . import Say, peers, write
from .chart import chart
from .steps import drawn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 16
PROMPT = 16
"""Tokens of a row that are only read. The model learns nearly all tokens, as in pre-training."""


def record_speed(
    spec: RunSpec, out: Path, say: Say, seeds: int = 1, chosen: Sequence[str] | None = None, random: bool = False
) -> Json:
    """Runs the `chosen` peers, by default all, and writes what each took to `out`, after each run: a bench takes minutes.

    Peers whose scores are compared run on `seeds` seeds. One that fails says so in its row, and the others go on. With
    `random` weights there are no scores. Where the yardstick ran, a chart is written beside `out` as SVG. Raises SpecError
    for an unknown peer.
    """
    for name in chosen or ():
        if name not in peers.PEERS:
            raise SpecError(f"peer={name}: no such trainer; {closest(name, peers.PEERS)}")
    with tempfile.TemporaryDirectory() as folder:
        used = resolve_here(random_weights(spec, Path(folder)) if random else spec)
        floor = None
        if used.gpu:  # the step's products at the GPU's dense bf16 peak
            tokens = used.batch_size * fmean(map(len, peers.pairs(weights.load(used), used)))
            floor = compute(used).per_token * tokens / peak(used.gpu)
        document = provenance() | {
            "kind": "speed",
            "spec": used.to_dict() | ({"model": spec.model, "task": None} if random else {}),
            "random_weights": random,
            "floor_seconds": floor,
            "rows": [],
        }
        for peer in (peers.PEERS[name] for name in chosen or peers.PEERS):
            row: Json = {"name": peer.name, "runs": []}
            document["rows"].append(row)
            for said in _measure(peer, used, seeds if peer.seeded else 1, row, scored=not random):
                say(f"{peer.name}{said}")
                write(document, out)
    if any(row["name"] == peers.YARDSTICK and row["runs"] for row in document["rows"]):
        out.with_suffix(".svg").write_text(chart(document, peers.YARDSTICK), encoding="utf-8")
    return document


def _measure(peer: peers.Peer, spec: Resolved, seeds: int, row: Json, scored: bool) -> Iterator[str]:
    """Fills a peer's row run by run, and yields what to say of each after the peer's name."""
    if not find_spec(peer.package):
        row["error"] = f"{peer.package} is not installed"
        yield f": {row['error']}"
        return
    row["package"] = f"{peer.package} {version(peer.package)}"
    for seed in range(seeds):
        gc.collect()  # what the last run leaves would count in the next one's peak
        try:
            run = peer.run(replace(spec, seed=seed)) | {"seed": seed}
        except (PeftlabError, RuntimeError, ValueError, TypeError, ImportError, AttributeError) as error:
            row["error"] = plain(error)
            yield f": {row['error']}"
            return
        if not scored:  # random weights learn nothing
            del run["score"]
        row["runs"].append(run)
        pace, rate = f"{1000 * run['step_seconds']:.1f} ms a step", f"{run['tokens_per_second']:,.0f} tokens/s"
        yield f", seed {seed}: {pace}, {rate}" + (f", score {run['score']:.2f}" if scored else "")


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
