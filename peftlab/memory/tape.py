"""What a step does to memory, as a tape of allocations: recorded on a shallow model, unrolled to any depth, replayed.

Every entry belongs to a phase and to a part of the model: before the layers (-1), one of them, or after them (their number).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .allocator import MIB, Allocator, Block
from .report import KINDS, Moment

BEFORE = -1
GIVE, NAME = 0, -1
"""In place of a size: the storage is freed, or is of another kind from now on."""
WORKSPACE, LT_WORKSPACE = 1, MIB
"""In place of a size that depends on the GPU: what cuBLAS keeps from its first product in a thread on. cuBLASLt, which adds
the bias too, keeps a size of its own. PyTorch runs the backward pass in a thread of its own."""
aten = torch.ops.aten
WORKSPACES = {aten.mm.default: WORKSPACE, aten.bmm.default: WORKSPACE, aten.addmm.default: LT_WORKSPACE}
COPIES = (aten.new_empty.default, aten.empty_like.default, aten.cat.default)
ALL = "peftlab_all"
"""The attribute of a truth value that says whether all of a tensor's are true: it is taken to be."""
NEAR = 2
"""How many layers away a storage may be freed and still be taken for the neighbour's."""


class Entry(NamedTuple):
    key: Hashable
    size: int
    """Bytes of a new storage, or one of WORKSPACE, GIVE and NAME."""
    kind: str
    part: int


class Recorder(TorchDispatchMode):
    """Writes down every storage that comes and goes, by phase."""

    def __init__(self, vocabulary: int, depth: int, experts: int = 0) -> None:
        super().__init__()
        self.vocabulary, self.depth, self.experts = vocabulary, depth, experts
        self.phases: dict[str, list[Entry]] = {}
        self.part = BEFORE
        self._keys: dict[int, int] = {}
        """Address of each living storage → its key."""
        self._parts: dict[int, int] = {}
        """Key → the part that made the storage."""
        self._made: dict[int, tuple[list[Entry], int]] = {}
        """Key → the tape and the place in it where the storage was made."""
        self._multiplied: set[tuple[str, int]] = set()
        self._sum = (0, 0)
        """The last gradient's sum: its address, and the key of what it was added to."""
        self.begin("weights")

    def begin(self, phase: str) -> None:
        self.phase, self.tape = phase, self.phases.setdefault(phase, [])

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func is aten._local_scalar_dense.default:  # a number that nobody has computed
            is_all = getattr(args[0], ALL, False)  # that nothing is padded, that every number is finite
            return is_all if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten.nonzero.default:
            args, func = (args[0], (self._found(args[0].numel()), args[0].dim())), aten.new_empty.default
            kwargs = {"dtype": torch.long}
        if func is aten.split_with_sizes.default and sum(args[1]) != args[0].shape[(args[2:] or (0,))[0]]:
            args = (args[0], _even(args[0].shape[(args[2:] or (0,))[0]], len(args[1])), *args[2:])
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:  # the stand-in knows one type alone
            args, func, kwargs = (args[0], _grouped(*args[:3])), aten.new_empty.default, {}
        out = func(*args, **(kwargs or {}))
        if func is aten.all.default:
            setattr(out, ALL, True)
        if self.phase.startswith("optimizer"):
            owners = self._owners(args)
            if isinstance(out, list | tuple) and len(out) > 1 and len(owners) >= len(out):
                for tensor, owner in zip(out, owners, strict=False):  # a foreach operation: one of each parameter
                    self.part = self.part if owner is None else owner
                    tree_map_only(Tensor, self.see, tensor)
                return out
            self.part = next((p for p in owners if p is not None), self.part)
        if func in COPIES and self.part == BEFORE:  # of all layers' parameters, one layer after the other
            owner = self._owners(args)[0]
            self.part = BEFORE if owner is None else owner
            self.see(out)
            self.part = BEFORE
        tree_map_only(Tensor, self.see, out)
        self._sum = (0, 0)
        if func is aten.add.Tensor and self.phase.startswith("backward") and not args[0]._is_view():
            self._sum = _address(out), self._keys.get(_address(args[0]), -1)
        if func in WORKSPACES and self.phase in ("forward", "backward"):
            size = WORKSPACES[func]
            if (self.phase, size) not in self._multiplied:
                self._multiplied.add((self.phase, size))
                self.tape.append(Entry(f"workspace {size} {self.phase}", size, "workspace", self.part))
        if func is aten.bernoulli_.float:  # a dropout mask: one byte an element on CUDA
            tape, i = self._made[self._keys[_address(out)]]
            tape[i] = tape[i]._replace(size=min(tape[i].size, out.numel()))
        return out

    def _found(self, n: int) -> int:
        """How many of n truth values are taken to be true: where one expert's tokens are asked for, its even share."""
        return n if n <= self.experts else -(-n // max(1, self.experts))

    def _owners(self, args: tuple[Any, ...]) -> list[int | None]:
        """The part that made each tensor among `args`, where it is known."""
        tensors = (t for t in tree_iter(args) if isinstance(t, Tensor))
        return [self._parts.get(self._keys.get(_address(t), -1)) for t in tensors]

    def see(self, tensor: Tensor) -> None:
        """Writes down the tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._keys or not size or not tensor.dim():  # single numbers: most stay on the CPU
            return
        key, wide = len(self._parts) + 1, tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        self._keys[address], self._parts[key] = key, self.part
        self._made[key] = (self.tape, len(self.tape))
        kind = "temporaries" if self.phase.startswith("optimizer") else "logits" if wide else "activations"
        self.tape.append(Entry(key, size, kind, self.part))
        weakref.finalize(storage, self._drop, address)

    def _drop(self, address: int) -> None:
        """Writes down that the storage is freed, or that a sum of gradients takes its place.

        Autograd adds a gradient to the one that came before, if nobody else holds that. With fake tensors it makes a new
        one, and lets go of the old one at once.
        """
        key = self._keys.pop(address, None)
        if key is None:
            return
        (summed, first), (tape, i) = self._sum, self._made[key]
        if key == first and self.tape[-1][:2] == (self._keys.get(summed), tape[i].size):
            self._keys[summed] = key
            self.tape.pop()
        else:
            part = self._parts[key] if self.phase.startswith(("optimizer", "end")) else self.part
            self.tape.append(Entry(key, GIVE, "", part))

    def name(self, tensors: Iterable[Tensor], kind: str) -> None:
        """From now on these tensors are of that kind."""
        for tensor in tensors:
            key = self._keys.get(_address(tensor))
            if key is not None:
                self.tape.append(Entry(key, NAME, kind, self._parts[key]))


def _grouped(a: Tensor, b: Tensor, ends: Tensor) -> list[int]:
    """The shape of a product of groups of rows or columns, which end at `ends`, as torch.nn.functional.grouped_mm gives it."""
    if a.dim() == b.dim():
        return [len(ends) if a.dim() == 2 else a.shape[0], a.shape[-2], b.shape[-1]]
    return [a.shape[-2], b.shape[-1]]


def _even(whole: int, n: int) -> list[int]:
    """n sizes as even as can be, in place of ones that nobody has computed."""
    return [whole * (i + 1) // n - whole * i // n for i in range(n)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


Homes = dict[Hashable, tuple[Hashable, int, int]]
"""Where each storage was made: (stretch of a tape, part of the model, its number there)."""


def unroll(name: str, tape: Sequence[Entry], copies: Sequence[int], depth: int, homes: Homes) -> list[Entry]:
    """The tape of a model of `len(copies)` layers, of which layer i does what layer `copies[i]` of the `depth` recorded did.

    A tape goes through the parts in order, up or down, as often as it likes; each such stretch is repeated on its own.
    `homes` is added to, for the tapes that follow.
    """
    whole: list[Entry] = []
    full = len(copies)
    like: dict[int, list[int]] = {BEFORE: [BEFORE], depth: [full]}
    for i, layer in enumerate(copies):
        like.setdefault(layer, []).append(i)

    def places(home: int, at: int, part: int) -> list[int]:
        """The parts whose storage, made in the recorded part `home`, the copy at `part` of an entry in `at` speaks of."""
        if home in (BEFORE, depth):
            return like[home]
        if 0 <= at < depth and abs(home - at) <= NEAR:
            return [part + home - at]
        return like.get(home, [])

    for i, entries in enumerate(_runs(tape)):
        by_part: dict[int, list[Entry]] = {}
        made = Counter[int]()
        for entry in entries:
            by_part.setdefault(entry.part, []).append(entry)
            if entry.kind == "workspace":  # in one part alone, whose other storages keep their numbers
                homes[entry.key] = ((name, i), entry.part, -entry.size)
            elif entry.size > 0:
                homes[entry.key] = ((name, i), entry.part, made[entry.part])
                made[entry.part] += 1
        order = [BEFORE, *range(full), full]
        if next(iter(by_part)) > next(reversed(by_part)):
            order.reverse()
        for part in order:
            at = BEFORE if part == BEFORE else depth if part == full else copies[part]
            for key, size, kind, _ in by_part.get(at, ()):
                first, home, number = homes[key]
                if size > 0:
                    whole.append(Entry((first, part, number), size, kind, part))
                else:
                    whole += [Entry((first, p, number), size, kind, part) for p in places(home, at, part)]
    return whole


def _runs(tape: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Stretches in which the part only rises, or only falls."""
    run: list[Entry] = []
    way = 0
    for entry in tape:
        step = (entry.part > run[-1].part) - (entry.part < run[-1].part) if run else 0
        if step and way and step != way:
            yield run
            run, way, step = [], 0, 0
        way = way or step
        run.append(entry)
    if run:
        yield run


class Player:
    """Replays tapes through the allocator."""

    def __init__(self, workspace: int) -> None:
        self.allocator = Allocator()
        self.workspace = workspace
        self.live = dict.fromkeys(KINDS, 0)
        """Bytes allocated now, by kind."""
        self._blocks: dict[Hashable, tuple[Block, int, str]] = {}

    @property
    def total(self) -> int:
        return sum(self.live.values())

    def play(self, tape: Iterable[Entry], phase: str = "") -> list[Moment]:
        """The moments of this phase, in order; one for each part that it went through, or one alone in the optimizer."""
        moments: list[Moment] = []
        for key, size, kind, part in tape:
            if not moments or (part != moments[-1].part and phase != "optimizer"):
                moments.append(Moment(phase, part, dict(self.live)))
            if (size > 0) == (key in self._blocks):  # made in the first step and kept, or given before
                continue
            if size > 0:
                block, taken = self.allocator.take(self.workspace if size == WORKSPACE else size)
            else:
                block, taken, old = self._blocks.pop(key)
                self.live[old] -= taken
            if size == GIVE:
                self.allocator.give(block)
            else:
                self._blocks[key] = block, taken, kind
                self.live[kind] += taken
            if self.total > moments[-1].total:
                moments[-1] = Moment(phase, moments[-1].part, dict(self.live))
        return moments
