"""The training loop: one run's model, gear and batches, its steps, queued so that no GPU waits, and what is kept of it."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import Module

from .. import adapters, fused, hardware, methods
from ..base import architecture, weights
from ..data import tasks
from ..errors import Diverged, PeftlabError, RunError, SpecError
from ..resolve import resolve
from ..seeded import seeded
from ..spec import Json, Resolved
from .batches import Batch, Batches, pairs_of, why_not_packed
from .events import Event
from .files import LEAVE, STOP
from .gears import CaptureError, Eager, Graph, Step, schedule, why_eager

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAUSE = 0.15
"""Seconds of steps between two looks at their losses: the page is told at least five times a second."""
DROPOUTS = ("p", "dropout", "attention_dropout", "activation_dropout", "hidden_dropout")
"""Attributes in which modules keep their chance of dropping a number."""
HOPELESS = 1.5
"""A loss this many times that of guessing tokens at random no longer learns."""
PATIENCE = 3
"""A run ends after so many hopeless steps in a row."""
SNAPSHOTS = 10
"""How many times in a run its parameters are copied."""
SMALL = 64e6
"""Parameters of fewer bytes than this are copied on their own device, which is faster; others go to main memory."""


def attached(base: weights.Base, spec: Resolved) -> PreTrainedModel:
    """A private copy of the base with the method attached, whose parameters alone require gradients. Raises SpecError."""
    targets = methods.targets(architecture.of(spec.model), spec, base.entry.name)
    with seeded(spec.seed):
        model = cast("PreTrainedModel", methods.find(spec.method).attach(weights.share(base.model), targets, spec))
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def quickened(model: Module, spec: Resolved, plain: bool = False) -> fused.Fused:
    """Fuses the operations of a private copy and says which; none where it is to stay `plain`."""
    if why := "as asked" if plain else fused.why_not(spec):
        return fused.Fused(kept=(f"all operations ({why})",))
    return fused.quicken(model, spec.hold_outputs)


def draws(model: Module) -> bool:
    """Whether a training step draws random numbers, for a dropout of the method or of the model itself."""
    chances = (getattr(module, name, 0) for module in model.modules() for name in DROPOUTS)
    return any(isinstance(chance, float) and chance > 0 for chance in chances)


class Snapshots:
    """Copies of the trained parameters. One counts as sound once the next step's loss, which comes from it, is sound."""

    def __init__(self, trained: Sequence[Tensor], steps: int, vocabulary: int) -> None:
        self.trained, self.guessing = trained, math.log(vocabulary)
        self.device = trained[0].device if sum(p.nbytes for p in trained) < SMALL else "cpu"
        self.every = max(1, steps // SNAPSHOTS)
        self.unproven: deque[tuple[int, list[Tensor]]] = deque()
        self.sound: tuple[int, list[Tensor]] = (0, [])
        self.hopeless = 0

    def take(self, step: int) -> None:
        """Copies the parameters as they are after `step`."""
        copies = [torch.empty_like(p, device=self.device) for p in self.trained]
        torch._foreach_copy_(copies, [p.detach() for p in self.trained])
        self.unproven.append((step, copies))

    def judge(self, done: int, loss: float, norm: float, first: float) -> str:
        """What is wrong with the loss or the gradient that comes after `done` steps, in words; empty where both are sound.

        A loss (nats a token) is hopeless while it is far above both that of guessing and the run's `first` one.
        """
        self.hopeless = self.hopeless + 1 if loss > HOPELESS * max(self.guessing, first) else 0
        if not (math.isfinite(loss) and math.isfinite(norm)) or self.hopeless >= PATIENCE:
            by_loss = not math.isfinite(loss) or self.hopeless
            return f"loss is {loss:.3g}" if by_loss else f"gradient's norm is {norm:.3g}"
        while self.unproven and self.unproven[0][0] <= done:
            snapshot = self.unproven.popleft()
            if not self.hopeless:
                self.sound = snapshot
        return ""

    def restore(self) -> int:
        """Puts the last sound parameters back, and returns the step they come from; 0 where nothing had been learned."""
        step, tensors = self.sound
        with torch.no_grad():
            for parameter, tensor in zip(self.trained, tensors, strict=bool(step)):
                parameter.copy_(tensor)
        return step


class Run:
    """A run under way. Whoever makes it has to close it, whatever happens: then what was learned is kept."""

    def __init__(self, spec: Resolved, out: Path, eager: bool = False, plain: bool = False) -> None:
        """Loads the base and attaches the method; `out` becomes the run's folder. Raises SpecError and WeightsError."""
        self.spec, self.out, self.adapter, self.task = spec, out, out / "adapter", tasks.find(spec.task)
        self.base = base = weights.load(spec)
        pairs = pairs_of(base, self.task, tasks.drawn(self.task, spec.training_rows, spec.seed))
        if (longest := max(map(len, pairs))) > spec.sequence_length:
            raise SpecError(
                f"sequence-length={spec.sequence_length}: the longest example of {spec.task} has {longest} tokens; "
                f"set it to {longest} or more"
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(f"out={out}: no folder can be made there ({error.strerror}); give another one") from None
        pad, pinned = base.tokenizer.pad_token_id, base.device == "cuda"
        self.batches = Batches(pairs, spec.batch_size, spec.accumulation, spec.seed, pad, pinned)
        self.began, self.training_seconds = time.perf_counter(), 0.0
        self.steps_done = self.saved_at = self.tokens = 0
        self.pending: list[Tensor] = []
        """Loss and gradient norm of each step that is queued, on the device."""
        self.stride = 1
        """How many steps are queued between two looks at their losses."""
        self.losses: list[float] = []
        self.largest = (0, 0, 0)
        """Shape of the batch with the most tokens."""
        try:
            self._attach(eager, plain)
        except BaseException:
            self.close()  # since the caller has no run to close
            raise

    def _attach(self, eager: bool, plain: bool) -> None:
        spec = self.spec
        self.model = model = attached(self.base, spec)
        model.train()  # all modules alike, so that the outermost tells how all of them are
        self.fused = quickened(model, spec, plain)
        why = "asked for" if eager else why_eager(spec, self.base.device)
        self.gear: Eager = Eager(Step(model, spec), why) if why else Graph(Step(model, spec, capturable=True))
        self.draws = draws(model)
        if not eager and not plain and self.base.device == "cpu":
            why = "dropout draws for each" if self.draws else why_not_packed(model, self.batches.widths[-1])
            self.gear.packs = not why
            if why:
                self.fused = dataclasses.replace(self.fused, kept=(*self.fused.kept, f"rows side by side ({why})"))
        self.trained = self.gear.step.trained
        self.snapshots = Snapshots(self.trained, spec.steps, model.config.vocab_size)

    def stopped(self) -> bool:
        return (self.out / STOP).exists()

    def leaving(self) -> bool:
        return (self.out / LEAVE).exists()

    def ending(self) -> bool:
        return self.stopped() or self.leaving()

    def save(self, result: Json | None = None) -> None:
        """Writes the adapter as it is now, with the run's last event where it has come to its end."""
        adapters.save(self.model, self.spec, self.adapter, result)
        self.saved_at = self.steps_done

    def close(self) -> None:
        """Keeps what was learned when the run ends early (a closed tab, an error, a stop), and lets go of the model."""
        try:
            if self.steps_done > self.saved_at:
                self.save()
        finally:
            (self.out / STOP).unlink(missing_ok=True)
            if hasattr(self, "gear"):
                self.gear.close()
            vars(self).clear()
            traceback.clear_frames(sys.exc_info()[2])  # an error's frames hold the model until it has been told
            gc.collect()  # peft's wrappers refer to each other, and hold the GPU's memory until they are found
            hardware.give_back()

    def rehearse(self, steps: int) -> float:
        """Takes steps that are not to be kept, and returns the usual one's seconds. Raises RunError."""
        began = time.perf_counter()
        try:
            for pieces in itertools.islice(self.batches, steps):
                for _ in self.launch(pieces):
                    pass
            return statistics.median(event["seconds"] for event in self.fetch(began))
        finally:
            self.saved_at = self.steps_done

    def launch(self, pieces: list[Batch]) -> Iterator[Event]:
        """Queues one step over `pieces`, and tells when the gear had to be changed for it."""
        step = self.steps_done + len(self.pending)
        if not self.model.training:  # to set two thousand modules takes as long as to launch a step
            self.model.train()
        rate = self.spec.learning_rate * schedule(step, self.spec.steps)
        drawing = functools.partial(seeded, self.spec.seed * 1_000_003 + step) if self.draws else nullcontext
        why, refused = "", None
        with drawing():
            try:
                self.pending.append(self.gear.run(pieces, rate))
            except CaptureError as error:
                why = str(error)
            except Exception as error:  # anybody's architecture, in transformers' and peft's code
                if step or isinstance(error, PeftlabError | torch.OutOfMemoryError):
                    raise
                refused = self._refused(error)
        if refused:
            raise refused
        if why:  # no longer handling the error, which would hold on to the memory of the step that failed
            self.gear.close()
            self.gear = Eager(self.gear.step, why)
            yield {"type": "gear", "gear": self.gear.name, "why_eager": why}
            with drawing():
                self.pending.append(self.gear.run(pieces, rate))
        if (step + 1) % self.snapshots.every == 0:
            with self.gear.order():
                self.snapshots.take(step + 1)
        self.tokens += sum(piece.tokens for piece in pieces)
        self.largest = max(self.largest, *(piece.shape for piece in pieces), key=lambda shape: shape[0] * shape[1])

    def fetch(self, began: float) -> Iterator[Event]:
        """Waits for the steps queued since `began` (perf_counter), and tells their losses. Raises RunError if it diverged."""
        results, self.pending = self.gear.fetch(self.pending), []
        spent, spec = time.perf_counter() - began, self.spec
        self.training_seconds += spent
        self.stride = max(1, int(PAUSE * len(results) / spent))
        events: list[Event] = []
        diverged = None
        for loss, norm in results:
            if what := self.snapshots.judge(self.steps_done, loss, norm, self.losses[0] if self.losses else 0.0):
                diverged = self._gone_back(what)  # before anything is told: the page may be closed while it is
                break
            self.steps_done += 1
            self.losses.append(loss)
            left = (spec.steps - self.steps_done) * self.training_seconds / self.steps_done
            events.append({
                "type": "step", "step": self.steps_done, "steps": spec.steps, "loss": loss, "gradient_norm": norm,
                "seconds": spent / len(results), "eta_seconds": left,
                "learning_rate": spec.learning_rate * schedule(self.steps_done - 1, spec.steps),
                "examples": self.steps_done * spec.batch_size * spec.accumulation,
                "tokens_per_second": self.tokens / self.training_seconds,
            })  # fmt: skip
        yield from events
        if diverged:
            raise diverged

    def _refused(self, error: Exception) -> RunError:
        """What the first step ended with, in one line."""
        reason, spec = " ".join(str(error).split())[:200], self.spec
        return RunError(
            f"the first step failed ({type(error).__name__}: {reason}): {methods.find(spec.method).name} does not train "
            f"{self.base.entry.name} with these settings; try another method, or report the model"
        )

    def _gone_back(self, what: str) -> Diverged:
        """Puts the last sound parameters back and saves them; returns the error that says so."""
        failed, rate = self.steps_done + 1, self.spec.learning_rate
        self.steps_done = self.saved_at = self.snapshots.restore()
        kept = "Nothing had been learned before that"
        if self.steps_done:
            self.save()
            kept = f"The adapter as it was after step {self.steps_done} is kept"
        usual = float(resolve(self.spec.but(learning_rate=None)).learning_rate or rate)
        lower = usual if usual < rate / 4 else rate / 4
        said = f"the {what} at step {failed}: training diverged at a learning rate of {rate:g}; try {lower:g}. {kept}."
        return Diverged(said, {"learning_rate": lower}, f"learning rate {lower:g}")
