"""The same functions in fewer operations, put in place of a model's own: norms, rotary positions and LoRA's product.

A model of 30 layers launches thousands of small kernels a step, and each takes longer than its arithmetic. Everything here
is torch's own operations, so nothing is compiled. Results differ from the model's own by rounding alone, which `quicken`
checks for each norm before it takes it.
"""

from __future__ import annotations

import sys
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, rms_norm

if TYPE_CHECKING:
    from torch import Tensor

ROTARY = "apply_rotary_pos_emb"
"""What transformers' attention modules call, whatever the family."""


def quicken(model: Any) -> dict[str, int]:
    """Gives the modules of a private copy fused forwards; how many of each kind."""
    norms = [m for m in model.modules() if _is_rms_norm(m)]
    rotary = [m for m in model.modules() if _rotates_halves(m)]
    adapted = [m for m in model.modules() if _is_plain_lora(m)]
    for module in norms:
        module.forward = MethodType(_norm_of(module), module)
    for module in rotary:
        own = type(module).forward
        names = {**own.__globals__, ROTARY: rotate}
        module.forward = MethodType(FunctionType(own.__code__, names, own.__name__, own.__defaults__), module)
    for module in adapted:
        module.forward = MethodType(_lora, module)
    if adapted:
        _keep_near(model, adapted)
    return {"norms": len(norms), "rotary": len(rotary), "lora": len(adapted)}


def _is_rms_norm(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight")


def _norm_of(module: Any) -> Any:
    """torch's fused norm where it is this module's function, by trying both; else the module's own."""
    weight = module.weight
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    probe = torch.linspace(-3, 2, 4 * weight.numel(), device=weight.device).to(weight.dtype).view(4, -1)
    with torch.no_grad():
        want = type(module).forward(module, probe).float()
        for shift in (0.0, 1.0):  # Gemma's weight is what is added to 1
            got = rms_norm(probe, weight.shape, weight + shift, eps).float()
            if torch.allclose(got, want, rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-6):
                return lambda self, x: rms_norm(
                    x, self.weight.shape, self.weight + shift if shift else self.weight, eps
                )
    return type(module).forward


def _rotates_halves(module: Any) -> bool:
    """Whether its forward rotates queries and keys in the way of Llama, where a head's two halves are the pairs."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or ROTARY not in code.co_names or not hasattr(module, "head_dim"):
        return False
    own = getattr(sys.modules[type(module).__module__], ROTARY, None)
    if own is None:
        return False
    q, k = (torch.linspace(-1, 2, heads * 24).view(1, heads, 3, 8) for heads in (2, 1))
    angles = torch.linspace(0, 3, 12).view(1, 3, 4).repeat(1, 1, 2)
    try:
        want = own(q, k, angles.cos(), angles.sin())
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(want, rotate(q, k, angles.cos(), angles.sin()), strict=True)
    )


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **_: Any) -> tuple[Tensor, Tensor]:
    """Rotary positions of queries and keys, batch × heads × length × d. Su et al. 2021."""
    signed = getattr(sin, "signed", None)
    if signed is None:  # the layers share one sin
        half = sin.shape[-1] // 2
        signed = sin.signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # type: ignore[attr-defined]
    cos, signed = cos.unsqueeze(unsqueeze_dim), signed.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, signed), _Rotated.apply(k, cos, signed)


class _Rotated(torch.autograd.Function):
    """x cos + roll(x) sin, with the sign of `roll`'s first half in sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None


def _is_plain_lora(module: Any) -> bool:
    """peft's LoRA on an unquantized linear map, without dropout and variants."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or module.active_adapters != ["default"] or module.lora_variant or module.merged:
        return False
    base = module.base_layer
    dropout = module.lora_dropout["default"]
    return type(base) is torch.nn.Linear and isinstance(dropout, torch.nn.Identity) and not module.lora_bias["default"]


def _lora(self: Any, x: Tensor) -> Tensor:
    base, a, b = self.base_layer, self.lora_A["default"].weight, self.lora_B["default"].weight
    near_a, near_b = getattr(self, "near", (a, b))
    return _LoRA.apply(x, base.weight, base.bias, a, b, near_a, near_b, self.scaling["default"])


class _LoRA(torch.autograd.Function):
    """x Wᵀ + bias + s (x Aᵀ) Bᵀ with frozen W. `near_a` and `near_b` are A and B in the type of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, near_a: Tensor, near_b: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        low = linear(rows, near_a)
        out = linear(rows, weight, bias).addmm_(low, near_b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, near_a, near_b, low)
        ctx.scale, ctx.shape, ctx.kept = scale, x.shape, a.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = _scaled(grad, b, ctx.scale)
        grad_b = _into(ctx.kept, grad.T, low).mul_(ctx.scale)
        grad_a = _into(ctx.kept, grad_low.T, rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight).addmm_(grad_low, a).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None, None


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def _into(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """left @ right in a type that may be wider than theirs."""
    if dtype == left.dtype:
        return torch.mm(left, right)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _keep_near(model: Any, adapted: list[Any]) -> None:
    """Copies of A and B in the base's type, renewed all at once before each forward pass."""
    far = [p for m in adapted for p in (m.lora_A["default"].weight, m.lora_B["default"].weight)]
    dtype = adapted[0].base_layer.weight.dtype
    if all(p.dtype == dtype for p in far):
        return
    near = [p.detach().to(dtype) for p in far]
    for module, pair in zip(adapted, zip(near[::2], near[1::2], strict=True), strict=True):
        module.near = pair

    def renew(*_: Any) -> None:
        with torch.no_grad():
            torch._foreach_copy_(near, far)

    model.register_forward_pre_hook(renew)
