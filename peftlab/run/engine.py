"""A fine-tuning run from its spec to its adapter: what is refused, the order of its events, and how fast it would be."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .. import hardware
from ..count import count
from ..data import tasks
from ..errors import SpecError
from ..resolve import cannot_run
from ..spec import SETTINGS, Resolved
from .evaluation import Evaluation
from .events import Event
from .loop import STOP, Run
from .scoring import answer

EVALUATIONS = 3
"""How often the held-out metric is measured: before, along the way and after."""
WARM_STEPS = 6
"""Enough steps for a batch of each width to be captured."""
ANY_LENGTH = int(SETTINGS["sequence_length"].high or 0)
"""Tokens: what is run to warm up is warm whatever the rows' length."""
UNLEARNED = "Stopped before the first step: nothing was learned, so there is no adapter."


class Pace(NamedTuple):
    gear: str
    why_eager: str
    seconds: float
    """Of a usual step."""
    not_fused: tuple[str, ...]


def train(spec: Resolved, out: Path, eager: bool = False, plain: bool = False) -> Iterator[Event]:
    """Fine-tunes and yields events; `out` gets the adapter. Raises SpecError before and RunError during the run.

    To measure what they are worth: `eager` takes no graph, `plain` no fused operations. The events are `loading`, `start`,
    then `eval` (the held-out metric), `step`, `gear` (where it changes) and `progress` (of an evaluation), and at last `done`.
    """
    _check(spec)
    report = count(spec)
    if (out / STOP).exists():
        (out / STOP).unlink()
        yield _unlearned(0.0)
        return
    yield {"type": "loading", "model": report.model_name}
    with closing(Run(spec, out, eager, plain)) as run:
        yield {
            "type": "start", "spec": spec.to_dict(), "model": report.model_name, "source": run.base.source.where,
            "trainable_parameters": report.trainable_parameters, "trainable_percent": report.trainable_percent,
            "heldout": len(run.task.heldout), "metric": run.task.metric, "gear": run.gear.name,
            "why_eager": run.gear.why, "packed": run.gear.packs, "fused": run.fused.counts(),
            "not_fused": list(run.fused.kept),
        }  # fmt: skip
        yield from _events(run)


def _events(run: Run) -> Iterator[Event]:
    """The steps and evaluations of a run that has started, and its end."""
    steps, evaluation = run.spec.steps, Evaluation(run)
    yield from evaluation.at("before")
    checks = {round(steps * i / (EVALUATIONS - 1)) for i in range(1, EVALUATIONS - 1)}
    stream = iter(run.batches)
    while run.steps_done < steps and not run.stopped():
        began, at = time.perf_counter(), run.steps_done
        for _ in range(at, min(stop for stop in (steps, *checks, at + run.stride) if stop > at)):
            yield from run.launch(next(stream))
        yield from run.fetch(began)
        if run.steps_done in checks and run.steps_done < steps:
            yield from evaluation.at("during")
    if not run.steps_done:
        yield _unlearned(time.perf_counter() - run.began)
        return
    stopped = run.steps_done < steps
    (run.out / STOP).unlink(missing_ok=True)  # a second stop ends the last evaluation
    yield from evaluation.at("after")
    finished = len(evaluation.answers) > 1 and not run.stopped()
    done = _done(run, evaluation, stopped, finished)
    run.save({**done, **({"heldout": evaluation.rows()} if finished else {})})
    yield done


def _done(run: Run, evaluation: Evaluation, stopped: bool, finished: bool) -> Event:
    """The last event, whose keys are those of the command line's contract."""
    return {
        "type": "done",
        "adapter": str(run.adapter),
        "steps": run.steps_done,
        "stopped": stopped,
        "seconds": time.perf_counter() - run.began,
        "training_seconds": run.training_seconds,
        "tokens_per_second": run.tokens / run.training_seconds,
        "train_loss": run.losses[-1],
        "eval": {
            "before": evaluation.score(0) if evaluation.answers else None,
            "after": evaluation.score(-1) if finished else None,
            "items": len(run.task.heldout),
        },
        "forgetting": evaluation.forgetting() if finished else None,
        "predicted_peak_bytes": evaluation.predicted_peak(),
        "measured_peak_bytes": evaluation.peak,
        "device": hardware.here().name,
    }


def _unlearned(seconds: float) -> Event:
    """The last event of a run that was stopped before its first step."""
    return {
        "type": "done", "adapter": None, "steps": 0, "stopped": True, "seconds": seconds, "message": UNLEARNED,
    }  # fmt: skip


def warm_up(spec: Resolved) -> None:
    """On a GPU of our own, runs a spec's kernels once, whose first use takes seconds; nothing is kept."""
    if hardware.here().device != "cuda" or os.environ.get("SPACES_ZERO_GPU"):
        return
    short = replace(spec, steps=WARM_STEPS, sequence_length=ANY_LENGTH)
    with tempfile.TemporaryDirectory() as folder, closing(Run(short, Path(folder))) as run:
        run.rehearse(WARM_STEPS)
        task = replace(run.task, max_new_tokens=4)
        for model in (run.base.quick, run.model.eval()):
            for _ in answer(model, run.base.tokenizer, task, task.heldout):
                pass


def pace(spec: Resolved, steps: int = 2 * WARM_STEPS) -> Pace:
    """How a spec trains here, once half of `steps` have warmed it up; nothing is kept. Raises SpecError and RunError."""
    spec = replace(spec, steps=steps)
    _check(spec)
    with tempfile.TemporaryDirectory() as folder, closing(Run(spec, Path(folder))) as run:
        run.rehearse(steps // 2)
        seconds = run.rehearse(steps - steps // 2)
        return Pace(run.gear.name, run.gear.why, seconds, run.fused.kept)


def _check(spec: Resolved) -> None:
    """Refuses what this engine cannot run, before anything is loaded."""
    tasks.drawn(tasks.find(spec.task), spec.training_rows)
    for name, why in cannot_run(spec).items():
        raise SpecError(f"{name.replace('_', '-')}={getattr(spec, name)}: {why}")
