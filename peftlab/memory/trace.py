"""The exact source: one training step on fake tensors, every allocation counted.

A shallow copy of the model is traced, its middle layers repeated to the full depth, and three steps replayed through a
model of PyTorch's allocator. The last is the one reported.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import fused, methods, optimizers, seam
from ..base import architecture as architectures
from ..base import configs, models
from ..errors import PeftlabError, SpecError
from ..fused import functions
from ..methods import Target
from ..seeded import seeded
from ..spec import SETTINGS, Resolved
from . import kernels, shallow, step
from .case import decoder
from .operations import Found, Operations, unrolled
from .report import Moment
from .seconds import Step
from .states import workspace
from .tape import BEFORE, Entry, Homes, Player, Recorder, unroll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what it refuses is told in words
IRRELEVANT = {
    "alpha", "learning_rate", "steps", "task", "training_rows", "seed", "gpu", "n_gpus", "sharding", "offload"
}  # fmt: skip
"""Settings that a step's memory on one GPU does not depend on, so that runs share traces. cuBLAS's workspace is apart."""


@dataclass(frozen=True)
class Trace:
    moments: tuple[Moment, ...]
    """Forward and backward by part of the model, then the optimizer."""
    after: Mapping[str, int]
    """Bytes by kind between steps."""
    reserved: int
    """Bytes that the allocator has taken from the driver."""
    operations: Step = field(default_factory=dict)
    """What the GPU computes in it."""


_one_at_a_time = threading.Lock()
if hasattr(os, "register_at_fork"):  # a forked process has no thread that would ever let go of it
    os.register_at_fork(after_in_child=_one_at_a_time._at_fork_reinit)  # type: ignore[attr-defined]  # as logging has it
_known: dict[tuple[Resolved, int, int | None, bool, str], Trace] = {}
KNOWN = 512
"""Traces kept; the oldest goes first."""


def trace(spec: Resolved, logits: int | None = None, quick: bool = False) -> Trace:
    """The trace of a run's step. Every token is predicted, or the last `logits` of each example.

    With `quick` the step is as the engine takes it. Raises SpecError for what cannot be traced.
    """
    blank = {name: SETTINGS[name].type() for name in IRRELEVANT} | {"alpha": 1.0}
    read = replace(spec, **blank, unread=spec.unread | IRRELEVANT)
    key = read, workspace(spec.gpu), logits, quick, models.edition(spec.model)
    if (known := _known.get(key)) is not None:  # in one look: another thread may forget it between two
        return known
    with _one_at_a_time:
        if (found := _known.get(key)) is None:
            try:
                found = _trace(*key[:-1])
            except PeftlabError:
                raise
            except Exception as error:  # anybody's architecture, in transformers' code
                said = f"{type(error).__name__}: {configs.shown(error, 160)}"
                raise SpecError(
                    f"model={decoder(spec.model).said}: its step cannot be traced ({said}); what is said without a trace stands"
                ) from error
            if len(_known) >= KNOWN:
                del _known[next(iter(_known))]
            _known[key] = found
        return found


def _trace(spec: Resolved, workspace_bytes: int, logits: int | None, quick: bool) -> Trace:
    shape, entry = architectures.of(spec.model), decoder(spec.model)
    assert entry.config is not None  # or it would have no architecture
    model = configs.build_meta(entry.config)
    chosen = methods.targets(shape, spec, entry.name)
    adapted = {n for t in chosen for n in (t.layers if t.module.layers else ())}
    kinds = shallow.kinds(model)
    kept = copies = list(range(len(kinds)))
    if not methods.find(spec.method).before_layers:
        kept, copies = shallow.shorten([(kind, i in adapted) for i, kind in enumerate(kinds)])
    tapes, found = _record(spec, model, kept, chosen, logits, quick)
    homes: Homes = {}
    full = {name: unroll(name, tape, copies, len(kept), homes) for name, tape in tapes.items()}
    operations = unrolled(found, copies, len(kept), spec.accumulation)
    return replace(_replay(full, workspace_bytes), operations=operations)


def _record(
    spec: Resolved, model: PreTrainedModel, kept: Sequence[int], targets: list[Target], logits: int | None, quick: bool
) -> tuple[dict[str, list[Entry]], Found]:
    """The tapes of a step's phases, by name, with the layers `kept` alone."""
    kernels.register()
    stack = shallow.layers(model)
    model = _meta(spec, model, kept, targets, quick)
    experts = architectures.of(spec.model).facts.experts
    recorder = Recorder(model.config.vocab_size, len(kept), experts)
    noted = Operations(recorder)
    if quick:
        functions.Found(model)  # tries kinds of modules on numbers, which the fake copy has none of
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, noted, kernels.Fused():
        _fake(model, stack, kept, recorder)
        if quick and not fused.why_not(spec):
            recorder.part = BEFORE
            fused.adjoin(model)
            fused.quicken(model, spec.hold_outputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        recorder.name((*model.parameters(), *model.buffers()), "frozen_weights")
        recorder.name(trained, "trainable_weights")
        _watch([stack[i] for i in kept], recorder)
        noted.listen(model)
        kind = optimizers.find(spec)
        own = kind.library == "torch"
        optimizer = step.optimizer(trained, spec, fused=quick) if own else optimizers.BlockwiseStates(trained, kind)
        for again in ("", " again")[: min(spec.accumulation, 2)]:
            recorder.part = BEFORE
            for phase in step.micro(model, spec, "cpu", logits):
                recorder.begin(phase + again)
            gc.collect(1)  # a model's own reference cycles hold tensors; a real step is long enough to collect them
            recorder.begin("gradients")
            recorder.name((p.grad for p in trained if p.grad is not None), "gradients")
        for phase in ("optimizer", "optimizer again"):
            recorder.begin(phase)
            if quick:
                noted.clips(trained)
            optimizer.step()
            if not own:
                noted.updates(trained, optimizer.state)
            recorder.begin(phase + " states")
            states = (t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
            recorder.name(states, "optimizer")
        recorder.begin("end")
        optimizer.zero_grad(set_to_none=True)
        recorder.begin("over")
    return recorder.phases, noted.found


def _replay(tapes: Mapping[str, Sequence[Entry]], workspace_bytes: int) -> Trace:
    """The third of three steps: the first makes the optimizer's states, the second settles the allocator."""
    player = Player(workspace_bytes)
    player.play(tapes["weights"])
    for optimizer in ("optimizer", "optimizer again", "optimizer again"):
        moments: list[Moment] = []
        for phase in ("forward", "backward", "gradients", "forward again", "backward again", "gradients"):
            found = player.play(tapes.get(phase, ()), phase.removesuffix(" again"))
            moments = [*moments, *found] if phase != "forward again" or not found else found
        moments = [m for m in moments if m.phase != "gradients"]
        moments += player.play(tapes[optimizer], "optimizer")
        player.play(tapes[optimizer + " states"])
        player.play(tapes["end"])
    return Trace(tuple(moments), dict(player.live), player.allocator.reserved)


def _watch(layers: Sequence[nn.Module], recorder: Recorder) -> None:
    """Tells the recorder which part of the model is at work: the layers in turn, and back again."""

    def reach(part: int, hidden: Tensor, before: int) -> None:
        """The forward pass comes to `part` with these hidden states; the backward pass leaves them for `before`."""
        if recorder.phase.startswith("forward"):
            recorder.part = part
            if hidden.requires_grad:
                hidden.register_hook(lambda _: setattr(recorder, "part", before))

    def begin(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        reach(0, shallow.hidden_states(args, kwargs), BEFORE)

    def end(part: int, module: nn.Module, args: object, out: object) -> None:
        reach(part + 1, shallow.changed(out), part)

    layers[0].register_forward_pre_hook(begin, with_kwargs=True)
    for part, layer in enumerate(layers):
        layer.register_forward_hook(partial(end, part))


def _meta(
    spec: Resolved, whole: PreTrainedModel, kept: Sequence[int], targets: list[Target], quick: bool
) -> PreTrainedModel:
    """The model with those layers alone and the method attached, on the meta device, in the run's types."""
    model = nn.Module.to(whole, "meta", step.DTYPES[spec.precision]).requires_grad_(False)  # XLNet has some on the CPU
    shallow.skip(shallow.layers(model), kept)
    targets = [t for target in targets if (t := _within(target, kept)).count]
    method = methods.METHODS["lora" if spec.method == "pissa" else spec.method]  # PiSSA starts from the numbers of W
    seam.set_attention(model.config, spec.attention)
    quantized = {name for m in architectures.describe(model).linear() for _, name in m.names()}
    spec = replace(spec, method=method.key)
    with seeded(0):  # the start of an adapter is drawn, and no other thread's numbers may change by that
        adapted = method.attach(model, targets, spec)
    if spec.quantization != "none":
        kernels.quantize(adapted, quantized, spec.quantization, spec.double_quantization)
    return step.prepare(adapted, spec, quick, kernels.checkpoint_contexts)


def _within(target: Target, kept: Sequence[int]) -> Target:
    """The target with those layers alone."""
    here, chosen = (tuple(n for n in layers if n in kept) for layers in (target.module.layers, target.layers))
    return Target(replace(target.module, layers=here), chosen) if target.module.layers else target


def _fake(model: nn.Module, stack: nn.ModuleList, kept: Sequence[int], recorder: Recorder) -> None:
    """Fresh fake tensors in place of the meta ones, frozen ones first, as they are on a GPU before a method is attached."""
    layers = next(name for name, module in model.named_modules() if module is stack) + "."
    for trained in (False, True):
        recorder.part = BEFORE

        def make(name: str, old: Tensor, trained: bool = trained) -> Tensor:
            if name.startswith(layers):
                recorder.part = kept.index(int(name.removeprefix(layers).split(".")[0]))
            elif recorder.part != BEFORE:
                recorder.part = recorder.depth
            return torch.empty_like(old, device="cpu") if old.requires_grad == trained and old.is_meta else old

        step.materialize(model, make)
