"""One training loop for every method. It yields small dicts, saves to disk, and cleans up after itself.

Where the time goes on a GPU: not into waiting for numbers. Steps are queued, and their losses fetched a few times a second.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from .. import adapters, fused, hardware, methods
from ..base import architecture as architectures
from ..base import weights
from ..count import count
from ..data import tasks
from ..data.tasks import Task
from ..errors import RunError, SpecError
from ..memory import exact
from ..memory.states import workspace
from ..seeded import seeded
from ..spec import Resolved
from . import packing
from .batches import Batch, Batches, Pair, encode
from .gears import CaptureError, Eager, Step, choose
from .generate import Answer, answer, mean_score, nats_per_token

STOP = "stop"
"""A file of this name in a run's folder ends the run after the step in progress. A file, because the worker process that
trains on a shared GPU has nothing else in common with the page."""
EVALUATIONS = 3
"""Times the held-out metric is measured: before, along the way and after."""
EXAMPLES = 3
WARMUP = 0.1
PAUSE = 0.15
"""Seconds of steps between two looks at their losses: the page is told at least five times a second."""
HOPELESS = 1.5
"""A loss this many times that of guessing tokens at random is no longer learning."""
WARM_STEPS = 6
"""Enough for a batch of each width to be captured."""
PATIENCE = 3
"""Hopeless steps in a row that end a run."""
SNAPSHOTS = 10
"""Times in a run that its parameters are put by, should it diverge."""
SMALL = 64e6
"""Bytes of trained parameters up to which they are put by on their own device, which is sooner done."""

Event = dict[str, Any]


class Pace(NamedTuple):
    gear: str
    why_eager: str
    seconds: float
    """Of a usual step."""
    not_fused: tuple[str, ...]


def train(spec: Resolved, out: Path, eager: bool = False, plain: bool = False) -> Iterator[Event]:
    """Fine-tunes and yields events; `out` gets the adapter. Raises SpecError before and RunError during the run.

    To measure what they are worth: `eager` takes no graph, `plain` no fused operations.
    Events: `start`, then `eval` (the task's metric, held out), `step` (loss in nats per answer token, seconds, eta) and
    `progress` (of an evaluation), at last `done`, whose keys are those of the command line's contract.
    """
    _check(spec)
    task = tasks.find(spec.task)
    rows = tasks.drawn(task, spec.training_rows or None, spec.seed)
    report = count(spec)
    if (out / STOP).exists():
        (out / STOP).unlink()
        yield _unlearned(0.0)
        return
    yield {"type": "loading", "model": report.model_name}
    base = weights.load(spec)
    pairs = encode(base.tokenizer, task, rows)
    _check_lengths(pairs, spec)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"out={out}: no folder can be made there ({error.strerror}); give another one") from None
    with closing(_Run(spec, task, base, out, pairs, eager, plain)) as run:
        yield {"type": "start", "spec": spec.to_dict(), "model": report.model_name, "source": base.source.where,
               "trainable_parameters": report.trainable_parameters, "trainable_percent": report.trainable_percent,
               "heldout": len(task.heldout), "metric": task.metric, "gear": run.gear.name,
               "why_eager": run.gear.why, "packed": run.gear.packs, "fused": run.fused.counts(),
               "not_fused": list(run.fused.kept)}  # fmt: skip
        yield from run.events()


def warm_up(spec: Resolved) -> None:
    """On a GPU of our own, runs a resolved spec's kernels once, whose first use takes seconds; nothing is kept."""
    if hardware.here().device != "cuda" or os.environ.get("SPACES_ZERO_GPU"):
        return
    base, task = weights.load(spec), tasks.find(spec.task)
    pairs = encode(base.tokenizer, task, task.train)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(_Run(dataclasses.replace(spec, steps=WARM_STEPS), task, base, Path(folder), pairs)) as run,
    ):
        run.rehearse(WARM_STEPS)
        for model in (base.quick, run.model.eval()):
            for _ in answer(model, base.tokenizer, dataclasses.replace(task, max_new_tokens=4), task.heldout):
                pass


def pace(spec: Resolved, steps: int = 2 * WARM_STEPS) -> Pace:
    """How a spec trains here, once half of `steps` have warmed it up; nothing is kept. Raises SpecError and RunError."""
    spec = dataclasses.replace(spec, steps=steps)
    _check(spec)
    base, task = weights.load(spec), tasks.find(spec.task)
    pairs = encode(base.tokenizer, task, task.train)
    with tempfile.TemporaryDirectory() as folder, closing(_Run(spec, task, base, Path(folder), pairs)) as run:
        run.rehearse(steps // 2)
        seconds = run.rehearse(steps - steps // 2)
        return Pace(run.gear.name, run.gear.why, seconds, run.fused.kept)


def _unlearned(seconds: float) -> Event:
    """The last event of a run that was stopped before its first step."""
    message = "Stopped before the first step: nothing was learned, so there is no adapter."
    return {
        "type": "done", "adapter": None, "steps": 0, "stopped": True, "seconds": seconds, "message": message,
    }  # fmt: skip


def _check(spec: Resolved) -> None:
    """What this engine cannot run, refused before anything is loaded."""
    later = {"sharding": "none", "offload": "none", "n_gpus": 1}
    for name, only in later.items():
        if getattr(spec, name) != only:
            raise SpecError(
                f"{name.replace('_', '-')}={getattr(spec, name)}: training runs with {only} only; set it to {only}"
            )
    if spec.precision == "amp" and hardware.here().device == "cpu":
        raise SpecError("precision=amp: mixed precision needs a CUDA GPU; use fp32 or bf16 here")


def _check_lengths(pairs: Sequence[Pair], spec: Resolved) -> None:
    longest = max(map(len, pairs))
    if longest > spec.sequence_length:
        raise SpecError(
            f"sequence-length={spec.sequence_length}: the longest example of {spec.task} has {longest} tokens; "
            f"set it to {longest} or more"
        )


def _attached(base: weights.Base, spec: Resolved) -> Any:
    """A private copy of the base with the method attached; only the method's own parameters require gradients."""
    shape = architectures.of(spec.model)
    targets = methods.targets(shape, spec, base.entry.name)
    with seeded(spec.seed):
        model = methods.find(spec.method).attach(weights.share(base.model), targets, spec)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _quickened(model: Any, spec: Resolved, plain: bool = False) -> fused.Fused:
    """What of a private copy's operations is fused from now on; nothing where it is to stay `plain`."""
    if why := "as asked" if plain else fused.why_not(spec):
        return fused.Fused(kept=(f"all operations ({why})",))
    return fused.quicken(model, spec.hold_outputs)


def _drops(model: Any) -> bool:
    """Whether a training step draws random numbers: any dropout, of the method or the model's own."""
    names = ("p", "dropout", "attention_dropout", "activation_dropout", "hidden_dropout")
    chances = (getattr(module, name, 0) for module in model.modules() for name in names)
    return any(isinstance(chance, float) and chance > 0 for chance in chances)


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0): a short linear rise, then a linear fall to zero."""
    rise = max(1, round(WARMUP * steps))
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise + 1)


class _Run:
    """The state of one run, so that whatever ends it finds what it needs."""

    def __init__(
        self,
        spec: Resolved,
        task: Task,
        base: weights.Base,
        out: Path,
        pairs: Sequence[Pair],
        eager: bool = False,
        plain: bool = False,
    ) -> None:
        self.spec, self.task, self.base, self.out = spec, task, base, out
        self.good: tuple[int, list[Any]] = (0, [])
        self.snapshots: deque[tuple[int, list[Any]]] = deque()
        self.every = max(1, spec.steps // SNAPSHOTS)
        self.hopeless = 0
        self.steps_done = self.saved_at = self.tokens = 0
        self.pending: list[Any] = []
        self.stride = 1
        self.losses: list[float] = []
        self.began = time.perf_counter()
        self.training_seconds = 0.0
        self.scores: list[float] = []
        self.answers: list[list[Answer]] = []
        self.largest = (0, 0, 0)
        self.highest: int | None = None
        self.batches = Batches(
            pairs, spec.batch_size, spec.accumulation, spec.seed, base.tokenizer.pad_token_id,
            pinned=base.device == "cuda",
        )  # fmt: skip
        try:
            self._attach(eager, plain)
        except BaseException:
            self.close()  # nobody else has it yet
            raise

    def _attach(self, eager: bool, plain: bool) -> None:
        spec = self.spec
        self.model = model = _attached(self.base, spec)
        self.fused = _quickened(model, spec, plain)
        self.gear: Eager = Eager(Step(model, spec), "asked for") if eager else choose(model, spec, self.base.device)
        self.draws = _drops(model)
        if not eager and not plain and self.base.device == "cpu":
            why = "dropout draws for each" if self.draws else packing.why_not(model, self.batches.widths[-1])
            self.gear.packs = not why
            if why:
                self.fused = dataclasses.replace(self.fused, kept=(*self.fused.kept, f"rows side by side ({why})"))
        self.trained = self.gear.step.trained
        small = sum(p.numel() * p.element_size() for p in self.trained) < SMALL
        self.keep = self.base.device if small else "cpu"

    @property
    def adapter(self) -> Path:
        return self.out / "adapter"

    def stopped(self) -> bool:
        return (self.out / STOP).exists()

    def close(self) -> None:
        """Keeps what was learned when the run ends early: a closed tab, an error, a stop."""
        try:
            if self.steps_done > self.saved_at:
                self._save()
        finally:
            (self.out / STOP).unlink(missing_ok=True)
            if getattr(self, "gear", None):
                self.gear.close()
            self.gear = self.trained = self.model = None  # type: ignore[assignment]
            traceback.clear_frames(sys.exc_info()[2])  # an error's frames hold the model until it has been told
            gc.collect()  # peft's wrappers refer to each other, and hold the GPU's memory until they are found

    def _save(self, result: Event | None = None) -> None:
        adapters.save(self.model, self.spec, self.adapter, result)
        self.saved_at = self.steps_done

    def events(self) -> Iterator[Event]:
        steps = self.spec.steps
        yield from self._evaluate("before")
        checks = {round(steps * i / (EVALUATIONS - 1)) for i in range(1, EVALUATIONS - 1)}
        stream = iter(self.batches)
        self._reset_peak()
        while self.steps_done < steps and not self.stopped():
            began, at = time.perf_counter(), self.steps_done
            stops = (steps, *checks, at + self.stride)
            for _ in range(at, min(stop for stop in stops if stop > at)):
                yield from self._launch(next(stream))
            yield from self._fetch(began)
            if self.steps_done in checks and self.steps_done < steps:
                self._note_peak()
                self._save()
                yield from self._evaluate("during")
                self._reset_peak()
        self._note_peak()
        stopped = self.steps_done < steps
        if not self.steps_done:
            yield _unlearned(self._seconds())
            return
        self._save()
        (self.out / STOP).unlink(missing_ok=True)  # a second stop ends the last evaluation
        yield from self._evaluate("after")
        finished = len(self.scores) > 1 and not self.stopped()
        done = {
            "type": "done",
            "adapter": str(self.adapter),
            "steps": self.steps_done,
            "stopped": stopped,
            "seconds": self._seconds(),
            "training_seconds": self.training_seconds,
            "tokens_per_second": self.tokens / self.training_seconds,
            "train_loss": self.losses[-1],
            "eval": {
                "before": {self.task.metric: self.scores[0]} if self.scores else None,
                "after": {self.task.metric: self.scores[-1]} if finished else None,
                "items": len(self.task.heldout),
            },
            "forgetting": self._forgetting() if finished else None,
            "predicted_peak_bytes": self._predicted_peak(),
            "measured_peak_bytes": self.highest,
            "device": hardware.here().name,
        }
        self._save(done | ({"heldout": self._heldout()} if finished else {}))
        yield done

    def _forgetting(self) -> float:
        """How many more nats a token ordinary prose costs than it cost the base, which the first run of a base measures."""
        known = self.base.measured
        if "prose" not in known:
            known["prose"] = nats_per_token(self.base.quick, self.base.tokenizer)
        return nats_per_token(self.model, self.base.tokenizer) - known["prose"]

    def _heldout(self) -> list[Event]:
        """Every held-out row with what the model said before and after, for the adapter's manifest."""
        return [
            {"prompt": b.prompt, "reference": b.reference, "base": b.text, "base_score": b.score, "adapted": a.text,
             "adapted_score": a.score}
            for b, a in zip(self.answers[0], self.answers[-1], strict=True)
        ]  # fmt: skip

    def _seconds(self) -> float:
        return time.perf_counter() - self.began

    def rehearse(self, steps: int) -> float:
        """Takes steps that are not to be kept, and gives the usual one's seconds. Raises RunError."""
        began = time.perf_counter()
        try:
            for pieces in itertools.islice(self.batches, steps):
                for _ in self._launch(pieces):
                    pass
            seconds = [event["seconds"] for event in self._fetch(began)]
        finally:
            self.saved_at = self.steps_done
        return statistics.median(seconds)

    def _launch(self, pieces: list[Batch]) -> Iterator[Event]:
        """Queues one step; tells when the gear had to be changed for it."""
        step = self.steps_done + len(self.pending)
        self.model.train()
        rate = self.spec.learning_rate * _rate(step, self.spec.steps)
        drawing = functools.partial(seeded, self.spec.seed * 1_000_003 + step) if self.draws else nullcontext
        why = ""
        with drawing():
            try:
                self.pending.append(self.gear.run(pieces, rate))
            except CaptureError as error:
                why = str(error)
        if why:  # no longer handling the error, which would hold on to the memory of the step that failed
            self.gear.close()
            self.gear = Eager(self.gear.step, why)
            yield {"type": "gear", "gear": self.gear.name, "why_eager": why}
            with drawing():
                self.pending.append(self.gear.run(pieces, rate))
        if (step + 1) % self.every == 0:
            with self.gear.order():
                self.snapshots.append((step + 1, self._copies()))
        self.tokens += sum(piece.tokens for piece in pieces)
        self.largest = max(self.largest, *(piece.shape for piece in pieces), key=lambda shape: shape[0] * shape[1])

    def _fetch(self, began: float) -> Iterator[Event]:
        """Waits for the queued steps, which `began` then, and tells their losses. Raises RunError where they diverged."""
        results, self.pending = self.gear.fetch(self.pending), []
        spent, spec = time.perf_counter() - began, self.spec
        self.training_seconds += spent
        self.stride = max(1, int(PAUSE * len(results) / spent))
        events, failure = [], None
        for loss, norm in results:
            try:
                self._check_sane(loss, norm)
            except RunError as error:
                failure = error
                break
            self.steps_done += 1
            self.losses.append(loss)
            left = (spec.steps - self.steps_done) * self.training_seconds / self.steps_done
            events.append({
                "type": "step", "step": self.steps_done, "steps": spec.steps, "loss": loss, "gradient_norm": norm,
                "seconds": spent / len(results), "eta_seconds": left,
                "learning_rate": spec.learning_rate * _rate(self.steps_done - 1, spec.steps),
                "examples": self.steps_done * spec.batch_size * spec.accumulation,
            })  # fmt: skip
        yield from events
        if failure:
            raise failure

    def _copies(self) -> list[Any]:
        import torch

        copies = [torch.empty_like(p, device=self.keep) for p in self.trained]
        torch._foreach_copy_(copies, [p.detach() for p in self.trained])
        return copies

    def _check_sane(self, loss: float, norm: float) -> None:
        """Ends a run whose next loss or gradient is not finite, or whose loss stays far above that of guessing at random.

        What it had learned when the loss was last seen to be sound is put back and saved. Raises RunError.
        """
        import torch

        guessing = math.log(self.model.config.vocab_size)
        self.hopeless = self.hopeless + 1 if loss > HOPELESS * max([guessing, *self.losses[:1]]) else 0
        if math.isfinite(loss) and math.isfinite(norm) and self.hopeless < PATIENCE:
            while self.snapshots and self.snapshots[0][0] <= self.steps_done:
                snapshot = self.snapshots.popleft()
                if not self.hopeless:  # this loss is the first that comes from it
                    self.good = snapshot
            return
        what = f"loss is {loss:.3g}" if not math.isfinite(loss) or self.hopeless else f"gradient's norm is {norm:.3g}"
        failed, (self.steps_done, tensors) = self.steps_done + 1, self.good
        self.saved_at = self.steps_done
        kept = "Nothing had been learned before that"
        if self.steps_done:
            with torch.no_grad():
                for parameter, tensor in zip(self.trained, tensors, strict=True):
                    parameter.copy_(tensor)
            self._save()
            kept = f"The adapter as it was after step {self.steps_done} is kept"
        rate = self.spec.learning_rate
        raise RunError(
            f"the {what} at step {failed}: training diverged at a learning rate of {rate:g}; try {rate / 4:g}. {kept}."
        )

    def _evaluate(self, when: str) -> Iterator[Event]:
        """The held-out metric; before, that of the base itself, since untrained virtual tokens already change what it says,
        measured by the first run of a task. A stop before or during it leaves it unmeasured.
        """
        if self.stopped():
            return
        known = self.base.measured
        task, answers = known.get("answers", (None, [])) if when == "before" else (None, [])
        model = self.base.quick if when == "before" else self.model.eval()
        begun = time.perf_counter()
        work: Generator[float, None, list[Answer]] = answer(model, self.base.tokenizer, self.task, self.task.heldout)
        while task != self.task:
            try:
                share = next(work)
            except StopIteration as finished:
                task, answers = self.task, finished.value
                break
            if self.stopped():
                work.close()
                return
            yield {"type": "progress", "what": "measuring the held-out score", "share": share}
        if when == "before":
            known["answers"] = task, answers
        self.scores.append(mean_score(answers))
        self.answers.append(answers)
        yield {
            "type": "eval",
            "when": when,
            "step": self.steps_done,
            "metrics": {self.task.metric: self.scores[-1]},
            "items": len(answers),
            "seconds": time.perf_counter() - begun,
            "examples": [a.__dict__ for a in answers[:EXAMPLES]],
        }

    def _reset_peak(self) -> None:
        import torch

        if self.base.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _note_peak(self) -> None:
        """Keeps the most bytes that the CUDA allocator held during steps, but for other base models."""
        import torch

        if self.base.device == "cuda":
            others = weights.allocated() - weights.allocated(self.base)
            self.highest = max(self.highest or 0, torch.cuda.max_memory_allocated() - others)

    def _predicted_peak(self) -> int | None:
        """Of a step with the largest batch, and what stays beside it: the base where training has its own copy, and cuBLAS's
        workspace for the stream that evaluates. None on a CPU, and for a step that cannot be traced.
        """
        if self.highest is None:
            return None
        batch, width, start = self.largest
        spec = dataclasses.replace(self.spec, batch_size=batch, sequence_length=max(width, 8))
        own = {p.data_ptr() for p in self.model.parameters()}
        beside = sum(p.nbytes for p in self.base.model.parameters() if p.data_ptr() not in own)
        try:
            return exact(spec, logits=width - start, quick=True).allocated + beside + workspace(spec.gpu)
        except SpecError:  # the run itself is done, and is not to end by this
            return None
