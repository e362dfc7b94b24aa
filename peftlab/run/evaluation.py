"""What a run measures: held-out answers before, during and after it, what it forgot, and the peak memory of its steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Literal

import torch

from ..base import weights
from ..errors import SpecError
from ..memory import exact
from ..memory.states import workspace
from ..spec import Json
from .events import Event, progress
from .loop import Run
from .scoring import Answer, answer, mean_score, nats_per_token

EXAMPLES = 3
"""How many held-out rows are shown at each evaluation."""


class Evaluation:
    """The answers of a run's model to the held-out rows, and before it those of the base itself.

    Virtual tokens that have learned nothing already change what a model says, so "before" is never the adapted model. What
    a base says is kept with it, for the next run of the same task.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.base, self.task = run, run.base, run.task
        self.answers: list[list[Answer]] = []
        self.peak: int | None = None
        """Most bytes allocated during steps, without other base models; None on a CPU."""

    def at(self, when: Literal["before", "during", "after"]) -> Iterator[Event]:
        """Saves what was learned, then answers and scores the held-out rows. A stop leaves them unmeasured."""
        if when != "before":
            self._note_peak()
            self.run.save()
        if self.run.stopped():
            return
        begun = time.perf_counter()
        known: Json = self.base.measured if when == "before" else {}
        task, answers = known.get("answers", (None, []))
        if task != self.task:
            model = self.base.quick if when == "before" else self.run.model.eval()
            work = answer(model, self.base.tokenizer, self.task, self.task.heldout)
            said = yield from progress(work, "measuring the held-out score", self.run.stopped)
            if said is None:
                return
            known["answers"] = self.task, (answers := said)
        self.answers.append(answers)
        yield {
            "type": "eval", "when": when, "step": self.run.steps_done, "metrics": self.score(-1), "items": len(answers),
            "seconds": time.perf_counter() - begun, "examples": [asdict(a) for a in answers[:EXAMPLES]],
        }  # fmt: skip
        self._begin_peak()

    def score(self, which: int) -> dict[str, float]:
        """The task's metric at one of the evaluations: 0 the first, -1 the last."""
        return {self.task.metric: mean_score(self.answers[which])}

    def rows(self) -> list[Json]:
        """Every held-out row with what the model said first and last, for the adapter's manifest."""
        return [
            {"prompt": b.prompt, "reference": b.reference, "base": b.text, "base_score": b.score, "adapted": a.text,
             "adapted_score": a.score}
            for b, a in zip(self.answers[0], self.answers[-1], strict=True)
        ]  # fmt: skip

    def forgetting(self) -> float:
        """How many more nats a token ordinary prose costs than it cost the base, which is measured once."""
        known, tokenizer = self.base.measured, self.base.tokenizer
        if "prose" not in known:
            known["prose"] = nats_per_token(self.base.quick, tokenizer)
        return nats_per_token(self.run.model, tokenizer) - known["prose"]

    def _begin_peak(self) -> None:
        if self.base.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _note_peak(self) -> None:
        if self.base.device == "cuda":
            others = weights.allocated() - weights.allocated(self.base)
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated() - others)

    def predicted_peak(self) -> int | None:
        """Bytes of a step with the largest batch by the exact trace, and what stays beside it.

        That is the base, where training has its own copy of it, and cuBLAS's workspace for the stream that evaluates. None
        on a CPU, and for a step that cannot be traced.
        """
        if self.peak is None:
            return None
        rows, width, start = self.run.largest
        spec = replace(self.run.spec, batch_size=rows, sequence_length=max(width, 8))
        own = {p.data_ptr() for p in self.run.model.parameters()}
        beside = sum(p.nbytes for p in self.base.model.parameters() if p.data_ptr() not in own)
        try:
            traced = exact(spec, logits=width - start, quick=True).allocated
        except SpecError:  # the run itself is done, and is not to end by this
            return None
        return traced + beside + workspace(spec.gpu) if traced else None
