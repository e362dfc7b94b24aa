"""transformers' Trainer on a model to which peft has attached the adapter."""

from __future__ import annotations

import tempfile
from itertools import islice
from typing import TYPE_CHECKING, Any

from ...base import weights
from ...run.batches import IGNORED, Batch
from ...run.gears import CLIP
from ...run.model import attached
from ...seeded import seeded
from ...spec import Json, Resolved
from . import YARDSTICK, Peer, _shared, register

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Trainer


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


def columns(batch: Batch) -> dict[str, Tensor]:
    """A batch as collators that pad on the right give it to a model: each column has rows × width numbers."""
    import torch

    ids, labels = batch.data
    width = ids.shape[1]
    last = width - 1 - labels.ne(IGNORED).flip(1).int().argmax(1, keepdim=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(width) <= last).long()}


def timed(trainer: Trainer, spec: Resolved, tokens: int) -> Json:
    """Trains and returns what `Watch.finish` does, for `tokens` that are read in all."""
    from transformers import TrainerCallback

    watch = _shared.Watch()

    class Ends(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            watch.step()

    trainer.add_callback(Ends())
    with seeded(spec.seed):
        trainer.train()
    return watch.finish(tokens)


def run(spec: Resolved, **more: object) -> Json:
    """`more` are further fields of TrainingArguments."""
    from transformers import Trainer, TrainingArguments

    base = weights.load(spec)
    model = attached(base, spec)
    batches = [batch.trimmed() for batch in islice(_shared.batches(base, spec), spec.steps)]
    dataset: Any = [columns(batch) for batch in batches]  # a list serves as a Dataset
    given = arguments(spec, base.device, **more)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(output_dir=folder, **given),
            train_dataset=dataset,
            data_collator=lambda items: items[0],
            optimizers=_shared.optimizer(model, spec),
        )
        trainer._get_train_sampler = lambda *_: None  # type: ignore[method-assign]  # in our order
        found = timed(trainer, spec, sum(batch.tokens for batch in batches))
    return found | {"score": _shared.score(model, base, spec), "arguments": given}


register(Peer(YARDSTICK, "accelerate", run, turn=1, seeded=True))
