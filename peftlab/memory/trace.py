"""The exact source: one training step on fake tensors, every allocation counted.

A shallow copy of the model is traced, its middle layers repeated to the full depth, and three steps replayed through a
model of PyTorch's allocator. The last is the one reported.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import fused, methods, optimizers, seam
from ..base import architecture as architectures
from ..base import configs
from ..base.configs import Config
from ..errors import PeftlabError, SpecError
from ..fused import functions
from ..seeded import seeded
from ..spec import SETTINGS, Resolved, parse_layers
from . import kernels, step
from .case import decoder
from .operations import Found, Operations, unrolled
from .report import Moment
from .seconds import Step
from .states import workspace
from .tape import BEFORE, Entry, Homes, Player, Recorder, unroll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
_known: dict[tuple[Resolved, int, int | None, bool], Trace] = {}
KNOWN = 512
"""Traces kept; the oldest goes first."""


def trace(spec: Resolved, logits: int | None = None, quick: bool = False) -> Trace:
    """The trace of a run's step. Every token is predicted, or the last `logits` of each example.

    With `quick` the step is as the engine takes it. Raises SpecError for what cannot be traced.
    """
    blank = {name: SETTINGS[name].type() for name in IRRELEVANT} | {"alpha": 1.0}
    read = replace(spec, **blank, unread=spec.unread | IRRELEVANT)
    key = read, workspace(spec.gpu), logits, quick
    if (known := _known.get(key)) is not None:  # in one look: another thread may forget it between two
        return known
    with _one_at_a_time:
        if (found := _known.get(key)) is None:
            try:
                found = _trace(*key)
            except PeftlabError:
                raise
            except Exception as error:  # anybody's architecture, in transformers' code
                said = f"{type(error).__name__}: {configs.shown(error, 160)}"
                raise SpecError(
                    f"model={spec.model}: its step could not be traced ({said}); the closed form's figure stands"
                ) from error
            if len(_known) >= KNOWN:
                del _known[next(iter(_known))]
            _known[key] = found
        return found


def _trace(spec: Resolved, workspace_bytes: int, logits: int | None, quick: bool) -> Trace:
    shape, entry = architectures.of(spec.model), decoder(spec.model)
    assert entry.config is not None  # or it would have no architecture
    chosen = {n for t in methods.targets(shape, spec, entry.name) for n in (t.layers if t.module.layers else ())}
    kept = copies = list(range(shape.n_layers))
    if not methods.find(spec.method).before_layers:
        types = configs.layer_types(entry.config) or [""] * shape.n_layers
        kept, copies = _shorten([(kind, i in chosen) for i, kind in enumerate(types)])
    tapes, found = _record(spec, entry.config, kept, logits, quick)
    homes: Homes = {}
    full = {name: unroll(name, tape, copies, len(kept), homes) for name, tape in tapes.items()}
    operations = unrolled(found, copies, len(kept), spec.accumulation)
    return replace(_replay(full, workspace_bytes), operations=operations)


def _shorten(kinds: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """The layers worth tracing, and for each layer the place among them of the one to copy: one of its kind with two
    neighbours like its own on both sides. They are five of a plain stack, two blocks of Gemma 3's six.
    """
    kept: list[int] = []
    copies: list[int] = []
    i = 0
    while i < len(kinds):
        periods = ((p, _repeats(kinds, i, p)) for p in range(1, min(8, len(kinds) - i) + 1))
        period, repeats = max(periods, key=lambda found: (found[0] * (found[1] - 1), -found[0]))
        n, first = period * repeats, len(kept)
        short = min(n, period * (1 + -(-4 // period)))
        places = list(range(short))
        if short < n:  # the first two and the last two stand for themselves, the others for one of their kind
            inner = (next(q for q in range(2, short - 2) if q % period == j % period) for j in range(2, n - 2))
            places = [0, 1, *inner, short - 2, short - 1]
        kept += [*range(i, i + short - 2), *range(i + n - 2, i + n)] if n > 1 else [i]
        copies += [first + place for place in places]
        i += n
    return kept, copies


def _repeats(kinds: Sequence[Hashable], start: int, period: int) -> int:
    """How often in a row the `period` layers from `start` on come."""
    blocks = (kinds[i : i + period] for i in range(start, len(kinds), period))
    return sum(1 for _ in takewhile(kinds[start : start + period].__eq__, blocks))


def _record(
    spec: Resolved, config: Config, kept: Sequence[int], logits: int | None, quick: bool
) -> tuple[dict[str, list[Entry]], Found]:
    """The tapes of a step's phases, by name, with the layers `kept` alone."""
    kernels.register()
    depth = len(kept)
    model = _meta(spec, config, kept)
    recorder = Recorder(model.config.vocab_size, depth)
    noted = Operations(recorder)
    if quick:
        functions.Found(model)  # tries kinds of modules on numbers, which the fake copy has none of
    with FakeTensorMode(allow_non_fake_inputs=True), recorder, noted, kernels.Fused():
        _fake(model, recorder)
        if quick and not fused.why_not(spec):
            recorder.part = BEFORE
            fused.adjoin(model)
            fused.quicken(model, spec.hold_outputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        recorder.name((*model.parameters(), *model.buffers()), "frozen_weights")
        recorder.name(trained, "trainable_weights")
        _watch(model, recorder)
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


def _layers(model: nn.Module, depth: int) -> tuple[str, nn.ModuleList]:
    """The model's list of layers, with its name."""
    return next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


def _watch(model: nn.Module, recorder: Recorder) -> None:
    """Tells the recorder which part of the model is at work: the layers in turn, and back again."""
    _, layers = _layers(model, recorder.depth)

    def reach(part: int, hidden: Tensor, before: int) -> None:
        """The forward pass comes to `part` with these hidden states; the backward pass leaves them for `before`."""
        if recorder.phase.startswith("forward"):
            recorder.part = part
            if hidden.requires_grad:
                hidden.register_hook(lambda _: setattr(recorder, "part", before))

    def begin(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        reach(0, args[0] if args else kwargs["hidden_states"], BEFORE)

    def end(part: int, module: nn.Module, args: object, out: Tensor | tuple[Tensor, ...]) -> None:
        reach(part + 1, out[0] if isinstance(out, tuple) else out, part)

    layers[0].register_forward_pre_hook(begin, with_kwargs=True)
    for part, layer in enumerate(layers):
        layer.register_forward_hook(partial(end, part))


def _meta(spec: Resolved, config: Config, kept: Sequence[int]) -> PreTrainedModel:
    """The model with those layers alone and the method attached, on the meta device, in the run's types."""
    depth = [name for name in ("num_hidden_layers", "n_layer") if name in config] or ["num_hidden_layers"]
    short = {**config, **dict.fromkeys(depth, len(kept))}
    if types := configs.layer_types(config):
        short["layer_types"] = [types[i] for i in kept]
    model = nn.Module.to(configs.build_meta(short), step.DTYPES[spec.precision]).requires_grad_(False)
    shape = architectures.describe(model)
    if spec.layers:
        wanted = set(parse_layers(spec.layers, architectures.of(spec.model).n_layers))
        spec = replace(spec, layers=",".join(str(i) for i, layer in enumerate(kept) if layer in wanted))
    method = methods.METHODS["lora" if spec.method == "pissa" else spec.method]  # PiSSA starts from the numbers of W
    seam.set_attention(model.config, kernels.NAME if spec.attention == "sdpa" else spec.attention)
    spec = replace(spec, method=method.key)
    with seeded(0):  # the start of an adapter is drawn, and no other thread's numbers may change by that
        adapted = method.attach(model, methods.targets(shape, spec), spec)
    if spec.quantization != "none":
        names = {name for m in shape.linear() for _, name in m.names()}
        kernels.quantize(adapted, names, spec.quantization, spec.double_quantization)
    return step.prepare(adapted, spec)


def _fake(model: nn.Module, recorder: Recorder) -> None:
    """Fresh fake tensors in place of the meta ones, frozen ones first, as they are on a GPU before a method is attached."""
    layers = _layers(model, recorder.depth)[0] + "."
    for trained in (False, True):
        recorder.part = BEFORE

        def make(name: str, old: Tensor, trained: bool = trained) -> Tensor:
            if name.startswith(layers):
                recorder.part = int(name.removeprefix(layers).split(".")[0])
            elif recorder.part != BEFORE:
                recorder.part = recorder.depth
            return torch.empty_like(old, device="cpu") if old.requires_grad == trained and old.is_meta else old

        step.materialize(model, make)
