"""Linear maps in fewer products: those of one input as one, with LoRA added in place."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from torch import Tensor

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear maps that most families give the same input."""
WIDE = 1024
"""Outputs of a map above which a CPU has it by itself: to write rows of a joined product takes longer than that saves."""


@cache
def with_forward(kind: Any, forward: Callable[..., Any]) -> type:
    """The class of a module, with another forward."""
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def take(model: Any) -> list[_Site]:
    """Has linear maps of a private copy that can be computed together, or with their LoRA, ask a site for it."""
    sites = [_Site(run) for module in model.modules() for run in _runs(module)]
    for site in sites:
        site.take()
    if adapted := [site for site in sites if site.adapted]:
        model.register_forward_pre_hook(lambda *_: _share_near(adapted))
    return sites


def kept(model: Any) -> Iterator[str]:
    """In words, the LoRA that no site can have."""
    whys = Counter(_why_apart(module) for module in model.modules() if _is_lora(module))
    for why, n in sorted(whys.items()):
        if why:
            yield f"LoRA on {n} linear maps ({why})"


def updates(base: Any, adapted: Sequence[Any]) -> dict[str, list[tuple[int, Any]]] | None:
    """Name of a map of `base` → the rows of a batch, from 1, and the plain LoRA that each adds there. None where an adapted
    model is more than that.
    """
    frozen = {p.data_ptr() for p in base.parameters()}
    found: dict[str, list[tuple[int, Any]]] = {}
    for row, model in enumerate(adapted, 1):
        known: set[int] = set()
        for name, module in model.named_modules():
            if _is_plain_lora(module) and not _is_nf4(module.base_layer):
                found.setdefault(name.removeprefix("base_model.model."), []).append((row, module))
                known.update(id(p) for p in module.parameters())
        if any(id(p) not in known and p.data_ptr() not in frozen for p in model.parameters()):
            return None
    return found


def add_rows(base: Any, found: dict[str, list[tuple[int, Any]]], rows: int) -> None:
    """Has maps of a quickened copy add what `updates` found, in batches of `rows`."""
    for name, of in found.items():
        module = base.get_submodule(name)
        if not hasattr(module, "site"):
            _Site([module]).take()
        module.site.add_rows(module, of, rows)


def adjoin(model: Any) -> None:
    """Puts weights that read the same input side by side in memory, so that one product can do for all. Numbers stay."""
    for module in model.modules():
        for names in SIBLINGS:
            weights: list[Any] = [getattr(getattr(module, name, None), "weight", None) for name in names]
            if any(
                w is None or w.requires_grad or w.shape[1:] != weights[0].shape[1:] or w.dtype != weights[0].dtype
                for w in weights
            ):
                continue
            if all(itertools.starmap(_follows, itertools.pairwise(weights))):
                continue
            whole = torch.cat([w.detach() for w in weights])
            for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
                weight.data = part


def _is_lora(module: Any) -> bool:
    return type(module).__module__.startswith("peft.tuners.lora.") and hasattr(module, "base_layer")


def _is_plain_lora(module: Any) -> bool:
    """peft's LoRA on a linear map, in NF4 or not quantized, without dropout and variants."""
    return _is_lora(module) and not _why_apart(module)


def _why_apart(module: Any) -> str:
    """Why an adapted module cannot be computed with its LoRA in place; empty where it can."""
    name, base = "default", module.base_layer
    if module.active_adapters != [name] or module.merged:
        return "merged, or of another name"
    if module.lora_variant:
        return "a variant of LoRA"
    if not isinstance(module.lora_dropout[name], torch.nn.Identity):
        return "dropout"
    if module.lora_bias[name]:
        return "a bias of its own"
    return "" if _is_whole(base) or _is_nf4(base) else f"on {type(base).__name__}"


def _is_whole(module: Any) -> bool:
    """Whether it is a linear map that is not quantized, or LoRA over one."""
    return type(_base(module)) is torch.nn.Linear


def _is_nf4(module: Any) -> bool:
    return type(module).__name__ == "Linear4bit"


def _runs(parent: Any) -> Iterator[list[Any]]:
    """Linear maps among a module's own, frozen or adapted by LoRA: those whose weights are side by side together, and any
    other that is adapted.
    """
    run: list[Any] = []
    for name, module in [*parent.named_children(), ("", None)]:
        known = _is_plain_lora(module) or (type(module) is torch.nn.Linear and name != "base_layer")
        known = known and not any(p.requires_grad for p in _base(module).parameters())
        if run and not (known and _adjoined(run[-1], module)):
            if len(run) > 1 or _is_plain_lora(run[0]):
                yield run
            run = []
        if known:
            run.append(module)


def _base(module: Any) -> Any:
    return getattr(module, "base_layer", module)


def _adjoined(a: Any, b: Any) -> bool:
    if not (_is_whole(a) and _is_whole(b)):
        return False
    one, two = _base(a).weight, _base(b).weight
    return _follows(one, two) and not (one.device.type == "cpu" and len(one) > WIDE)


def _follows(a: Tensor, b: Tensor) -> bool:
    """Whether matrix `b` begins in memory where `a` ends, and has rows of the same length."""
    same = a.shape[1] == b.shape[1] and a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous()
    stored = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same and stored and a.storage_offset() + a.numel() == b.storage_offset()


class _Site:
    """Linear maps of one input, which are computed together when the first of them is called."""

    def __init__(self, members: list[Any]) -> None:
        self.members = members
        bases = [_base(member) for member in members]
        self.outs = [base.out_features for base in bases]
        self.bias = self.weight = None
        if _is_nf4(bases[0]):
            self.dtype = bases[0].compute_dtype
        else:
            first = bases[0].weight
            self.dtype = first.dtype
            self.weight = first.detach().as_strided((sum(self.outs), first.shape[1]), (first.shape[1], 1))
        if self.weight is not None and any(base.bias is not None for base in bases):
            self.bias = torch.cat([first.new_zeros(b.out_features) if b.bias is None else b.bias for b in bases])
        self.adapted = [member for member in members if member is not _base(member)]
        starts = [sum(self.outs[:i]) for i in range(len(members))]
        self.parts = [slice(s, s + n) for s, n, m in zip(starts, self.outs, members, strict=True) if m in self.adapted]
        self.near: tuple[Tensor, ...] = ()
        self.rows: list[tuple[slice, Tensor, Tensor, Tensor]] = []
        self.held: tuple[Tensor, dict[int, Tensor]] | None = None

    def take(self) -> None:
        """Has the members ask here."""
        for member in self.members:
            member.site = self
            member.__class__ = with_forward(member.__class__, _linear)

    def add_rows(self, member: Any, found: list[tuple[int, Any]], rows: int) -> None:
        """To each row of a batch of `rows` the LoRA that was `found` for it; the others keep the member's own map."""
        i = self.members.index(member)
        start, weight = sum(self.outs[:i]), self.weight
        a = torch.cat([lora.lora_A["default"].weight for _, lora in found])
        b = torch.cat([lora.scaling["default"] * lora.lora_B["default"].weight for _, lora in found], 1)
        owner = torch.tensor([row for row, lora in found for _ in range(len(lora.lora_A["default"].weight))])
        mask = (owner == torch.arange(rows)[:, None])[:, None]
        self.rows.append((slice(start, start + self.outs[i]), a.to(weight), b.to(weight), mask.to(weight)))

    def out(self, member: Any, x: Tensor) -> Tensor:
        """One member's map of `x`, and those of the others put by until they are asked for the same `x`."""
        held = self.held
        if held is None or held[0] is not x or id(member) not in held[1]:
            whole = self._whole(x)
            held = (x, dict(zip(map(id, self.members), whole.split(self.outs, -1), strict=True)))
        y = held[1].pop(id(member))
        self.held = held if held[1] else None
        return y

    def _whole(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return _Added.apply(_base(self.members[0])(x), x, *self.near)
        if self.adapted:
            return _LoRA.apply(x, self.weight, self.bias, self.parts, *self.near)
        y = linear(x, self.weight, self.bias)
        for part, a, b, mask in self.rows:
            y.flatten(0, 1)[:, part].addmm_((linear(x, a) * mask).flatten(0, 1), b.T)
        return y


def _linear(self: Any, x: Tensor) -> Tensor:
    return self.site.out(self, x)


def _share_near(sites: list[_Site]) -> None:
    """Gives each site the A of its members, one below the other, and each s B, in the base's type; all made at once."""
    far = [
        p
        for site in sites
        for ab in ("lora_A", "lora_B")
        for p in (getattr(m, ab)["default"].weight for m in site.adapted)
    ]
    scales = [m.scaling["default"] for site in sites for m in site.adapted]
    near = iter(_Near.apply(sites[0].dtype, [len(site.adapted) for site in sites], scales, *far))
    for site in sites:
        site.near = tuple(itertools.islice(near, 1 + len(site.adapted)))


class _Near(torch.autograd.Function):
    """For each site, A of its members and B of its members → all A in one and s B, in another type; gradients come back in
    the type of the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, sizes: list[int], scales: list[float], *far: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.scales, ctx.kept = sizes, scales, far[0].dtype
        ctx.ranks, near, parts, at = [], [], [], 0
        for size in sizes:
            ranks = [len(a) for a in far[at : at + size]]
            whole = far[at].new_empty((sum(ranks), far[at].shape[1]), dtype=dtype)
            own = [torch.empty_like(b, dtype=dtype) for b in far[at + size : at + 2 * size]]
            near += [whole, *own]
            parts += [*whole.split(ranks), *own]
            ctx.ranks.append(ranks)
            at += 2 * size
        torch._foreach_copy_(parts, list(far))
        torch._foreach_mul_(_last(parts, sizes), scales)
        return tuple(near)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        parts, rest = [], iter(grads)
        for size, ranks in zip(ctx.sizes, ctx.ranks, strict=True):
            parts += [*next(rest).split(ranks), *itertools.islice(rest, size)]
        far = [torch.empty_like(g, dtype=ctx.kept) for g in parts]
        torch._foreach_copy_(far, parts)
        torch._foreach_mul_(_last(far, ctx.sizes), ctx.scales)
        return None, None, None, *far


def _last(pairs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Of runs of `size` A and `size` B each, the Bs."""
    ends = itertools.accumulate(2 * size for size in sizes)
    return [b for size, end in zip(sizes, ends, strict=True) for b in pairs[end - size : end]]


class _LoRA(torch.autograd.Function):
    """x Wᵀ + bias with frozen W, and (x Aᵀ) Bᵀ added to the `parts` of it that are adapted, all in one type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[slice], a: Tensor, *bs: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low, y = linear(rows, a), linear(rows, weight, bias)
        ctx.save_for_backward(rows, weight, a, low, *bs)
        ctx.shape, ctx.parts = x.shape, parts
        for part, mine, b in zip(parts, low.split([b.shape[1] for b in bs], 1), bs, strict=True):
            y[:, part].addmm_(mine, b.T)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, weight, a, low, *bs = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        on_cpu = grad.device.type == "cpu"  # where few long rows are multiplied sooner than many short ones
        grad_low = low.new_empty(low.shape[::-1]).T if on_cpu else torch.empty_like(low)
        ranks, grad_bs = [b.shape[1] for b in bs], []
        for part, mine, to, b in zip(ctx.parts, low.split(ranks, 1), grad_low.split(ranks, 1), bs, strict=True):
            torch.mm(grad[:, part], b, out=to)
            grad_bs.append(torch.mm(mine.T, grad[:, part]).T if on_cpu else torch.mm(grad[:, part].T, mine))
        grad_x = torch.mm(grad, weight).addmm_(grad_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, torch.mm(grad_low.T, rows), *grad_bs


class _Added(torch.autograd.Function):
    """y + (x Aᵀ) Bᵀ, all in one type: what LoRA adds to a map that is computed elsewhere."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = linear(rows, a)
        ctx.save_for_backward(rows, a, low, b)
        ctx.shape = x.shape
        return torch.addmm(y.reshape(-1, y.shape[-1]), low, b.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, a, low, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_low = torch.mm(flat, b)
        grad_x = torch.mm(grad_low, a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad, grad_x, torch.mm(grad_low.T, rows), torch.mm(flat.T, low)
