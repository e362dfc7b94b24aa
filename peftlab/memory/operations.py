"""What a training step computes, operation by operation: recorded beside the tape of its memory, unrolled to any depth.

Products are counted at two operations for a multiplication and its addition. What an operation moves is each tensor that it
reads or writes, once, as if nothing stayed in the GPU's cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from .seconds import Operation, Step
from .shallow import Skipped
from .tape import BEFORE, Recorder

aten = torch.ops.aten
DEVICE: Any = torch.ops.prim.device.default
ALLOCATIONS = {
    aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.new_empty_strided, aten._unsafe_view,
    aten.lift_fresh,
}  # fmt: skip
"""They run nothing on the GPU."""
GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""They read as much as they write, not all of their first argument."""
SCATTERS = {
    aten.embedding_dense_backward,
    aten.index_put_,
    aten.index_put,
    aten.index_add_,
    aten.scatter_add_,
    aten.scatter,
}
WRITES = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_, aten.bernoulli_}
"""They change a tensor without reading it."""


Found = Mapping[str, Mapping[tuple[int, Operation], int]]
"""How often each part of the model has each operation, by phase."""


class Operations(TorchDispatchMode):
    """Notes every operation beside a Recorder, by phase and part of the model. It is to be entered after the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.found: dict[str, Counter[tuple[int, Operation]]] = {}
        self._recorded = False
        self._owners: list[int | None] = []
        """The part of each parameter, in the order in which the optimizer goes over them."""

    def __enter__(self) -> Operations:
        _listening.append(self)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        _listening.remove(self)
        super().__exit__(*args)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func is DEVICE and isinstance(args[0], FakeTensor):  # asked several times for each operation
            return args[0].fake_device
        self._recorded = torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in tree_iter((args, kwargs))
        )
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim" and func is not aten._local_scalar_dense.default:  # neither runs anything
            for part, operation in self._of(func, args, kwargs or {}, out):
                self._note(part, operation)
        return out

    def listen(self, model: nn.Module) -> None:
        """Notes each call of a module of the model from here on: Python takes time for it, whatever it computes."""

        def called(module: nn.Module, args: object) -> None:
            self.note("module", 0, 0, 0)

        for module in model.modules():
            if not isinstance(module, Skipped):
                module.register_forward_pre_hook(called)

    def note(self, kind: str, flops: int, moved: int, bits: int) -> None:
        """An operation that no dispatch shows, because a stand-in computes nothing."""
        self._note(self.recorder.part, self._made(kind, bits, flops, moved))

    def updates(self, parameters: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """A kernel for each parameter, of an optimizer whose stand-in has its states and computes nothing."""
        for parameter, part in zip(parameters, self.recorder._owners((parameters,)), strict=True):
            moved = 3 * _bytes(parameter) + 2 * sum(map(_bytes, states.get(parameter, {}).values()))
            self._note(self.recorder.part if part is None else part, self._made("library", 0, 0, moved))

    def clips(self, parameters: Sequence[Tensor]) -> None:
        """That the engine reads each gradient for its norm, then reads and scales it."""
        for parameter, part in zip(parameters, self.recorder._owners((parameters,)), strict=True):
            for times in (1, 2):
                moved = times * _bytes(parameter)
                self._note(self.recorder.part if part is None else part, self._made("tensor", 0, 0, moved))

    def _note(self, part: int, operation: Operation) -> None:
        self.found.setdefault(self.recorder.phase, Counter())[part, operation] += 1

    def _made(self, kind: str, bits: int, flops: int, moved: int) -> Operation:
        phase = self.recorder.phase.split()[0]
        driven = phase == "optimizer" or torch.is_grad_enabled()
        return Operation(phase, kind, bits, flops, moved, driven, driven and self._recorded)

    def _of(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: object
    ) -> Iterator[tuple[int, Operation]]:
        packet, part = func.overloadpacket, self.recorder.part
        if packet in ALLOCATIONS or func.is_view:
            yield part, self._made("view", 0, 0, 0)
        elif any(isinstance(each, list | tuple) and each and isinstance(each[0], Tensor) for each in args[:1]) and (
            self.recorder.phase.startswith("optimizer") or "_foreach" in str(packet)
        ):
            yield from self._each(func, args, kwargs, out)
        else:
            flops = _flops(packet, args, kwargs, out)
            bits = next((t.element_size() * 8 for t in tree_iter(args) if isinstance(t, Tensor)), 0) if flops else 0
            moved = _moved(func, args, kwargs, out)
            yield part, self._made("product" if flops else "elements", bits, flops, moved)

    def _each(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: object
    ) -> Iterator[tuple[int, Operation]]:
        """Of an operation on lists of tensors, what each one of the first list takes, in the part that owns it."""
        lists = [each for each in (*args, *kwargs.values()) if isinstance(each, list | tuple)]
        lists += [out] if isinstance(out, list | tuple) else []
        columns = [each for each in lists if len(each) == len(args[0]) and all(isinstance(t, Tensor) for t in each)]
        written = sum(argument.alias_info is not None for argument in func._schema.arguments)
        owners = self.recorder._owners((args[0],))
        if any(owner is not None for owner in owners):
            self._owners = owners
        elif len(owners) == len(self._owners):  # a number for each parameter, such as how many steps it has had
            owners = self._owners
        for owner, row in zip(owners, zip(*columns, strict=True), strict=True):
            moved = sum(map(_bytes, row)) + sum(map(_bytes, row[:written]))
            part = self.recorder.part if owner is None else owner
            yield part, self._made("tensor", 0, 0, moved)


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> int:
    """Operations of a product; 0 for anything else."""
    if packet is aten._grouped_mm:  # of each expert's tokens with its own weights
        return 2 * args[0].numel() * args[1].shape[-1]
    counted = flop_registry.get(packet)
    return counted(*args, **kwargs, out_val=out) if counted else 0


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's own numbers, those that are repeated counted once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> int:
    packet = func.overloadpacket
    given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    made = [t for t in tree_iter(out) if isinstance(t, Tensor)]
    if packet in GATHERS:
        return sum(map(_bytes, given[1:])) + 2 * sum(map(_bytes, made))
    if packet in SCATTERS:
        inner = given[1:] if func._schema.is_mutable else given
        return 2 * sum(map(_bytes, inner)) + (0 if func._schema.is_mutable else sum(map(_bytes, made)))
    if packet in WRITES:
        given = given[1:]
    return sum(map(_bytes, given)) + sum(map(_bytes, made))


def unrolled(found: Found, copies: Sequence[int], depth: int, accumulation: int) -> Step:
    """A steady step's operations in a model of `len(copies)` layers, of which layer i does what layer `copies[i]` did."""
    times = Counter((BEFORE, *copies, depth))
    again = accumulation - 1
    whole: Counter[Operation] = Counter()
    phases = {"forward": 1, "backward": 1, "forward again": again, "backward again": again, "optimizer again": 1}
    for phase, often in phases.items():
        for (part, operation), n in found.get(phase, {}).items():
            whole[operation] += n * times[part] * often
    return {operation: n for operation, n in whole.items() if n}


_listening: list[Operations] = []
"""Who takes down what stand-ins `note`; a trace runs at a time."""


def note(kind: str, flops: int, moved: int, bits: int = 0) -> None:
    """Takes down an operation of which the stand-in that calls this computes nothing."""
    for listener in _listening:
        listener.note(kind, flops, moved, bits)
