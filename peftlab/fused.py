"""The same functions in fewer operations, put in place of a model's own: norms, rotary positions and LoRA's product.

A model of 30 layers launches thousands of small kernels a step, and each takes longer than its arithmetic. Everything here
is torch's own operations, so nothing is compiled. Results differ from the model's own by rounding alone, which is tried on
each norm and each way to rotate before it is taken.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

ROTARY = "apply_rotary_pos_emb"
"""What transformers' attention modules call, whatever the family."""
HEADS_FIRST = 1
"""Where cos and sin get a dimension for the heads, if queries are batch × heads × length × d."""
ATTENTION = "peftlab"
"""Our name among transformers' ways to attend."""


def quicken(model: Any) -> dict[str, int]:
    """Fuses what it knows in a private copy of a model, and says how many of each kind. The copy's modules stay themselves."""
    adapted = []
    configs = {id(c): c for c in (getattr(module, "config", None) for module in model.modules())}.values()
    counts = {"norms": 0, "rotary": 0, "lora": 0, "attention": sum(map(_attention, configs))}
    for module in model.modules():
        if forward := _norm(module):
            counts["norms"] += 1
        elif forward := _rotary(module.__class__):
            counts["rotary"] += 1
        elif _is_plain_lora(module):
            forward = _lora
            adapted.append(module)
            counts["lora"] += 1
        if forward:
            module.__class__ = _with_forward(module.__class__, forward)
    if adapted:
        model.register_forward_pre_hook(lambda *_: _share_near(adapted))
    return counts


@cache
def _with_forward(kind: Any, forward: Callable[..., Any]) -> type:
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _norm(module: Any) -> Callable[..., Any] | None:
    """torch's fused RMS norm, where it is this module's function."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "weight"):
        return None
    weight = module.weight
    probe = torch.linspace(-3, 2, 4 * weight.numel(), device=weight.device).to(weight.dtype).view(4, -1)
    with torch.no_grad():
        want = module(probe).float()
        for forward in (_rms, _rms_around_one):
            near = 2 * torch.finfo(weight.dtype).eps
            if torch.allclose(forward(module, probe).float(), want, rtol=near, atol=1e-6):
                return forward
    return None


def _eps(module: Any) -> float:
    return getattr(module, "variance_epsilon", None) or module.eps


def _rms(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, self.weight.shape, self.weight, _eps(self))


def _rms_around_one(self: Any, x: Tensor) -> Tensor:
    """Gemma's, whose weight is what is added to 1."""
    return rms_norm(x, self.weight.shape, 1 + self.weight, _eps(self))


@cache
def _rotary(kind: Any) -> Callable[..., Any] | None:
    """The forward of an attention module with `rotate` for its own, where that pairs a head's two halves as Llama's does."""
    forward = getattr(kind, "forward", None)
    own = getattr(sys.modules.get(kind.__module__), ROTARY, None)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names or own is None:
        return None
    q, k = (torch.linspace(-1, 2, heads * 24).view(1, heads, 3, 8) for heads in (2, 1))
    angles = torch.linspace(0, 3, 12).view(1, 3, 4).repeat(1, 1, 2)
    try:
        want = own(q, k, angles.cos(), angles.sin())
    except (TypeError, RuntimeError, ValueError):
        return None
    got = rotate(q, k, angles.cos(), angles.sin())
    if not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True)):
        return None
    fused = FunctionType(forward.__code__, {**forward.__globals__, ROTARY: rotate}, "forward", forward.__defaults__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = HEADS_FIRST, **_: Any
) -> tuple[Tensor, Tensor]:
    """Rotary positions of queries and keys, batch × heads × length × d. Su et al. 2021."""
    signed = getattr(sin, "signed", None)
    if signed is None:  # the layers share one sin
        half = sin.shape[-1] // 2
        signed = sin.signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # type: ignore[attr-defined]
    swapped = unsqueeze_dim == HEADS_FIRST  # in memory, length comes before heads all the same
    both = [x.transpose(1, 2) if swapped else x for x in (q, k)]
    turned = _Rotated.apply(torch.cat(both, 2), cos.unsqueeze(2), signed.unsqueeze(2))
    new_q, new_k = turned.split([x.shape[2] for x in both], 2)
    return (new_q.transpose(1, 2), new_k.transpose(1, 2)) if swapped else (new_q, new_k)


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


def _attention(config: Any) -> bool:
    """Has a private config's attention take its mask as the kernels want it: not at all, or ready to be added."""
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    _register()
    config._attn_implementation = ATTENTION
    return True


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _mask)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """transformers' own, but that the heads of a single token which share keys are read as that many tokens of one head."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, length, _ = query.shape
    if mask is None or length > 1 or any(more.get(name) is not None for name in ("softcap", "position_bias")):
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(grouped, key, value, mask.to(query.dtype), scale=more.get("scaling"))
    return out.reshape(rows, 1, heads, -1), None


def _mask(**asked: Any) -> Tensor | None:
    """Of scaled_dot_product_attention: None where it is causal and no more, as transformers has it outside of recordings."""
    from transformers.masking_utils import sdpa_mask

    length, window = asked["q_length"], asked.get("local_size")
    whole = asked.get("attention_mask") is None and asked["kv_length"] == length and (not window or length < window)
    if whole and not asked.get("use_vmap") and _recording():
        return None
    mask = sdpa_mask(**asked)
    if mask is None or length > 1:
        return mask
    return torch.zeros_like(mask, dtype=asked["dtype"]).masked_fill_(~mask, -torch.inf)


def _recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_plain_lora(module: Any) -> bool:
    """peft's LoRA on an unquantized linear map, without dropout and variants."""
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or module.active_adapters != ["default"] or module.lora_variant or module.merged:
        return False
    dropout = module.lora_dropout["default"]
    plain = isinstance(dropout, torch.nn.Identity) and not module.lora_bias["default"]
    return plain and type(module.base_layer) is torch.nn.Linear


def _share_near(adapted: list[Any]) -> None:
    """Gives each module its A and s B in the base's type, all made at once."""
    far = [p for m in adapted for p in (m.lora_A["default"].weight, m.lora_B["default"].weight)]
    near = _Near.apply(adapted[0].base_layer.weight.dtype, [m.scaling["default"] for m in adapted], *far)
    for module, pair in zip(adapted, zip(near[::2], near[1::2], strict=True), strict=True):
        module.near = pair


class _Near(torch.autograd.Function):
    """A and B of each module → A and s B in another type; gradients come back in the type of the parameters."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, scales: list[float], *far: Tensor) -> tuple[Tensor, ...]:
        ctx.scales, ctx.kept = scales, far[0].dtype
        near = [torch.empty_like(p, dtype=dtype) for p in far]
        torch._foreach_copy_(near, list(far))
        torch._foreach_mul_(near[1::2], scales)
        return tuple(near)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        far = [torch.empty_like(g, dtype=ctx.kept) for g in grads]
        torch._foreach_copy_(far, list(grads))
        torch._foreach_mul_(far[1::2], ctx.scales)
        return None, None, *far


def _lora(self: Any, x: Tensor) -> Tensor:
    return _LoRA.apply(x, self.base_layer.weight, self.base_layer.bias, *self.near)


class _LoRA(torch.autograd.Function):
    """x Wᵀ + bias + (x Aᵀ) Bᵀ with frozen W, all in one type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = linear(rows, a)
        ctx.save_for_backward(rows, weight, a, b, low)
        ctx.shape = x.shape
        return linear(rows, weight, bias).addmm_(low, b.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, weight, a, b, low = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low = torch.mm(grad, b)
        grad_x = torch.mm(grad, weight).addmm_(grad_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, torch.mm(grad_low.T, rows), torch.mm(grad.T, low)
