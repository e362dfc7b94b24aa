"""Linear maps in fewer products: maps of one input are computed as one, with their LoRA in place."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from . import lora
from .lora import Update

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # maps that most families give the same input
WIDE = 1024  # outputs above which a map stays alone on a CPU, where writing rows of a joined product takes too long
GROUP = "peftlab_group"  # the attribute of a taken map that holds its Group

_kinds: dict[tuple[type, Callable[..., object]], type] = {}


def give_forward(module: Module, forward: Callable[..., object]) -> None:
    """Has `module` alone run another forward, as an instance of a class derived from its own."""
    kind = type(module)
    if (kind, forward) not in _kinds:
        parts = {"forward": forward, "__module__": kind.__module__}
        _kinds[kind, forward] = type(kind.__name__, (kind,), parts)
    module.__class__ = _kinds[kind, forward]


def adjoin(model: Module) -> None:
    """Moves weights that read the same input side by side in memory, so that one product can do for all. Numbers stay."""
    for module, names in itertools.product(model.modules(), SIBLINGS):
        found = (lora.base_of(child) for name in names if (child := module._modules.get(name)) is not None)
        maps = [base for base in found if isinstance(base, torch.nn.Linear)]
        weights = [child.weight for child in maps]
        alike = len({(w.shape[1], w.dtype) for w in weights}) == 1 and not any(w.requires_grad for w in weights)
        if len(maps) < len(names) or not alike or all(itertools.starmap(_follows, itertools.pairwise(weights))):
            continue
        whole = torch.cat([w.detach() for w in weights])
        for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.data = part


def _follows(a: Tensor, b: Tensor) -> bool:
    """Whether matrix `b` begins in memory where `a` ends, and has rows of the same length."""
    same = a.shape[1] == b.shape[1] and a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous()
    stored = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same and stored and a.storage_offset() + a.numel() == b.storage_offset()


def take(model: Module) -> list[Group]:
    """Groups the linear maps of a private copy, and has each map leave its work to its group."""
    found = [maps for module in model.modules() for maps in _side_by_side(module)]
    groups = [Group(maps) for maps in found if len(maps) > 1 or lora.update_of(maps[0])]
    if adapted := [group for group in groups if group.updates]:
        model.register_forward_pre_hook(lambda *_: _cast(adapted))
    return groups


def kept(model: Module) -> list[str]:
    """In words, the LoRA that stays with peft, because no group can compute it."""
    whys = Counter(lora.why_not_fused(module) for module in model.modules() if lora.is_lora(module))
    return [f"LoRA on {n} linear maps ({why})" for why, n in sorted(whys.items()) if why]


def _side_by_side(parent: Module) -> Iterator[list[Module]]:
    """Frozen linear maps, with or without LoRA, among the children of `parent`, in runs that are side by side in memory."""
    maps: list[Module] = []
    for name, child in parent.named_children():
        plain = type(child) is torch.nn.Linear and name != "base_layer"
        if not (plain or lora.update_of(child)) or any(p.requires_grad for p in lora.base_of(child).parameters()):
            continue
        last, base = lora.base_of(maps[-1] if maps else child), lora.base_of(child)
        whole = not lora.is_nf4(last) and not lora.is_nf4(base) and _follows(last.weight, base.weight)
        if maps and not (whole and (last.out_features <= WIDE or not lora.on_cpu(last.weight))):
            yield maps
            maps = []
        maps.append(child)
    if maps:
        yield maps


class Group:
    """Linear maps of one input, computed together when one of them is called; what that gives the others waits for them."""

    def __init__(self, members: list[Module]) -> None:
        self.members = members
        bases = [lora.base_of(member) for member in members]
        self.outs = [base.out_features for base in bases]
        self.columns = [slice(end - n, end) for n, end in zip(self.outs, itertools.accumulate(self.outs), strict=True)]
        both = zip(self.columns, map(lora.update_of, members), strict=True)
        pairs = [(columns, update) for columns, update in both if update]
        self.adapted_columns, self.updates = [columns for columns, _ in pairs], [update for _, update in pairs]
        self.cast: Sequence[Tensor] = ()  # all A one below the other, then each s B, in the type of the base
        self.of_rows: list[_OfRows] = []
        self.waiting: tuple[Tensor, dict[int, Tensor]] | None = None  # an input; by a member's id, what that gives
        self.weight = self.bias = None
        if lora.is_nf4(bases[0]):
            self.dtype: torch.dtype = getattr(bases[0], "compute_dtype")  # noqa: B009  bitsandbytes has no types
        else:
            first = bases[0].weight
            self.dtype = first.dtype
            self.weight = first.detach().as_strided((sum(self.outs), first.shape[1]), (first.shape[1], 1))
            if any(base.bias is not None for base in bases):
                self.bias = torch.cat([first.new_zeros(b.out_features) if b.bias is None else b.bias for b in bases])
        for member in members:
            setattr(member, GROUP, self)
            give_forward(member, _ask_group)

    def out(self, member: Module, x: Tensor) -> Tensor:
        """What one member's map gives for `x`."""
        waiting = self.waiting
        if waiting is None or waiting[0] is not x or id(member) not in waiting[1]:
            waiting = (x, dict(zip(map(id, self.members), self._all(x).split(self.outs, -1), strict=True)))
        y = waiting[1].pop(id(member))
        self.waiting = waiting if waiting[1] else None
        return y

    def _all(self, x: Tensor) -> Tensor:
        """What all members' maps give for `x`, side by side in its last dimension."""
        if self.weight is None:
            return lora.Added.apply(lora.base_of(self.members[0])(x), x, *self.cast)
        if self.updates:
            return lora.LinearWithLoRA.apply(x, self.weight, self.bias, self.adapted_columns, *self.cast)
        y = linear(x, self.weight, self.bias)
        for own in self.of_rows:
            y.flatten(0, 1)[:, own.columns].addmm_((linear(x, own.a) * own.mask).flatten(0, 1), own.b.T)
        return y


def _ask_group(self: Module, x: Tensor) -> Tensor:
    """The forward of a taken map."""
    return getattr(self, GROUP).out(self, x)


def _cast(groups: list[Group]) -> None:
    """Gives each group its members' LoRA in the type of the base, before the model reads."""
    parameters = [p for g in groups for p in (*(update.a for update in g.updates), *(update.b for update in g.updates))]
    scales = [update.scale for group in groups for update in group.updates]
    made = iter(lora.Cast.apply(groups[0].dtype, [len(group.updates) for group in groups], scales, *parameters))
    for group in groups:
        group.cast = tuple(itertools.islice(made, 1 + len(group.updates)))


@dataclass(frozen=True, eq=False)
class _OfRows:
    """The LoRA of several models on one map, each for its own row of a batch."""

    columns: slice  # of the group's output
    a: Tensor  # all A, one below the other: ranks × d_in
    b: Tensor  # all s B, side by side: d_out × ranks
    mask: Tensor  # rows × 1 × ranks: 1 where this row has this rank, 0 elsewhere


RowUpdates = dict[str, list[tuple[int, Update]]]
"""Name of a map of the base → (row of the batch, what is added there), for rows from 1."""


def updates(base: Module, adapted: Sequence[Module]) -> RowUpdates | None:
    """What each model of `adapted` adds to `base`, in the next row of a batch; None where one is more than plain LoRA."""
    frozen = {p.data_ptr() for p in base.parameters()}
    found: RowUpdates = {}
    for row, model in enumerate(adapted, 1):
        known: set[int] = set()
        for name, module in model.named_modules():
            if (update := lora.update_of(module)) and not lora.is_nf4(lora.base_of(module)):
                found.setdefault(name.removeprefix("base_model.model."), []).append((row, update))
                known.update(id(p) for p in module.parameters())
        if any(id(p) not in known and p.data_ptr() not in frozen for p in model.parameters()):
            return None
    return found


def add_rows(base: Module, found: RowUpdates, rows: int) -> None:
    """Has maps of a quickened copy add what `updates` found, in batches of `rows`; other rows stay the base's own."""
    for name, of_map in found.items():
        module = base.get_submodule(name)
        group: Group = getattr(module, GROUP, None) or Group([module])
        assert group.weight is not None
        a = torch.cat([update.a for _, update in of_map])
        b = torch.cat([update.scale * update.b for _, update in of_map], 1)
        owner = torch.tensor([row for row, update in of_map for _ in range(len(update.a))])
        mask = (owner == torch.arange(rows)[:, None])[:, None]
        columns, weight = group.columns[group.members.index(module)], group.weight
        group.of_rows.append(_OfRows(columns, a.to(weight), b.to(weight), mask.to(weight)))
