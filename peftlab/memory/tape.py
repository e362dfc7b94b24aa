"""What a step does to memory, as a tape of allocations: recorded on a shallow model, unrolled to any depth, replayed.

Every entry belongs to a phase and to a part of the model: before the layers (-1), one of them, or after them (their number).
Importing this imports torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .allocator import MIB, Allocator
from .report import KINDS, Moment

BEFORE = -1
GIVE, NAME = 0, -1
"""In place of a size: the storage is freed, or is of another kind from now on."""
WORKSPACE, LT_WORKSPACE = 1, MIB
"""What cuBLAS keeps from its first product in a thread on, in place of a size that depends on the GPU; and cuBLASLt, which adds
the bias too. PyTorch runs the backward pass in a thread of its own."""
WORKSPACES = {
    torch.ops.aten.mm.default: WORKSPACE,
    torch.ops.aten.bmm.default: WORKSPACE,
    torch.ops.aten.addmm.default: LT_WORKSPACE,
}


COPIES = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default, torch.ops.aten.cat.default)


class Entry(NamedTuple):
    key: Hashable
    size: int
    kind: str
    part: int


class Recorder(TorchDispatchMode):
    """Writes down every storage that comes and goes, by phase."""

    def __init__(self, vocabulary: int, depth: int) -> None:
        super().__init__()
        self.vocabulary, self.depth = vocabulary, depth
        self.phases: dict[str, list[Entry]] = {}
        self.part = BEFORE
        self._keys: dict[int, int] = {}
        self._parts: dict[int, int] = {}
        self._made: dict[int, tuple[list[Entry], int]] = {}
        self._count = 0
        self._multiplied: set[tuple[str, int]] = set()
        self._sum: tuple[int, int] | None = None
        self.begin("weights")

    def begin(self, phase: str) -> None:
        self.phase, self.tape = phase, self.phases.setdefault(phase, [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # a number that nobody has computed
            return False if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1
        out = func(*args, **(kwargs or {}))
        if self.phase.startswith("optimizer"):
            owners = [self._part(t) for t in tree_iter(args) if isinstance(t, torch.Tensor)]
            known = [p for p in owners if p is not None]
            if isinstance(out, list | tuple) and len(out) > 1 and len(owners) >= len(out):
                for tensor, owner in zip(out, owners, strict=False):  # a foreach operation: one of each parameter
                    self.part = self.part if owner is None else owner
                    tree_map_only(torch.Tensor, self.see, tensor)
                return out
            self.part = known[0] if known else self.part
        if func in COPIES and self.part == BEFORE:  # of all layers' parameters, one layer after the other
            owner = self._part(next(t for t in tree_iter(args) if isinstance(t, torch.Tensor)))
            self.part = BEFORE if owner is None else owner
            self.see(out)
            self.part = BEFORE
        tree_map_only(torch.Tensor, self.see, out)
        self._sum = None
        if func is torch.ops.aten.add.Tensor and self.phase.startswith("backward") and not args[0]._is_view():
            self._sum = out.untyped_storage()._cdata, self._keys.get(args[0].untyped_storage()._cdata, -1)
        if func in WORKSPACES and self.phase in ("forward", "backward"):
            size = WORKSPACES[func]
            if (self.phase, size) not in self._multiplied:
                self._multiplied.add((self.phase, size))
                self.tape.append(Entry(f"workspace {size} {self.phase}", size, "workspace", self.part))
        if func is torch.ops.aten.bernoulli_.float:  # a dropout mask: one byte an element on CUDA
            self._shrink(out)
        return out

    def _part(self, tensor: torch.Tensor) -> int | None:
        return self._parts.get(self._keys.get(tensor.untyped_storage()._cdata, -1))

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._keys or not size or not tensor.dim():  # single numbers: most stay on the CPU
            return
        self._count += 1
        key, wide = self._count, tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        self._keys[address], self._parts[key] = key, self.part
        self._made[key] = (self.tape, len(self.tape))
        kind = "temporaries" if self.phase.startswith("optimizer") else "logits" if wide else "activations"
        self.tape.append(Entry(key, size, kind, self.part))
        weakref.finalize(storage, self._drop, address)

    def _drop(self, address: int) -> None:
        key = self._keys.pop(address, None)
        if key is not None and not self._in_place(key):
            part = self._parts[key] if self.phase.startswith(("optimizer", "end")) else self.part
            self.tape.append(Entry(key, GIVE, "", part))

    def _in_place(self, key: int) -> bool:
        """Whether a sum is where `key` was. Autograd adds a gradient to the one that came before, if nobody else holds that;
        of fake tensors it makes a new one, and lets go of that one at once.
        """
        address, first = self._sum or (0, 0)
        if key != first or self.tape[-1].key != self._keys.get(address):
            return False
        tape, i = self._made[key]
        if tape[i].size != self.tape[-1].size:
            return False
        self._keys[address] = key
        self.tape.pop()
        return True

    def _shrink(self, mask: torch.Tensor) -> None:
        tape, i = self._made[self._keys[mask.untyped_storage()._cdata]]
        tape[i] = tape[i]._replace(size=min(tape[i].size, mask.numel()))

    def name(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """From now on these tensors are of that kind."""
        for tensor in tensors:
            key = self._keys.get(tensor.untyped_storage()._cdata)
            if key is not None:
                self.tape.append(Entry(key, NAME, kind, self._parts[key]))


Homes = dict[Hashable, tuple[Hashable, int, int]]


def unroll(name: str, tape: Sequence[Entry], copies: Sequence[int], depth: int, homes: Homes) -> list[Entry]:
    """The tape for a model of `len(copies)` layers, of which layer i does what layer `copies[i]` of the `depth` recorded did.

    A tape goes through the parts in order, up or down, as often as it likes; each such run is repeated on its own. `homes`
    remembers where a storage came from: (run, part, number), for the tapes that follow.
    """
    whole: list[Entry] = []
    full = len(copies)
    like: dict[int, list[int]] = {BEFORE: [BEFORE], depth: [full]}
    for i, layer in enumerate(copies):
        like.setdefault(layer, []).append(i)

    def places(home: int, at: int, part: int) -> list[int]:
        """Where, from the copy at `part` of the entry at `at`, the storage that was made in `home` is."""
        if home in (BEFORE, depth):
            return like[home]
        if 0 <= at < depth and abs(home - at) <= NEAR:
            return [part + home - at]
        return like.get(home, [])

    for i, entries in enumerate(_runs(tape)):
        run = (name, i)
        by_part: dict[int, list[Entry]] = {}
        for entry in entries:
            by_part.setdefault(entry.part, []).append(entry)
        for part, group in by_part.items():
            made = 0
            for entry in group:
                if entry.kind == "workspace":  # in one part alone, whose other storages keep their numbers
                    homes[entry.key] = (run, part, -entry.size)
                elif entry.size > 0:
                    homes[entry.key] = (run, part, made)
                    made += 1
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


NEAR = 2
"""How many layers away a storage may be freed and still be taken for the neighbour's."""


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
        self.total = 0
        self._blocks: dict[Hashable, tuple[Any, int, str]] = {}

    def play(self, tape: Iterable[Entry], phase: str = "") -> list[Moment]:
        """The moments of this phase, in order; one for each part that it went through, or one alone in the optimizer."""
        moments: list[Moment] = []
        highest, best, at, alone = -1, self.live, None, phase == "optimizer"
        for key, size, kind, part in tape:
            if part != at and not (alone and at is not None):
                if at is not None:
                    moments.append(Moment(phase, at, dict(best)))
                highest, best, at = self.total, dict(self.live), part
            if size > 0:
                if key in self._blocks:  # made in the first step, and kept
                    continue
                block, taken = self.allocator.take(self.workspace if size == WORKSPACE else size)
                self._blocks[key] = (block, taken, kind)
                self.live[kind] += taken
                self.total += taken
                if self.total > highest:
                    highest, best = self.total, dict(self.live)
            elif key in self._blocks:
                block, taken, old = self._blocks[key]
                self.live[old] -= taken
                if size == GIVE:
                    del self._blocks[key]
                    self.allocator.give(block)
                    self.total -= taken
                else:
                    self._blocks[key] = (block, taken, kind)
                    self.live[kind] += taken
        if at is not None:
            moments.append(Moment(phase, at, dict(best)))
        return moments
