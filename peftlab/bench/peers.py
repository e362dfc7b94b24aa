"""The trainers that ours is held against. To add one, write how it trains, and name it among the PEERS."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..base import weights
from ..data import tasks
from ..resolve import resolve
from ..run import train, warm_up
from ..run.batches import IGNORED, PADDING, Batch, Batches, Pair, encode
from ..run.events import Work
from ..run.gears import CLIP, schedule
from ..run.loop import attached
from ..run.scoring import answer, mean_score
from ..seeded import seeded
from ..spec import Json, Resolved

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel, Trainer

YARDSTICK = "transformers Trainer"
"""The peer whose step the others' are compared with."""


@dataclass(frozen=True)
class Peer:
    name: str
    package: str
    """What it imports; a peer whose package is not installed is left out."""
    run: Callable[[Resolved], Json]
    """Trains a run, with its seed, and returns what `Watch.finish` does and the held-out `score`, from 0 to 1."""
    seeded: bool = False
    """Its scores are compared over several seeds; for the others one run is enough to tell the speed."""


class Watch:
    """Notes when each step ended, and how high the GPU's memory was."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.began = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def step(self) -> None:
        self.ends.append(time.perf_counter())

    def finish(self, tokens: int) -> Json:
        """Seconds to the end of the first step, of a usual step and in all; tokens a second; the peak in bytes, None on a CPU.

        `tokens` have been read, without padding.
        """
        peak = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        spent = time.perf_counter() - self.began
        return {
            "first_step_seconds": self.ends[0] - self.began,
            "step_seconds": statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False)),
            "training_seconds": spent,
            "tokens_per_second": tokens / spent,
            "peak_bytes": peak,
        }


def pairs(base: weights.Base, spec: Resolved) -> list[Pair]:
    """The training rows of the task as tokens."""
    task = tasks.find(spec.task)
    return encode(base.tokenizer, task, task.train)


def batches(base: weights.Base, spec: Resolved, padding: float = PADDING) -> Iterator[Batch]:
    """The same rows in the same order as our own training reads them, as many batches as steps."""
    made = Batches(pairs(base, spec), spec.batch_size, 1, spec.seed, base.tokenizer.pad_token_id, padding=padding)
    return (batch for (batch,) in islice(made, spec.steps))


def optimizer(model: PreTrainedModel, spec: Resolved) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW as the trainers have it by default, with our learning rates."""
    trained = [p for p in model.parameters() if p.requires_grad]
    made = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.0, fused=trained[0].is_cuda)
    last = spec.steps - 1
    return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: schedule(min(step, last), spec.steps))


def ours(spec: Resolved, eager: bool = False, plain: bool = False) -> Json:
    """Trains with evaluations, saving and all. `eager` takes no graph, `plain` no fused operations."""
    with tempfile.TemporaryDirectory() as folder:
        warm_up(spec)  # as the app does when it has loaded the model
        began = time.perf_counter()
        events = list(train(spec, Path(folder) / "run", eager=eager, plain=plain))
        whole = time.perf_counter() - began
    start, done = next(e for e in events if e["type"] == "start"), events[-1]
    steps = [e["seconds"] for e in events if e["type"] == "step"]
    return {
        "gear": next((e["gear"] for e in events if e["type"] == "gear"), start["gear"]),
        "not_fused": start["not_fused"],
        "first_step_seconds": steps[0],
        "step_seconds": statistics.median(steps),
        "training_seconds": done["training_seconds"],
        "tokens_per_second": done["tokens_per_second"],
        "peak_bytes": done["measured_peak_bytes"],
        "predicted_peak_bytes": done["predicted_peak_bytes"],
        "score": next(iter(done["eval"]["after"].values())),
        "click_to_saved_seconds": whole,
    }


def theirs(way: Callable[[weights.Base, PreTrainedModel, Resolved], Json], spec: Resolved) -> Json:
    """What a `way` to train returns of the base with the adapter attached, and the held-out score of what it has trained."""
    base = weights.load(spec)
    adapted, task = attached(base, spec), tasks.find(spec.task)
    found = way(base, adapted, spec)
    return found | {"score": mean_score(Work(answer(adapted.eval(), base.tokenizer, task, task.heldout)).finished())}


def arguments(spec: Resolved, device: str, **more: object) -> Json:
    """The settings that trainers are given: bf16 on a GPU, no saving, a line every 10 steps, no workers."""
    return {
        "per_device_train_batch_size": 1,  # an item is a whole batch, made as ours are
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


def columns(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as collators that pad on the right give it to a model: each column has rows × width numbers."""
    ids, labels = batch.data
    width = ids.shape[1]
    last = width - 1 - labels.ne(IGNORED).flip(1).int().argmax(1, keepdim=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(width) <= last).long()}


def timed(trainer: Trainer, spec: Resolved, tokens: int) -> Json:
    """Trains and returns what `Watch.finish` does, for `tokens` that are read in all."""
    from transformers import TrainerCallback

    watch = Watch()

    class Ends(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            watch.step()

    trainer.add_callback(Ends())
    with seeded(spec.seed):
        trainer.train()
    return watch.finish(tokens)


def by_trainer(base: weights.Base, model: PreTrainedModel, spec: Resolved, **more: object) -> Json:
    """By transformers' Trainer; `more` are further fields of TrainingArguments."""
    from transformers import Trainer, TrainingArguments

    read = [batch.trimmed() for batch in batches(base, spec)]
    dataset: Any = [columns(batch) for batch in read]  # a list serves as a Dataset
    given = arguments(spec, base.device, **more)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(output_dir=folder, **given),
            train_dataset=dataset,
            data_collator=lambda items: items[0],
            optimizers=optimizer(model, spec),
        )
        trainer._get_train_sampler = lambda *_: None  # type: ignore[method-assign]  # in our order
        return timed(trainer, spec, sum(batch.tokens for batch in read)) | {"arguments": given}


def by_trl(base: weights.Base, model: PreTrainedModel, spec: Resolved) -> Json:
    """By TRL's SFTTrainer on rows that are tokenized already, of which it makes its own batches."""
    from datasets import Dataset

    trl = import_module("trl")
    rows = [
        {"input_ids": p.prompt + p.answer, "completion_mask": [0] * len(p.prompt) + [1] * len(p.answer)}
        for p in pairs(base, spec)
    ]
    given = arguments(spec, base.device, per_device_train_batch_size=spec.batch_size)
    own = {"max_length": spec.sequence_length, "completion_only_loss": True, "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(output_dir=folder, **own, **given),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            optimizers=optimizer(model, spec),
        )
        usual = statistics.fmean(len(row["input_ids"]) for row in rows)
        return timed(trainer, spec, round(usual * spec.batch_size * spec.steps)) | {"arguments": given}


def compiled(base: weights.Base, model: PreTrainedModel, spec: Resolved) -> Json:
    """By a plain loop with torch.compile, which compiles each width: every batch is as wide as the longest row."""
    fast = torch.compile(model.train())
    steps, rates = optimizer(model, spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    read = list(batches(base, spec, padding=math.inf))
    watch = Watch()
    for batch in read:
        ids, labels = batch.data.to(base.device)
        logits = fast(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        steps.step()
        rates.step()
        steps.zero_grad(set_to_none=True)
        loss.item()  # waits for the step's end
        watch.step()
    return watch.finish(sum(batch.tokens for batch in read))


PEERS = {
    peer.name: peer
    for peer in (
        Peer("peftlab", "peft", ours, seeded=True),
        Peer("peftlab, bf16 adapters", "peft", lambda spec: ours(resolve(spec.but(adapter_precision="bf16")))),
        Peer("peftlab, nothing fused", "peft", partial(ours, plain=True)),
        Peer("peftlab, eager", "peft", partial(ours, eager=True)),
        Peer("plain eager loop", "peft", partial(ours, eager=True, plain=True)),
        Peer(YARDSTICK, "accelerate", partial(theirs, by_trainer), seeded=True),
        Peer("TRL SFTTrainer", "trl", partial(theirs, by_trl)),
        Peer("torch.compile", "torch", partial(theirs, compiled)),
        # Liger changes transformers' own classes, so it has to be the last.
        Peer("Trainer with Liger", "liger_kernel", partial(theirs, partial(by_trainer, use_liger_kernel=True))),
    )
}
