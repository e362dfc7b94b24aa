"""Stand-ins for what CUDA runs and a CPU does not: they keep, between forward and backward, what the real kernels keep.

Numbers are never computed, only shapes and types; for tracing on fake tensors. Importing this imports torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import seam

NAME = "peftlab-trace"
"""Under which transformers knows the attention below."""


def _rows(x: Tensor) -> Tensor:
    """An output (batch, heads, tokens, head size) in the layout of the fused kernels: tokens before heads."""
    batch, heads, tokens, size = x.shape
    return x.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


class Flash(torch.autograd.Function):
    """FlashAttention-2 as PyTorch calls it: half precision, no mask, grouped keys and values as they are."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _rows(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v = ctx.saved_tensors[:3]
        batch, heads, tokens, size = q.shape
        accumulated = q.new_empty(batch, heads, _up(tokens, 128), _up(size, 32), dtype=torch.float32)
        delta = q.new_empty(batch, heads, _up(tokens, 128), dtype=torch.float32)
        dq, dk, dv = _rows(q), q.new_empty(batch, k.shape[2], heads, size), q.new_empty(batch, v.shape[2], heads, size)
        del accumulated, delta
        if heads != k.shape[1]:
            dk, dv = (g.unflatten(2, (k.shape[1], -1)).sum(3) for g in (dk, dv))
        return dq, dk.transpose(1, 2), dv.transpose(1, 2)


class Efficient(torch.autograd.Function):
    """The memory-efficient kernel: any precision, a mask if need be, one head of keys and values for each of queries."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = _rows(q)
        lse = q.new_empty(*q.shape[:2], _up(q.shape[2], 32), dtype=torch.float32)
        bias = [] if mask is None else [mask.new_empty(mask.shape, dtype=q.dtype)]  # true and false as 0 and -inf
        ctx.save_for_backward(q, k, v, out, lse, *bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v = ctx.saved_tensors[:3]
        return _rows(q), _rows(k), _rows(v), None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """scaled_dot_product_attention as transformers calls it on CUDA, with the kernel that PyTorch picks there.

    Half precision without a mask runs flash. With a mask, or in fp32, the memory-efficient kernel runs; but it takes no
    grouped heads, so that without a mask, where transformers leaves them grouped, the plain mathematics runs instead.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.bfloat16) for t in (query, key, value))
    if attention_mask is not None and query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]  # a view of a single head, a copy of several
        key, value = (t[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (key, value))
    if attention_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        out = Flash.apply(query, key, value)
    elif query.shape[1] == key.shape[1]:
        out = Efficient.apply(query, key, value, attention_mask)
    else:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True, dropout_p=dropout if module.training else 0.0
            )
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes NAME an attention that transformers knows; masks where a window is shorter than the text, or after a prefix."""

    def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
        """transformers' own takes fake tensors for a compilation, and then always makes one."""
        alone = kwargs["q_length"] == kwargs["kv_length"]  # a prefix in the cache makes them differ
        if alone and (local_size is None or kwargs["kv_length"] < local_size):
            return None
        return seam.sdpa_mask(*args, local_size=local_size, **kwargs)

    seam.register_attention(NAME, attention, mask)


class Norm(torch.autograd.Function):
    """The fused RMS norm: it keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class Fused(TorchFunctionMode):
    """Has torch's fused norm for one operation, as it is on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rms_norm:
            x, _, weight, *_ = args
            return Norm.apply(x, weight)
        return func(*args, **(kwargs or {}))


class _FromBits(torch.autograd.Function):
    """bitsandbytes' product with packed weights: it keeps them, not its input, and unpacks them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return x.new_empty(*x.shape[:-1], module.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        weight = grad.new_empty(ctx.module.out_features, ctx.module.in_features)
        return grad @ weight, None


class _FromBytes(_FromBits):
    """int8: the input is rounded too, and kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.save_for_backward(x)
        rounded = x.to(torch.float16).to(torch.int8)
        del rounded
        return _FromBits.forward(ctx, x, module)


def _features(linear: Any) -> tuple[int, int]:
    """In and out; GPT-2's Conv1D stores its weight the other way round, and is quantized all the same."""
    return (linear.in_features, linear.out_features) if isinstance(linear, nn.Linear) else tuple(linear.weight.shape)


class Quantized(nn.Module):
    """A frozen linear map in NF4 or int8 as bitsandbytes stores it: packed weights and the scales of their blocks."""

    def __init__(self, linear: Any, kind: str, double: bool, cloned: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = _features(linear)
        self.compute_dtype = linear.weight.dtype
        n, device = self.in_features * self.out_features, linear.weight.device
        self.cloned, self.product = cloned, _FromBits if kind == "nf4" else _FromBytes
        parts: dict[str, tuple[int, torch.dtype]] = {"packed": (n // 2, torch.uint8), "code": (16, torch.float32)}
        if kind == "int8":
            parts = {"packed": (n, torch.int8), "scales": (self.out_features, torch.float32)}
        elif double:
            blocks = _up(n, 64) // 64
            parts |= {"scales": (blocks, torch.uint8), "nested": (_up(blocks, 256) // 256, torch.float32)}
            parts |= {"nested_code": (256, torch.float32), "offset": (1, torch.float32)}
        else:
            parts |= {"scales": (_up(n, 64) // 64, torch.float32)}
        for name, (size, dtype) in parts.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=device))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.product.apply(x, self)
        out = out if self.bias is None else out + self.bias
        return (
            out.clone() if self.cloned else out
        )  # as peft does before it adds an update to a quantized layer's output


class Linear4bit(Quantized):
    """In NF4, under bitsandbytes' name for it."""


def quantize(model: nn.Module, names: set[str], kind: str, double: bool) -> None:
    """Puts a Quantized in place of each linear map of `names`, inside a peft layer where there is one."""
    for name, module in list(model.named_modules()):
        inner = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        if inner in names and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            parent = model.get_submodule(name.rpartition(".")[0])
            adapted = name.endswith(".base_layer")
            made = Linear4bit if kind == "nf4" else Quantized
            setattr(parent, name.rpartition(".")[2], made(module, kind, double, adapted and kind == "nf4"))
