"""Our training beside other trainers': the same model, adapter, rows, order, steps and final evaluation."""

from __future__ import annotations

import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..base import weights
from ..data import tasks
from ..errors import PeftlabError
from ..measured import provenance
from ..memory.compute import compute, peak
from ..methods import METHODS
from ..resolve import resolve, resolve_here
from ..run import engine, pace, train, warm_up
from ..run.batches import IGNORED, Batches, encode
from ..run.gears import CLIP
from ..run.generate import answer, mean_score
from ..seeded import seeded
from ..spec import Resolved, RunSpec
from .chart import chart
from .random_weights import random_weights

GEAR_STEPS = 16
"""Steps that show a method's gear: half of them to capture."""
Say = Callable[[str], None]
"""Takes a line about the progress."""


class Watch:
    """When each step ended, and how high memory was."""

    def __init__(self) -> None:
        import torch

        self.ends: list[float] = []
        self.began = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def step(self) -> None:
        self.ends.append(time.perf_counter())

    def finish(self, tokens: int) -> dict[str, Any]:
        """Seconds to the first step and for a usual one; `tokens` were read, none of them padding."""
        import torch

        peak = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        spent = time.perf_counter() - self.began
        gaps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return {
            "first_step_seconds": self.ends[0] - self.began,
            "step_seconds": statistics.median(gaps),
            "training_seconds": spent,
            "tokens_per_second": tokens / spent,
            "peak_bytes": peak,
        }


def _ours(spec: Resolved, eager: bool, plain: bool) -> dict[str, Any]:
    """Through `train` as everybody has it, evaluations, saving and all."""
    with tempfile.TemporaryDirectory() as folder:
        warm_up(spec)  # as the app does when it has loaded the model
        began = time.perf_counter()
        events = list(train(spec, Path(folder) / "run", eager=eager, plain=plain))
        whole = time.perf_counter() - began
    start, done = next(e for e in events if e["type"] == "start"), events[-1]
    steps = [e for e in events if e["type"] == "step"]
    return {
        "gear": next((e["gear"] for e in events if e["type"] == "gear"), start["gear"]),
        "not_fused": start["not_fused"],
        "first_step_seconds": steps[0]["seconds"],
        "step_seconds": statistics.median(e["seconds"] for e in steps),
        "training_seconds": done["training_seconds"],
        "tokens_per_second": done["tokens_per_second"],
        "peak_bytes": done["measured_peak_bytes"],
        "predicted_peak_bytes": done["predicted_peak_bytes"],
        "score": next(iter(done["eval"]["after"].values())),
        "click_to_saved_seconds": whole,
    }


def _batches(spec: Resolved, base: weights.Base) -> Iterator[Any]:
    task, pad = tasks.find(spec.task), base.tokenizer.pad_token_id
    made = Batches(encode(base.tokenizer, task, task.train), spec.batch_size, 1, spec.seed, pad)
    return (batch.trimmed() for (batch,) in made)


def _columns(batch: Any) -> dict[str, Any]:
    """As collators that pad on the right give it to a model."""
    import torch

    ids, labels = batch.data
    width = ids.shape[1]
    last = width - 1 - labels.ne(IGNORED).flip(1).int().argmax(1, keepdim=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(width) <= last).long()}


def _scored(model: Any, base: weights.Base, spec: Resolved) -> float:
    task = tasks.find(spec.task)
    work = answer(model.eval(), base.tokenizer, task, task.heldout)
    while True:
        try:
            next(work)
        except StopIteration as finished:
            return mean_score(finished.value)


def _compiled(spec: Resolved) -> dict[str, Any]:
    """A plain loop with torch.compile around the model, and every batch as wide as the longest row: it compiles each width."""
    import torch

    base = weights.load(spec)
    model = engine._attached(base, spec).train()
    fast: Any = torch.compile(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = _optimizers(model, spec, base.device)
    task, pad = tasks.find(spec.task), base.tokenizer.pad_token_id
    pairs = encode(base.tokenizer, task, task.train)
    stream = iter(Batches(pairs, spec.batch_size, 1, spec.seed, pad, padding=math.inf))
    watch, tokens = Watch(), 0
    for _ in range(spec.steps):
        (batch,) = next(stream)
        tokens += batch.tokens
        ids, labels = batch.data.to(base.device)
        loss = torch.nn.functional.cross_entropy(
            fast(input_ids=ids, use_cache=False).logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        watch.step()
    return watch.finish(tokens) | {"score": _scored(model, base, spec)}


def arguments(spec: Resolved, device: str, **more: Any) -> dict[str, Any]:
    """What the other trainers are given: bf16 on a GPU, no saving, a line every 10 steps, no workers."""
    return {
        "per_device_train_batch_size": 1,  # an item is a batch, made as ours are
        "max_steps": spec.steps,
        "max_grad_norm": CLIP,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
        "seed": spec.seed,
    } | more


def _optimizers(model: Any, spec: Resolved, device: str) -> tuple[Any, Any]:
    """AdamW as the trainers have it by default, and our learning rates."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    rate, steps = spec.learning_rate, spec.steps
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=device == "cuda")
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: engine._rate(min(step, steps - 1), steps)
    )


def _timed(trainer: Any, spec: Resolved, tokens: int) -> dict[str, Any]:
    from transformers import TrainerCallback

    watch = Watch()

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step()

    trainer.add_callback(Ends())
    with seeded(spec.seed):
        trainer.train()
    return watch.finish(tokens)


def _trainer(spec: Resolved, **more: Any) -> dict[str, Any]:
    """transformers' Trainer on a model that peft attached to."""
    from transformers import Trainer, TrainingArguments

    base = weights.load(spec)
    model = engine._attached(base, spec)
    stream = _batches(spec, base)
    batches = [next(stream) for _ in range(spec.steps)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(output_dir=folder, **arguments(spec, base.device, **more)),
            train_dataset=[_columns(batch) for batch in batches],  # type: ignore[arg-type]
            data_collator=lambda items: items[0],
            optimizers=_optimizers(model, spec, base.device),
        )
        trainer._get_train_sampler = lambda *_: None  # type: ignore[method-assign]  # in our order
        found = _timed(trainer, spec, sum(batch.tokens for batch in batches))
    return found | {"score": _scored(model, base, spec), "arguments": arguments(spec, base.device, **more)}


def _sft(spec: Resolved) -> dict[str, Any]:
    """TRL's SFTTrainer on rows that are tokenized already; it makes its own batches of them."""
    import trl
    from datasets import Dataset

    library: Any = trl
    base = weights.load(spec)
    model = engine._attached(base, spec)
    task = tasks.find(spec.task)
    pairs = encode(base.tokenizer, task, task.train)
    rows = [
        {"input_ids": p.prompt + p.answer, "completion_mask": [0] * len(p.prompt) + [1] * len(p.answer)} for p in pairs
    ]
    own = arguments(spec, base.device, per_device_train_batch_size=spec.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = library.SFTTrainer(
            model,
            library.SFTConfig(output_dir=folder, max_length=spec.sequence_length, completion_only_loss=True,
                      gradient_checkpointing=False, **own),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            optimizers=_optimizers(model, spec, base.device),
        )  # fmt: skip
        usual = sum(map(len, pairs)) / len(pairs)
        found = _timed(trainer, spec, round(usual * spec.batch_size * spec.steps))
    return found | {"score": _scored(model, base, spec), "arguments": own}


PEERS: dict[str, tuple[str, Callable[[Resolved], dict[str, Any]]]] = {
    "peftlab": ("peft", lambda spec: _ours(spec, False, False)),
    "peftlab, bf16 adapters": ("peft", lambda spec: _ours(resolve(spec.but(adapter_precision="bf16")), False, False)),
    "peftlab, nothing fused": ("peft", lambda spec: _ours(spec, False, True)),
    "peftlab, eager": ("peft", lambda spec: _ours(spec, True, False)),
    "plain eager loop": ("peft", lambda spec: _ours(spec, True, True)),
    "transformers Trainer": ("accelerate", _trainer),
    "TRL SFTTrainer": ("trl", _sft),
    "torch.compile": ("torch", _compiled),
    "Trainer with Liger": ("liger_kernel", lambda spec: _trainer(spec, use_liger_kernel=True)),
}
"""Name → the package it needs, and what runs a resolved spec. Liger, which changes transformers' own classes, comes last."""
YARDSTICK = "transformers Trainer"
SEEDED = ("peftlab", YARDSTICK)
"""Those whose scores are compared, on several seeds; of the others one run tells the speed."""


def record_speed(
    spec: RunSpec,
    out: Path,
    seeds: int = 1,
    chosen: list[str] | None = None,
    random: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Each peer, those of SEEDED on `seeds` seeds, to `out`. One that fails says so, and the others go on.

    With `random` weights there are no scores. Beside it, a chart as SVG, where the yardstick ran.
    """
    if not random:
        return _record(resolve_here(spec), out, seeds, chosen, say)
    with tempfile.TemporaryDirectory() as folder:
        return _record(resolve_here(random_weights(spec, Path(folder))), out, seeds, chosen, say, spec.model)


def _record(
    spec: Resolved, out: Path, seeds: int, chosen: list[str] | None, say: Say, stands_for: str | None = None
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    document = provenance() | {
        "kind": "speed",
        "spec": spec.to_dict() | ({"model": stands_for, "task": None} if stands_for else {}),
        "random_weights": bool(stands_for),
        "floor_seconds": _floor(spec),
        "rows": rows,
    }

    def keep(line: str) -> None:
        """What is measured so far: a bench takes minutes."""
        say(line)
        _write(document, out)

    for name in chosen or list(PEERS):
        package, run = PEERS[name]
        row: dict[str, Any] = {"name": name, "runs": []}
        rows.append(row)
        if not find_spec(package):
            row["error"] = f"{package} is not installed"
            keep(f"{name}: {row['error']}")
            continue
        row["package"] = f"{package} {version(package)}"
        for seed in range(seeds if name in SEEDED else 1):
            gc.collect()  # what the last one leaves would count in the next one's peak
            try:
                row["runs"].append(run(replace(spec, seed=seed)) | {"seed": seed})
            except (PeftlabError, RuntimeError, ValueError, TypeError, ImportError, AttributeError) as error:
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
                keep(f"{name}: {row['error']}")
                break
            if stands_for:
                del row["runs"][-1]["score"]  # random weights have learned nothing
            keep(f"{name}, seed {seed}: {_said(row['runs'][-1])}")
    if any(row["name"] == YARDSTICK and row["runs"] for row in rows):
        out.with_suffix(".svg").write_text(chart(document, YARDSTICK))
    return document


def record_gears(spec: RunSpec, out: Path, say: Say = print) -> dict[str, Any]:
    """The gear of every method on the model and task of `spec`, to `out`."""
    spec = resolve_here(spec)
    document = provenance() | {"kind": "gears", "spec": spec.to_dict(), "methods": []}
    for method in METHODS:
        row = _gear(spec.model, spec.task, method)
        document["methods"].append(row)
        say(f"{method}: {row.get('gear')} {row.get('why_eager') or row.get('error') or ''}")
        _write(document, out)
    return document


def _write(document: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


def _floor(spec: Resolved) -> float | None:
    """Seconds that a step's products take at the GPU's dense bf16 peak; None on a CPU."""
    if spec.gpu is None:
        return None
    task, tokenizer = tasks.find(spec.task), weights.load(spec).tokenizer
    lengths = [len(pair) for pair in encode(tokenizer, task, task.train)]
    tokens = spec.batch_size * sum(lengths) / len(lengths)
    return compute(spec).per_token * tokens / peak(spec.gpu)


def _gear(model: str | None, task: str | None, method: str) -> dict[str, Any]:
    """Which gear a method trains in by default, why not the graph, and seconds a step after the first few."""
    row: dict[str, Any] = {"method": method}
    try:
        found = pace(resolve(RunSpec(model=model, task=task, method=method)), GEAR_STEPS)
        row |= {"gear": found.gear, "why_eager": found.why_eager, "step_seconds": found.seconds}
        row["not_fused"] = list(found.not_fused)
    except (PeftlabError, RuntimeError) as error:
        row["error"] = str(error).splitlines()[0][:300]
    return row


def _said(run: dict[str, Any]) -> str:
    score = f", score {run['score']:.2f}" if "score" in run else ""
    return f"{1000 * run['step_seconds']:.1f} ms a step, {run['tokens_per_second']:,.0f} tokens/s{score}"
