"""What takes a few lines to record: a run and its comparison, every method's gear, decoding beside transformers', the page."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from .. import adapters
from ..base import weights
from ..compare import on_task
from ..data import tasks
from ..errors import PeftlabError, RunError
from ..measured import provenance
from ..methods import METHODS
from ..places import ROOT
from ..resolve import resolve, resolve_here
from ..run import Event, pace, train, warm_up
from ..run.events import Work
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


def record_train(spec: RunSpec, out: Path, say: Callable[[Event], None], adapter_out: Path | None = None) -> Json:
    """Trains and compares; every loss and score goes to `out`, the adapter to `adapter_out`. Raises RunError when it fails."""
    spec = resolve_here(spec)
    warm_up(spec)  # as the app does when it has loaded the model
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as scratch:
        for event in train(spec, Path(scratch) / "run"):
            say(event)
            if event["type"] in ("start", "step", "eval", "done"):
                events.append(event)
        done = events[-1]
        if done["type"] != "done" or done["adapter"] is None:
            raise RunError("the run ended before it had learned anything; nothing was recorded")
        adapter = adapters.read(done["adapter"])
        report = Work(on_task([adapter], tasks.find(spec.task))).finished()
        if adapter_out:
            shutil.copytree(adapter.folder, adapter_out, dirs_exist_ok=True)
    del done["adapter"]  # a folder that is gone
    scores = [asdict(score) for score in report.scores]
    document = {"kind": "train", "spec": spec.to_dict(), "events": events, "comparison": scores}
    return write(provenance() | document, out)


def record_gears(spec: RunSpec, out: Path, say: Say) -> Json:
    """Writes to `out` each method's gear, why it is not the graph, and the seconds of a usual step."""
    spec = resolve_here(spec)
    document = provenance() | {"kind": "gears", "spec": spec.to_dict(), "methods": []}
    for method in METHODS:
        row: Json = {"method": method}
        document["methods"].append(row)
        try:
            # the first half of the steps leave time to capture a graph
            found = pace(resolve(RunSpec(model=spec.model, task=spec.task, method=method)), steps=16)
            row |= {"gear": found.gear, "why_eager": found.why_eager, "step_seconds": found.seconds}
            row["not_fused"] = list(found.not_fused)
        except (PeftlabError, RuntimeError) as error:
            row["error"] = str(error).splitlines()[0][:300]
        say(f"{method}: {row.get('gear')} {row.get('why_eager') or row.get('error') or ''}")
        write(document, out)
    return document


def record_page(out: Path, say: Say) -> Json:
    """Writes to `out` the processor time of every tab's answers to random settings, in milliseconds, and the size of the
    page's configuration, in bytes. Raises PeftlabError where the page cannot be measured.

    It is measured in a process of its own, because peftlab itself never imports gradio.
    """
    done = subprocess.run([sys.executable, str(ROOT / "demos" / "page" / "measure.py")], capture_output=True, text=True)
    if done.returncode:
        raise PeftlabError(f"the page could not be measured: {done.stderr.strip().splitlines()[-1]}")
    document = provenance() | {"kind": "page", **json.loads(done.stdout.splitlines()[-1])}
    for tab, found in document["answers_milliseconds"].items():
        say(f"{tab}: an answer takes {found['median']:.1f} ms of processor time, 95% at most {found['p95']:.1f}")
    kilo, packed = document["config_bytes"] / 1000, document["config_gzip_bytes"] / 1000
    say(f"the page's configuration: {kilo:.0f} kB, {packed:.0f} kB compressed")
    return write(document, out)


def record_generation(spec: RunSpec, out: Path, say: Say) -> Json:
    """Writes to `out` the tokens a second of the base and of it with an untrained adapter, by `decode` and by transformers'
    generate in turn on the same prompts, and whether they say the same in fp32.
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
