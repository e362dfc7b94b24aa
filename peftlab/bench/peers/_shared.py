"""What the peers share: the rows and their order, the optimizer, the clock, and the final evaluation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...base import weights
from ...data import tasks
from ...run.batches import PADDING, Batch, Batches, Pair, encode
from ...run.gears import schedule
from ...run.scoring import answer, mean_score
from ...spec import Json, Resolved
from .. import result_of

if TYPE_CHECKING:
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PreTrainedModel


class Watch:
    """Notes when each step ended, and how high the GPU's memory was."""

    def __init__(self) -> None:
        import torch

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
        import torch

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
    """The same rows in the same order as our own training reads them, without end."""
    made = Batches(pairs(base, spec), spec.batch_size, 1, spec.seed, base.tokenizer.pad_token_id, padding=padding)
    return (batch for (batch,) in made)


def optimizer(model: PreTrainedModel, spec: Resolved) -> tuple[AdamW, LambdaLR]:
    """AdamW as the trainers have it by default, with our learning rates."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    made = torch.optim.AdamW(trained, lr=spec.learning_rate, weight_decay=0.0, fused=trained[0].is_cuda)
    last = spec.steps - 1
    return made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: schedule(min(step, last), spec.steps))


def score(model: PreTrainedModel, base: weights.Base, spec: Resolved) -> float:
    """The task's metric on its held-out rows, from 0 to 1."""
    task = tasks.find(spec.task)
    return mean_score(result_of(answer(model.eval(), base.tokenizer, task, task.heldout)))
