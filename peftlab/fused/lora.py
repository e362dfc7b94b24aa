"""LoRA beside the frozen linear map that it adapts, in few kernels: y = x Wᵀ + s (x Aᵀ) Bᵀ. Hu et al. 2021.

W is d_out × d_in, A is rank × d_in, B is d_out × rank and s a number.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn.functional import linear

if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from torch import Tensor
    from torch.nn import Linear, Module

NAME = "default"  # peft's name for a model's only adapter


class Context(FunctionCtx):
    """What torch passes as `ctx`. Attributes below `needs_input_grad` exist only in Functions that set them."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    columns: list[slice]
    ranks: list[list[int]]
    sizes: list[int]
    shape: torch.Size
    scales: list[float]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Update:
    """What LoRA adds to a linear map: s (x Aᵀ) Bᵀ."""

    a: Tensor
    b: Tensor
    scale: float


def is_lora(module: Module) -> bool:
    """Whether this is a map that peft has adapted by LoRA or one of its variants."""
    return type(module).__module__.startswith("peft.tuners.lora.") and hasattr(module, "base_layer")


def update_of(module: Module) -> Update | None:
    """What an adapted map adds; None for a module without LoRA, and for one that does more than add this."""
    if not is_lora(module) or why_not_fused(module):
        return None
    lora = cast("LoraLinear", module)
    a, b = (lora.get_parameter(f"lora_{side}.{NAME}.weight") for side in "AB")
    return Update(a, b, lora.scaling[NAME])


def why_not_fused(module: Module) -> str:
    """Why an adapted map cannot be computed with its LoRA in place; empty where it can."""
    lora, base = cast("LoraLinear", module), base_of(module)
    if lora.active_adapters != [NAME] or lora.merged:
        return "merged, or of another name"
    if lora.lora_variant:
        return "a variant of LoRA"
    if not isinstance(lora.lora_dropout[NAME], torch.nn.Identity):
        return "dropout"
    if lora.lora_bias[NAME]:
        return "a bias of its own"
    return "" if type(base) is torch.nn.Linear or is_nf4(base) else f"on {type(base).__name__}"


def base_of(module: Module) -> Linear:
    """The frozen map of an adapted module; any other module is its own."""
    return cast("Linear", getattr(module, "base_layer", module))


def is_nf4(module: Module) -> bool:
    """Whether this is bitsandbytes' linear map in 4 bits."""
    return type(module).__name__ == "Linear4bit"


class Cast(Function):
    """Every A and s B of a model in the type of its base, made at once, and gradients in the parameters' own type.

    `parameters` are, for each group of maps that read one input, all A and then all B; `sizes` are the groups' numbers of maps.
    It gives for each group its As one below the other, then each s B; in the order of the layers, so that a trace of a few
    layers extends to all.
    """

    @staticmethod
    def forward(
        ctx: Context, dtype: torch.dtype, sizes: list[int], scales: list[float], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.scales, ctx.dtype = sizes, scales, parameters[0].dtype
        ctx.ranks, made, parts, at = [], [], [], 0
        for size in sizes:
            ranks = [len(a) for a in parameters[at : at + size]]
            stacked = parameters[at].new_empty((sum(ranks), parameters[at].shape[1]), dtype=dtype)
            scaled = [torch.empty_like(b, dtype=dtype) for b in parameters[at + size : at + 2 * size]]
            made += [stacked, *scaled]
            parts += [*stacked.split(ranks), *scaled]
            ctx.ranks.append(ranks)
            at += 2 * size
        torch._foreach_copy_(parts, list(parameters))
        torch._foreach_mul_(_bs(parts, sizes), scales)
        return tuple(made)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts: list[Tensor] = []
        rest = iter(grads)
        for size, ranks in zip(ctx.sizes, ctx.ranks, strict=True):
            parts += [*next(rest).split(ranks), *itertools.islice(rest, size)]
        own = [torch.empty_like(grad, dtype=ctx.dtype) for grad in parts]
        torch._foreach_copy_(own, parts)
        torch._foreach_mul_(_bs(own, ctx.sizes), ctx.scales)
        return None, None, None, *own


def on_cpu(tensor: Tensor) -> bool:
    """True for a tensor that a CPU computes with. The trace's fake tensors report `cpu` too, but stand for a GPU's: False."""
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)


def _bs(parameters: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Every B among the parameters of groups."""
    ends = itertools.accumulate(2 * size for size in sizes)
    return [b for size, end in zip(sizes, ends, strict=True) for b in parameters[end - size : end]]


class LinearWithLoRA(Function):
    """x Wᵀ + bias with frozen W, and (x Aᵀ) Bᵀ added to each adapted map's `columns`; `a` is all As, one below the other."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, columns: list[slice], a: Tensor, *bs: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low, y = linear(rows, a), linear(rows, weight, bias)
        ctx.save_for_backward(rows, weight, a, low, *bs)
        ctx.columns = columns
        for part, own, b in zip(columns, low.split([b.shape[1] for b in bs], 1), bs, strict=True):
            y[:, part].addmm_(own, b.T)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, low, *bs = ctx.saved_tensors
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        cpu = on_cpu(grad)  # which multiplies few long rows sooner than many short ones
        grad_low = low.new_empty(low.shape[::-1]).T if cpu else torch.empty_like(low)
        ranks, grad_bs = [b.shape[1] for b in bs], []
        for part, own, grad_own, b in zip(ctx.columns, low.split(ranks, 1), grad_low.split(ranks, 1), bs, strict=True):
            torch.mm(grad[:, part], b, out=grad_own)
            grad_bs.append(torch.mm(own.T, grad[:, part]).T if cpu else torch.mm(grad[:, part].T, own))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight).addmm_(grad_low, a).view(*shape[:-1], -1)
        return grad_x, None, None, None, torch.mm(grad_low.T, rows), *grad_bs


class Added(Function):
    """y + (x Aᵀ) Bᵀ, all in one type, for a map whose y is computed elsewhere."""

    @staticmethod
    def forward(ctx: Context, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = linear(rows, a)
        ctx.save_for_backward(rows, a, low, b)
        ctx.shape = x.shape
        return torch.addmm(y.reshape(-1, y.shape[-1]), low, b.T).view(y.shape)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, low, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_low = torch.mm(flat, b)
        grad_x = torch.mm(grad_low, a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad, grad_x, torch.mm(grad_low.T, rows), torch.mm(flat.T, low)
