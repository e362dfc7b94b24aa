"""TRL's SFTTrainer on rows that are tokenized already, of which it makes its own batches."""

import tempfile
from importlib import import_module
from statistics import fmean

from ...base import weights
from ...run.model import attached
from ...spec import Json, Resolved
from . import Peer, _shared, register
from .trainer import arguments, timed


def run(spec: Resolved) -> Json:
    from datasets import Dataset

    trl = import_module("trl")
    base = weights.load(spec)
    model = attached(base, spec)
    pairs = _shared.pairs(base, spec)
    rows = [
        {"input_ids": p.prompt + p.answer, "completion_mask": [0] * len(p.prompt) + [1] * len(p.answer)} for p in pairs
    ]
    given = arguments(spec, base.device, per_device_train_batch_size=spec.batch_size)
    own = {"max_length": spec.sequence_length, "completion_only_loss": True, "gradient_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(output_dir=folder, **own, **given),
            train_dataset=Dataset.from_list(rows),
            processing_class=base.tokenizer,
            optimizers=_shared.optimizer(model, spec),
        )
        found = timed(trainer, spec, round(fmean(map(len, pairs)) * spec.batch_size * spec.steps))
    return found | {"score": _shared.score(model, base, spec), "arguments": given}


register(Peer("TRL SFTTrainer", "trl", run, turn=2))
