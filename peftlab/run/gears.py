"""How one optimizer step is run: each operation launched by Python, or the whole step replayed as one CUDA graph.

A small fine-tune on a GPU waits for launches, not for arithmetic. Both gears run the same `Step`, so their losses are the
same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import fused, methods, optimizers
from ..spec import Resolved
from . import graphs
from .batches import Batch
from .packing import Packed, pack

if TYPE_CHECKING:
    from torch import Tensor

CLIP = 1.0
"""Largest norm that the gradient keeps."""


class CaptureError(RuntimeError):
    """A step that cannot be captured; it has not been taken."""


class Step:
    """Forward, backward, clipping and update, without asking the device for a number."""

    def __init__(self, model: Any, spec: Resolved, capturable: bool = False) -> None:
        self.model, self.spec, self.method = model, spec, methods.find(spec.method)
        self.device = next(model.parameters()).device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(model, spec, capturable)
        self.head = fused.head(model)
        self.done = 0

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step, of which a method may give some parameters a multiple."""
        for group in self.optimizer.param_groups:
            if hasattr(group["lr"], "fill_"):
                group["lr"].fill_(rate * group["scale"])
            else:
                group["lr"] = rate * group["scale"]

    def __call__(self, pieces: Sequence[Batch | Packed], answers: Tensor | int) -> Tensor:
        """Loss in nats per answer token and norm of the gradient, on the device. `answers` are those of all `pieces`."""
        import torch

        total: Any = 0.0
        for piece in pieces:
            loss, held = self.loss(piece)
            loss = loss / answers
            penalty = self.method.penalty(self.model) / len(pieces) if self.method.penalty else 0.0
            (loss + penalty).backward()
            del held
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.done += 1
        if self.method.after_step:
            self.method.after_step(self.model, self.done)
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack((total, norm.to(total)))

    def loss(self, piece: Batch | Packed) -> tuple[Tensor, Tensor | None]:
        """Sum of the cross-entropy over the answers' tokens, and the logits where the spec holds them through backward."""
        import torch

        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.spec.precision == "amp"):
            out = self.model(**piece.inputs(), use_cache=False).logits
        loss = fused.cross_entropy(*piece.learned(out), self.head)
        return loss, out if self.spec.hold_outputs else None


def _optimizer(model: Any, spec: Resolved, capturable: bool) -> Any:
    """Over the model's trained parameters, a group for each learning rate that the method gives them."""
    import torch

    rate, method = spec.learning_rate, methods.find(spec.method)
    groups: dict[float, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(method.rate(name, spec), []).append(parameter)
    parameters = [{"params": group, "scale": scale} for scale, group in groups.items()]
    if not capturable:
        on_cpu = next(model.parameters()).device.type == "cpu"
        return optimizers.find(spec).make(parameters, rate, **(optimizers.fused(spec) if on_cpu else {}))
    made = optimizers.find(spec).make(parameters, rate, **(optimizers.capturable(spec) or {}))
    for group in made.param_groups:
        group["lr"] = torch.tensor(rate, device=group["params"][0].device)
    return made


class Eager:
    """Each operation launched by Python: anything, anywhere."""

    name = "eager"
    packs = False
    """Whether it reads the rows of a batch as one sequence."""

    def __init__(self, step: Step, why: str) -> None:
        self.step, self.why = step, why

    @contextmanager
    def order(self) -> Iterator[None]:
        """What is launched within comes after the steps launched before it, and before those launched after it."""
        yield

    def close(self) -> None:
        """Takes no further step; those under way are waited for."""

    def run(self, pieces: Sequence[Batch], rate: float) -> Tensor:
        """Loss and norm of one step at a learning rate, on the device."""
        self.step.set_rate(rate)
        moved = [replace(b, data=b.data.to(self.step.device, non_blocking=True)) for b in (p.trimmed() for p in pieces)]
        return self.step([*map(pack, moved)] if self.packs else moved, sum(b.answers for b in pieces))

    def fetch(self, results: Sequence[Tensor]) -> list[list[float]]:
        """The numbers of `results`, once every step that they come from is done."""
        import torch

        with self.order():
            return torch.stack(list(results)).tolist()


@dataclass
class _Captured:
    graph: Any
    pieces: list[Batch]
    answers: Tensor
    out: Tensor


class Graph(Eager):
    """The whole step as one CUDA graph for each shape of batch.

    The first batch runs eagerly, which warms everything up; so does a later shape's first where it cannot be recorded yet.
    """

    name = "graph"

    def __init__(self, step: Step) -> None:
        import torch

        super().__init__(step, "")
        graphs.follow()
        self.pool = torch.cuda.graph_pool_handle()
        self.captured: dict[tuple, _Captured | None] = {}
        self.last: Sequence[Batch] = ()
        """Kept until the next step. Memory that the GPU reads by itself is given up by a mark on its stream, which in the
        midst of another thread's recording would be recorded."""

    @contextmanager
    def order(self) -> Iterator[None]:
        with graphs.apart():
            yield

    def run(self, pieces: Sequence[Batch], rate: float) -> Tensor:
        """As Eager's. Raises CaptureError."""
        shape = tuple(piece.shape for piece in pieces)
        with self.order():
            self.last = pieces
            self.step.set_rate(rate)  # here, or a step still waiting would read it
            held = self.captured.get(shape)
            if not held and self.step.done:
                try:
                    held = self.captured[shape] = self._capture(pieces)
                except CaptureError:
                    if shape in self.captured:
                        raise
            if not held:
                self.captured[shape] = None
                moved = [replace(b, data=b.data.to(self.step.device, non_blocking=True)) for b in pieces]
                return self.step(moved, sum(b.answers for b in pieces))
            for static, piece in zip(held.pieces, pieces, strict=True):
                static.data.copy_(piece.data, non_blocking=True)
            held.answers.fill_(sum(b.answers for b in pieces))
            held.graph.replay()
            return held.out.clone()

    def close(self) -> None:
        import torch

        with self.order():
            torch.cuda.synchronize()  # or a step under way would lose its graph
            self.last = ()
            self.captured.clear()

    def _capture(self, pieces: Sequence[Batch]) -> _Captured:
        import torch

        static = [replace(b, data=b.data.to(self.step.device)) for b in pieces]
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
    """Why a resolved spec's step cannot be one CUDA graph; empty where it can."""
    method = methods.find(spec.method)
    if device != "cuda":
        return "no CUDA GPU here"
    if method.after_step:
        return f"{method.name} asks for numbers between steps"
    if optimizers.capturable(spec) is None:
        return f"the optimizer {spec.optimizer} counts its steps in Python"
    if spec.quantization == "int8":
        return "int8 looks for outliers at each product"
    return ""


def choose(model: Any, spec: Resolved, device: str) -> Eager:
    """The fastest gear that the run can use, with the reason where that is not the graph."""
    if why := why_eager(spec, device):
        return Eager(Step(model, spec), why)
    return Graph(Step(model, spec, capturable=True))
