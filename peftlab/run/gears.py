"""How an optimizer step is run: each operation launched by Python, or all of it replayed as a CUDA graph, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.cuda import CUDAGraph
from torch.optim import Optimizer

from .. import fused, methods, optimizers, seam
from ..spec import Resolved
from . import graphs
from .batches import Batch, Packed, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLIP = 1.0
"""Largest norm that the gradient keeps."""
WARMUP = 0.1
"""Share of the steps over which the learning rate rises."""


class CaptureError(RuntimeError):
    """A step that cannot be captured; it has not been taken."""


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0): a short linear rise, then a linear fall to zero."""
    rise = max(1, round(WARMUP * steps))
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise + 1)


class Step:
    """Forward, backward, clipping and update, without asking the device for a number."""

    def __init__(self, model: PreTrainedModel, spec: Resolved, capturable: bool = False) -> None:
        self.model, self.spec, self.method = model, spec, methods.find(spec.method)
        self.device = model.device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(model, spec, capturable)
        self.head = fused.head(model)
        self.done = 0

    def set_rate(self, rate: float) -> None:
        """Sets the learning rate of the next step; a method may give some parameters a multiple of it."""
        for group in self.optimizer.param_groups:
            if hasattr(group["lr"], "fill_"):  # a tensor, which the graph reads
                group["lr"].fill_(rate * group["scale"])
            else:
                group["lr"] = rate * group["scale"]

    def __call__(self, pieces: Sequence[Batch | Packed], answers: Tensor | int) -> Tensor:
        """Takes a step over `pieces`, which hold so many `answers` (tokens to learn from).

        Returns two numbers on the device: the loss in nats per answer token, and the gradient's norm before clipping.
        """
        losses: list[Tensor] = []
        for piece in pieces:
            loss, held = self.loss(piece)
            loss = loss / answers
            penalty = self.method.penalty(self.model) / len(pieces) if self.method.penalty else 0.0
            (loss + penalty).backward()
            del held  # not before the backward pass
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.done += 1
        if self.method.after_step:
            self.method.after_step(self.model, self.done)
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(losses[1:], losses[0])
        return torch.stack((total, norm.to(total)))

    def loss(self, piece: Batch | Packed) -> tuple[Tensor, Tensor | None]:
        """Returns the sum of the cross-entropy over the answers' tokens, and the logits if the spec holds them."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.spec.precision == "amp"):
            out = seam.logits(self.model, **piece.inputs())
        loss = fused.cross_entropy(*piece.learned(out), self.head)
        return loss, out if self.spec.hold_outputs else None


def _optimizer(model: PreTrainedModel, spec: Resolved, capturable: bool) -> Optimizer:
    """The optimizer of the trained parameters, with a group for each learning rate that the method gives them."""
    rate, method = spec.learning_rate, methods.find(spec.method)
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(method.rate(name, spec), []).append(parameter)
    parameters = [{"params": group, "scale": scale} for scale, group in groups.items()]
    options = optimizers.capturable(spec) or {}
    if not capturable:  # on a CPU, an optimizer that can be fused takes its step in one operation
        options = {"fused": True} if options and model.device.type == "cpu" else {}
    made = optimizers.find(spec).make(parameters, rate, **options)
    for group in made.param_groups if capturable else ():
        group["lr"] = torch.tensor(rate, device=group["params"][0].device)
    return made


class Eager:
    """Python launches each operation: this runs any step, anywhere."""

    name = "eager"
    packs = False
    """Whether it reads the rows of a batch as one sequence."""

    def __init__(self, step: Step, why: str) -> None:
        self.step, self.why = step, why

    def order(self) -> AbstractContextManager[None]:
        """Launches what is within after all steps launched before it, and before all later ones."""
        return nullcontext()

    def close(self) -> None:
        """Waits for the steps under way; none may follow."""

    def run(self, pieces: Sequence[Batch], rate: float) -> Tensor:
        """Takes one step at a learning rate; returns what Step does."""
        self.step.set_rate(rate)
        moved = [piece.trimmed().to(self.step.device) for piece in pieces]
        return self.step([*map(pack, moved)] if self.packs else moved, sum(b.answers for b in pieces))

    def fetch(self, results: Sequence[Tensor]) -> list[list[float]]:
        """Waits for the steps that `results` come from; returns (loss, norm) of each."""
        with self.order():
            return torch.stack(list(results)).tolist()


@dataclass
class _Captured:
    graph: CUDAGraph
    pieces: list[Batch]
    answers: Tensor
    out: Tensor


class Graph(Eager):
    """One CUDA graph a shape of batch; the first batch runs eagerly, to warm up, as does one that cannot be recorded yet."""

    name = "graph"

    def __init__(self, step: Step) -> None:
        super().__init__(step, "")
        graphs.follow()
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[tuple, _Captured | None] = {}
        self.last: Sequence[Batch] = ()
        """The last step's batches, kept until the next one. Freeing memory that the GPU reads by itself marks its stream,
        and in the midst of another thread's recording that mark would be recorded."""

    def order(self) -> AbstractContextManager[None]:
        return graphs.apart()

    def run(self, pieces: Sequence[Batch], rate: float) -> Tensor:
        """As Eager's, by replaying the graph of this shape, which is captured first. Raises CaptureError."""
        shape = tuple(piece.shape for piece in pieces)
        with self.order():
            self.last = pieces
            self.step.set_rate(rate)  # in order, or a step still waiting would read it
            held = self.captured.get(shape)
            if not held and self.captured:
                try:
                    held = self.captured[shape] = self._capture(pieces)
                except CaptureError:
                    if shape in self.captured:
                        raise
            if not held:
                self.captured[shape] = None
                return self.step([b.to(self.step.device) for b in pieces], sum(b.answers for b in pieces))
            for static, piece in zip(held.pieces, pieces, strict=True):
                static.data.copy_(piece.data, non_blocking=True)
            held.answers.fill_(sum(b.answers for b in pieces))
            held.graph.replay()
            return held.out.clone()

    def close(self) -> None:
        with self.order():
            torch.cuda.synchronize()  # or a step under way would lose its graph
            self.last = ()
            self.captured.clear()

    def _capture(self, pieces: Sequence[Batch]) -> _Captured:
        static = [b.to(self.step.device) for b in pieces]
        answers = torch.ones((), device=self.step.device)
        graph = torch.cuda.CUDAGraph()
        why = ""
        try:
            with graphs.recording(graph, self.pool):
                out = self.step(static, answers)
        except RuntimeError as error:
            why = str(error.__context__ or error).splitlines()[0][:200]
        if why:  # by now nothing refers to what the step had made
            self.step.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()  # steps still under way come before what follows, on whichever stream
            raise CaptureError(why)
        return _Captured(graph, static, answers, out)


def why_eager(spec: Resolved, device: str) -> str:
    """Why a spec's step cannot be one CUDA graph; empty where it can."""
    method = methods.find(spec.method)
    reasons = {
        "no CUDA GPU here": device != "cuda",
        f"{method.name} asks for numbers between steps": method.after_step,
        f"the optimizer {spec.optimizer} counts its steps in Python": optimizers.capturable(spec) is None,
        "int8 looks for outliers at each product": spec.quantization == "int8",
    }
    return next((why for why, holds in reasons.items() if holds), "")
