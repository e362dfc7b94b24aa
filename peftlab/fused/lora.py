"""LoRA beside the frozen linear map that it adapts, in few kernels: y = x Wᵀ + s (x Aᵀ) Bᵀ. Hu et al. 2021.

W is d_out × d_in, A is rank × d_in, B is d_out × rank and s a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.autograd import Function
from torch.nn.functional import linear

from .context import Context

if TYPE_CHECKING:
    from peft.tuners.lora.layer import Linear as LoraLinear
    from torch import Tensor
    from torch.nn import Linear, Module

NAME = "default"
"""peft's name for a model's only adapter."""


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
    if not is_lora(module) or why_apart(module):
        return None
    lora = cast("LoraLinear", module)
    a, b = (lora.get_parameter(f"lora_{side}.{NAME}.weight") for side in "AB")
    return Update(a, b, lora.scaling[NAME])


def why_apart(module: Module) -> str:
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

    `ranks` has the rank of each map, by groups of maps that read one input; `parameters` are all A in this order and then
    all B. It gives for each group its As one below the other as one matrix, and then each s B.
    """

    @staticmethod
    def forward(
        ctx: Context, dtype: torch.dtype, ranks: list[list[int]], scales: list[float], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.scales, ctx.dtype = ranks, scales, parameters[0].dtype
        a, stacked = iter(parameters), []
        for group in ranks:
            parts = [next(a) for _ in group]
            stacked.append(parts[0].new_empty((sum(group), parts[0].shape[1]), dtype=dtype))
        scaled = [torch.empty_like(b, dtype=dtype) for b in parameters[len(scales) :]]
        torch._foreach_copy_([*_split(stacked, ranks), *scaled], list(parameters))
        torch._foreach_mul_(scaled, scales)
        return *stacked, *scaled

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        groups = len(ctx.ranks)
        cast = [*_split(grads[:groups], ctx.ranks), *grads[groups:]]
        own = [torch.empty_like(grad, dtype=ctx.dtype) for grad in cast]
        torch._foreach_copy_(own, cast)
        torch._foreach_mul_(own[-len(ctx.scales) :], ctx.scales)
        return None, None, None, *own


def _split(stacked: Sequence[Tensor], ranks: list[list[int]]) -> list[Tensor]:
    return [part for whole, group in zip(stacked, ranks, strict=True) for part in whole.split(group)]


class LinearWithLoRA(Function):
    """x Wᵀ + bias with frozen W, and (x Aᵀ) Bᵀ added to the `columns` of each adapted map, all in one type.

    `a` is the As of these maps one below the other; `bs` are their Bs.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        columns: list[slice],
        a: Tensor,
        *bs: Tensor,
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
        on_cpu = grad.device.type == "cpu"  # a CPU multiplies few long rows sooner than many short ones
        grad_low = low.new_empty(low.shape[::-1]).T if on_cpu else torch.empty_like(low)
        ranks, grad_bs = [b.shape[1] for b in bs], []
        for part, own, grad_own, b in zip(ctx.columns, low.split(ranks, 1), grad_low.split(ranks, 1), bs, strict=True):
            torch.mm(grad[:, part], b, out=grad_own)
            grad_bs.append(torch.mm(own.T, grad[:, part]).T if on_cpu else torch.mm(grad[:, part].T, own))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight).addmm_(grad_low, a).view(*shape[:-1], -1)
        return grad_x, None, None, None, torch.mm(grad_low.T, rows), *grad_bs


def added(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + (x Aᵀ) Bᵀ, all in one type, for a map whose y is computed elsewhere."""
    low = linear(x.reshape(-1, x.shape[-1]), a)
    return torch.addmm(y.reshape(-1, y.shape[-1]), low, b.T).view(y.shape)
