"""A fine-tuning run from its spec to its adapter: what is refused, the order of its events, what it measures, its pace."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from .. import hardware
from ..base import configs, weights
from ..count import count
from ..data import tasks
from ..errors import DoesNotFit, PeftlabError, RunError, SpecError
from ..memory import exact, make_room
from ..memory.states import workspace
from ..resolve import cannot_run
from ..spec import SETTINGS, Json, Resolved
from .checkpoint import Checkpoint
from .events import Event, Work, progress
from .files import STOP
from .loop import Run
from .scoring import Answer, answer, base_answers, mean_score, nats_per_token

WARM_STEPS = 6
"""Enough steps for a batch of each width to be captured."""
MIDWAY = 10
"""On a CPU, where answers take as long as many steps, so many rows are scored midway."""


class Pace(NamedTuple):
    gear: str
    why_eager: str
    seconds: float
    """Of a usual step."""
    not_fused: tuple[str, ...]


def train(spec: Resolved, out: Path, eager: bool = False, plain: bool = False, resume: bool = False) -> Iterator[Event]:
    """Fine-tunes and yields events; `out` gets the adapter. Raises SpecError before and RunError during the run.

    To measure what they are worth: `eager` takes no graph, `plain` no fused operations. The events are `loading`, `start`,
    then `eval` (the held-out metric, before, midway and after), `step`, `gear` (where it changes), `note` (no checkpoints are
    kept any more) and `progress` (of an evaluation), and at last `done`.

    A file LEAVE in `out` ends it at once, with a checkpoint and without `done`. With `resume` the run goes on from the
    checkpoint that it left in `out` when it was killed or stopped. `resumed` follows `start` and says at which step: 0, with a
    message, where there is no checkpoint of this spec to be used.
    """
    _check(spec)
    report = count(spec)
    if (out / STOP).exists() and not resume:
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
        yield from _events(run, resume)


def _events(run: Run, resume: bool) -> Iterator[Event]:
    """The steps and evaluations of a run that has started, and its end."""
    steps, evaluation, checkpoint = run.spec.steps, Evaluation(run), Checkpoint(run)
    if resume:
        made, why = checkpoint.resume()
        if made:
            evaluation.restore(made)
        anew: Event = {"type": "resumed", "step": 0, "message": f"This run starts from the beginning: {why}."}
        yield anew if why else {"type": "resumed", "step": run.steps_done}
    else:
        checkpoint.remove()
    try:
        if not evaluation.answers:
            yield from evaluation.at("before")
    except (PeftlabError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # anybody's architecture, in transformers' code
        raise RunError(
            f"{run.base.entry.name} cannot answer the held-out rows ({type(error).__name__}: {configs.shown(error, 160)}); "
            "try another model, or report this one"
        ) from error
    middle, stream = round(steps / 2), run.batches.after(run.steps_done)
    while run.steps_done < steps and not run.ending():
        if run.steps_done == middle > 0 and len(evaluation.answers) == 1:
            yield from evaluation.at("during")
            continue
        began, at = time.perf_counter(), run.steps_done
        for _ in range(at, min(stop for stop in (steps, middle, at + run.stride) if stop > at)):
            yield from run.launch(next(stream))
        try:
            for n, event in enumerate(run.fetch(began)):
                yield evaluation.with_peak(event, look=n == 0)
        except RunError:
            checkpoint.remove()  # from there it would diverge again
            raise
        if checkpoint.due():
            yield from _noted(checkpoint.keep(evaluation.state()))
    if run.leaving():
        yield from _left(run, checkpoint, evaluation)
        return
    if not run.steps_done:
        yield _unlearned(time.perf_counter() - run.began)
        return
    stopped = run.steps_done < steps
    if stopped:
        yield from _noted(checkpoint.keep(evaluation.state()))
    (run.out / STOP).unlink(missing_ok=True)  # a second stop ends the last evaluation
    yield from evaluation.at("after")
    if run.leaving():
        yield from _left(run, checkpoint, evaluation)
        return
    done = _ended(run, evaluation, stopped)
    if not stopped:
        checkpoint.remove()
    yield done


def _left(run: Run, checkpoint: Checkpoint, evaluation: Evaluation) -> Iterator[Event]:
    """Keeps a run that leaves, as far as it has come."""
    if run.steps_done:
        yield from _noted(checkpoint.keep(evaluation.state()))


def _ended(run: Run, evaluation: Evaluation, stopped: bool) -> Event:
    """The last event of a run that has learned something. All of it but the adapter's place is saved with the adapter."""
    finished = len(evaluation.answers) > 1 and not run.stopped()
    done: Event = {  # its keys are those of the command line's contract
        "type": "done",
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
    run.save({**done, **({"heldout": evaluation.rows()} if finished else {})})
    return {**done, "adapter": str(run.adapter)}  # which tells of this machine, so no download has it


def _noted(message: str) -> Iterator[Event]:
    """The event that tells a message, where there is one."""
    if message:
        yield {"type": "note", "message": message}


def _unlearned(seconds: float) -> Event:
    """The last event of a run that was stopped before its first step."""
    said = "Stopped before the first step: nothing was learned, so there is no adapter."
    return {"type": "done", "adapter": None, "steps": 0, "stopped": True, "seconds": seconds, "message": said}


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
            self._see_peak()
            self.run.save()
        if self.run.ending():
            return
        begun, rows = time.perf_counter(), self.task.heldout
        if when == "during" and self.base.device == "cpu":
            rows = rows[:MIDWAY]
        if when == "before":
            work = base_answers(self.base, self.task)
        else:
            work = answer(self.run.model.eval(), self.base.tokenizer, self.task, rows)
        answers = yield from progress(work, "measuring the held-out score", self.run.ending)
        if answers is None:
            return
        self.answers.append(answers)
        yield {
            "type": "eval", "when": when, "step": self.run.steps_done, "metrics": self.score(-1), "items": len(answers),
            "seconds": time.perf_counter() - begun, "examples": [asdict(a) for a in answers[:3]],
        }  # fmt: skip
        if self.base.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def with_peak(self, step: Event, look: bool) -> Event:
        """A step's event, on a GPU with the peak so far; to `look` at it anew does not wait for the GPU."""
        if look:
            self._see_peak()
        if self.peak is not None:
            step["peak_bytes"] = self.peak
        return step

    def _see_peak(self) -> None:
        if self.base.device == "cuda":
            others = weights.allocated() - weights.allocated(self.base)
            self.peak = max(self.peak or 0, torch.cuda.max_memory_allocated() - others)

    def state(self) -> Json:
        """What a checkpoint keeps of it."""
        self._see_peak()
        return {"answers": [[asdict(a) for a in answers] for answers in self.answers], "peak": self.peak}

    def restore(self, state: Json) -> None:
        """Goes on from a checkpoint's `state`."""
        self.answers = [[Answer(**answer) for answer in answers] for answers in state["answers"]]
        self.peak = state["peak"]
        if self.base.device == "cuda":  # loading is no step
            torch.cuda.reset_peak_memory_stats()

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


def warm_up(spec: Resolved) -> None:
    """On a GPU of our own, runs a spec's kernels once, whose first use takes seconds; nothing is kept."""
    if hardware.here().device != "cuda" or hardware.is_shared():
        return
    try:
        make_room(spec)
    except DoesNotFit:  # the run says so itself
        return
    any_length = int(SETTINGS["sequence_length"].high or 0)  # warm whatever the rows' length
    short = replace(spec, steps=WARM_STEPS, sequence_length=any_length)
    with tempfile.TemporaryDirectory() as folder, closing(Run(short, Path(folder))) as run:
        run.rehearse(WARM_STEPS)
        task = replace(run.task, max_new_tokens=4)
        for model in (run.base.quick, run.model.eval()):
            Work(answer(model, run.base.tokenizer, task, task.heldout)).finished()


def pace(spec: Resolved, steps: int = 2 * WARM_STEPS) -> Pace:
    """How a spec trains here, once half of `steps` have warmed it up; nothing is kept. Raises SpecError and RunError."""
    spec = replace(spec, steps=steps)
    _check(spec)
    with tempfile.TemporaryDirectory() as folder, closing(Run(spec, Path(folder))) as run:
        run.rehearse(steps // 2)
        seconds = run.rehearse(steps - steps // 2)
        return Pace(run.gear.name, run.gear.why, seconds, run.fused.kept)


def _check(spec: Resolved) -> None:
    """Refuses what this engine cannot run or this machine's memory cannot hold, before anything is loaded."""
    tasks.drawn(tasks.find(spec.task), spec.training_rows)
    for name, why in cannot_run(spec).items():
        raise SpecError(f"{name.replace('_', '-')}={getattr(spec, name)}: {why}")
    make_room(spec)
