"""What a model's own modules save for the backward pass, asked of the model: two forward passes on the meta device.

It needs neither formulas nor the family's name, and tells whether the formulas of `activations.py` hold for a model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from .. import seam
from ..base import architecture as architectures
from ..base import configs, models
from ..errors import SpecError
from . import kernels, shallow
from .case import decoder
from .step import DTYPES, materialize
from .tape import ALL

LENGTH, SHORTEST, BATCH = 256, 8, 2
"""Tokens of an example in the shorter of two passes, the other having twice as many, and the fewest; and examples."""
FEW = 0.01
"""The share of all bytes that may grow with the text in another way than by its first or second power."""
BEFORE, AFTER = -1, -2
"""In place of a layer's number: outside the layers, or shared by them, and after them."""


@dataclass(frozen=True)
class Saved:
    """A tensor that stays from the forward pass until the backward pass."""

    layer: int
    """The layer's number, BEFORE or AFTER."""
    part: str
    """The module of the layer that it is saved in, or `norms`."""
    numbers: float
    """Numbers for each token, for each pair of tokens of an example, or once."""
    size: int
    """Bytes of a number."""
    power: int
    """2: for each pair of tokens; 1: for each token; 0: once."""
    readers: tuple[str, ...]
    """Names of the modules, with `*` for the layer, whose training it is for; empty where everything below needs it."""


@dataclass(frozen=True)
class Answer:
    """What a model tells of its step."""

    tensors: tuple[Saved, ...]
    run: frozenset[str]
    """Names of the modules that run at all."""


@dataclass(frozen=True)
class _Event:
    storage: int
    numbers: int
    size: int
    key: tuple[object, ...]
    module: str


class _Watch(TorchDispatchMode):
    """Answers for numbers that nobody computes, and knows dropout's masks, which take one byte a number on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            is_all = getattr(args[0], ALL, False)  # as the trace answers
            return is_all if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.all.default:
            setattr(out, ALL, True)
        if func is torch.ops.aten.bernoulli_.float:
            self.masks.add(out.untyped_storage()._cdata)
        return out


def saved(model: str, precision: str, attention: str, filled: bool = False) -> Answer:
    """What a model's modules save in a step of this precision and attention; `filled`: the text fills the window.

    Raises SpecError where the model cannot be asked, or where what it saves is no polynomial in the text's length.
    """
    answer = _answer(model, precision, attention, filled, models.edition(model))
    if isinstance(answer, str):
        raise SpecError(answer)
    return answer


@lru_cache(maxsize=64)
def _answer(model: str, precision: str, attention: str, filled: bool, _edition: str) -> Answer | str:
    """What `saved` returns, or why it refuses; both are remembered, because asking takes seconds."""
    entry, shape = decoder(model), architectures.of(model)
    assert entry.config is not None  # or it would have no architecture
    length = length_of(shape, filled)
    try:
        kernels.register()
        built = nn.Module.to(configs.build_meta(entry.config), DTYPES[precision]).train()
        if shallow.is_split(built):
            return "their parts lie in several lists"
        amp = precision == "amp"
        for config in seam.configs_of(built):
            seam.set_attention(config, attention)
        with FakeTensorMode(allow_non_fake_inputs=True) if amp else nullcontext():  # autocast knows no meta tensors
            if amp:
                materialize(built, lambda _, old: torch.empty_like(old, device="cpu"))
            passes = (length, False), (length, True), (2 * length, True)
            frozen, short, long = (_pass(built, shape.n_layers, n, trained, amp) for n, trained in passes)
        return Answer(_told(frozen[0], short[0], long[0], length, shape.n_layers), short[1])
    except SpecError as error:
        return str(error)
    except Exception as error:  # anybody's architecture, in transformers' code
        return f"they cannot be asked: {type(error).__name__}: {configs.shown(error, 120)}"


def length_of(shape: architectures.Architecture, filled: bool = False) -> int:
    """Tokens of the shorter pass: on the asked side of the window, and few enough for the model to read twice as many."""
    length, window = LENGTH, shape.facts.window
    if window:
        length = max(length, window) if filled else min(length, max(SHORTEST, (window - 1) // 2))
    return max(1, min(length, shape.context // 2) if shape.context else length)


def _layers(model: nn.Module, depth: int) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


def _pass(model: Any, depth: int, length: int, trained: bool, amp: bool) -> tuple[list[_Event], frozenset[str]]:
    """Every saving of a tensor in one forward pass, with all weights trained or none, and which modules run.

    Raises SpecError where layers run in a loop.
    """
    model.requires_grad_(trained)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    running, events, begun, run = list[str](), list[_Event](), list[nn.Module](), set[str]()
    alive: list[Tensor] = []  # or another storage would be given the address

    def begins(name: str) -> None:
        running.append(name)
        run.add(name)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage.nbytes():
            size = 1 if storage._cdata in watch.masks else tensor.element_size()
            numbers = storage.nbytes() // tensor.element_size()
            key = tuple(n // length for n in tensor.shape), tensor.shape, tensor.dtype
            events.append(_Event(storage._cdata, numbers, size, key, running[-1] if running else ""))
            alive.append(tensor)
        return tensor

    with ExitStack() as stack:
        for name, module in model.named_modules():
            begin = module.register_forward_pre_hook(lambda *_, name=name: begins(name))
            end = module.register_forward_hook(lambda *_: (running.pop(), None)[1])
            stack.callback(begin.remove)
            stack.callback(end.remove)
        for layer in _layers(model, depth):
            stack.callback(layer.register_forward_pre_hook(lambda module, _: begun.append(module)).remove)
        tokens = model.get_input_embeddings().register_forward_hook(
            lambda *found: None if found[2].requires_grad else found[2].requires_grad_().clone()
        )
        stack.callback(tokens.remove)
        ids = torch.zeros(BATCH, length, dtype=torch.long, device="cpu" if amp else "meta")
        watch = _Watch()
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp))
        with saved_tensors_hooks(pack, lambda tensor: tensor), kernels.Fused(), watch:
            model(input_ids=ids, use_cache=False)
    if len(begun) > len({*map(id, begun)}):
        raise SpecError("they run more than once")
    return events, frozenset(run)


def _told(
    frozen: Sequence[_Event], short: Sequence[_Event], long: Sequence[_Event], length: int, depth: int
) -> tuple[Saved, ...]:
    """The tensors, from what each of the three passes saved."""
    if len(short) != len(long):
        raise SpecError("they keep more tensors of a longer text")
    always = Counter((event.module, event.key) for event in frozen)
    odd_parts = set[str]()
    found: dict[int, list[tuple[_Event, _Event, bool]]] = {}
    for one, two in zip(short, long, strict=True):
        needed = always[one.module, one.key] > 0  # not only for the weights' gradients
        always[one.module, one.key] -= needed
        found.setdefault(one.storage, []).append((one, two, needed))
    tensors, odd = list[Saved](), 0.0
    for events in found.values():
        one, two, _ = events[0]
        exponent = math.log2(two.numbers / one.numbers)
        power = round(exponent)
        if abs(exponent - power) > FEW or not 0 <= power <= 2:
            odd += one.numbers * one.size
            odd_parts.add(_part(one.module) or "what is around them")
        layers = {_layer(e.module) for e, _, _ in events}
        layer = BEFORE if len(layers) > 2 or len(layers) == depth > 1 else _layer(one.module)
        if layer == BEFORE and any(t.layer >= 0 for t in tensors) and len(layers) == 1:
            layer = AFTER
        readers = () if any(n for _, _, n in events) else tuple(sorted({_pattern(e.module) for e, _, _ in events}))
        per = (BATCH * length**power) if power else 1
        tensors.append(Saved(layer, _part(one.module), one.numbers / per, one.size, power, readers))
    if any(always.values()):
        raise SpecError("they change while they are asked")
    total = sum(t.numbers * t.size * (BATCH * length**t.power if t.power else 1) for t in tensors)
    if odd > FEW * total:
        raise SpecError(f"what {', '.join(sorted(odd_parts))} keeps does not grow with the text's length or its square")
    return tuple(tensors)


def _layer(module: str) -> int:
    found = re.search(r"\.(\d+)(\.|$)", module)
    return int(found[1]) if found else BEFORE


def _pattern(module: str) -> str:
    return re.sub(r"\.\d+(\.|$)", r".*\1", module, count=1)


def _part(module: str) -> str:
    """The layer's own child that a module is in; empty for the layer itself and outside layers."""
    inner = re.split(r"\.\d+(?:\.|$)", module, maxsplit=1)[1:]
    return inner[0].split(".")[0] if inner else ""
