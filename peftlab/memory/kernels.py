"""Stand-ins for what CUDA runs and a CPU does not: they keep between forward and backward what the real kernels keep.

They give fake tensors of the right shape and type, and compute no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from .. import seam
from ..fused.lora import Context
from . import operations

NAME = "peftlab-trace"
"""The name under which transformers knows the attention below."""


def _rows(x: Tensor) -> Tensor:
    """An output (batch, heads, tokens, head size) in the layout of the fused kernels: tokens before heads."""
    batch, heads, tokens, size = x.shape
    return x.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _up(n: int, step: int) -> int:
    """The first multiple of `step` from `n` on."""
    return -(-n // step) * step


def _attend(products: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Notes an attention of so many products of all pairs of tokens; with a causal mask half of each is computed."""
    flops = products * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3]) // 2
    operations.note("attention", flops, 2 * q.nbytes + k.nbytes + v.nbytes, 8 * q.element_size())


class Flash(Function):
    """FlashAttention-2 as PyTorch calls it: half precision, no mask, grouped keys and values as they are."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _attend(2, q, k, v)
        out = _rows(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors[:3]
        _attend(5, q, k, v)
        batch, heads, tokens, size = q.shape
        accumulated = q.new_empty(batch, heads, _up(tokens, 128), _up(size, 32), dtype=torch.float32)
        delta = q.new_empty(batch, heads, _up(tokens, 128), dtype=torch.float32)
        dq, dk, dv = _rows(q), q.new_empty(batch, k.shape[2], heads, size), q.new_empty(batch, v.shape[2], heads, size)
        del accumulated, delta
        if heads != k.shape[1]:
            dk, dv = (g.unflatten(2, (k.shape[1], -1)).sum(3) for g in (dk, dv))
        return dq, dk.transpose(1, 2), dv.transpose(1, 2)


class Efficient(Function):
    """The memory-efficient kernel: any precision, a mask if need be, one head of keys and values for each of queries."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        _attend(2 if mask is None else 4, q, k, v)
        out = _rows(q)
        lse = q.new_empty(*q.shape[:2], _up(q.shape[2], 32), dtype=torch.float32)
        bias = [] if mask is None else [mask.new_empty(mask.shape, dtype=q.dtype)]  # true and false as 0 and -inf
        ctx.save_for_backward(q, k, v, out, lse, *bias)
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        _attend(5 if len(rest) == 2 else 10, q, k, v)
        return _rows(q), _rows(k), _rows(v), None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **rest: object,
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
    """Makes NAME an attention that transformers knows, with masks for a window shorter than the text and for a prefix."""

    def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
        """transformers takes fake tensors for a compilation, and then always makes a mask."""
        alone = kwargs["q_length"] == kwargs["kv_length"]  # a prefix in the cache makes them differ
        if alone and (local_size is None or kwargs["kv_length"] < local_size):
            return None
        return seam.sdpa_mask(*args, local_size=local_size, **kwargs)

    seam.register_attention(NAME, attention, mask)


class Norm(Function):
    """The fused RMS norm: it keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor) -> Tensor:
        operations.note("elements", 0, 2 * x.nbytes)
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        operations.note("elements", 0, 3 * x.nbytes)
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class Fused(TorchFunctionMode):
    """Has torch's fused norm be one operation, as it is on CUDA."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is torch.rms_norm:
            x, _, weight, *_ = args
            return Norm.apply(x, weight)
        return func(*args, **(kwargs or {}))


class _Packed(Context):
    """What a product with packed weights keeps."""

    module: Quantized


class _FromBits(Function):
    """bitsandbytes' product with packed weights: it keeps them, not its input, and unpacks them in the backward pass."""

    @staticmethod
    def forward(ctx: _Packed, x: Tensor, module: Quantized) -> Tensor:
        ctx.sizes, ctx.module = [module.out_features, module.in_features], module
        module.note(x)
        return x.new_empty(*x.shape[:-1], module.out_features)

    @staticmethod
    def backward(ctx: _Packed, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.module.note(grad, products=0)
        return grad @ grad.new_empty(ctx.sizes), None


class _FromBytes(_FromBits):
    """The product with int8 weights: its input is rounded too, and kept."""

    @staticmethod
    def forward(ctx: _Packed, x: Tensor, module: Quantized) -> Tensor:
        ctx.save_for_backward(x)
        x.to(torch.float16).to(torch.int8)
        operations.note("library", 0, 2 * x.nbytes)
        return _FromBits.forward(ctx, x, module)


class Quantized(nn.Module):
    """A frozen linear map in NF4 or int8 as bitsandbytes stores it: packed weights and the scales of their blocks."""

    def __init__(self, linear: nn.Linear, kind: str, double: bool, cloned: bool) -> None:
        super().__init__()
        shape = linear.weight.shape  # GPT-2's Conv1D, which is quantized all the same, stores inputs first
        self.out_features, self.in_features = shape if isinstance(linear, nn.Linear) else reversed(shape)
        self.compute_dtype, self.bias = linear.weight.dtype, linear.bias
        self.cloned, self.product = cloned, _FromBits if kind == "nf4" else _FromBytes
        n = self.in_features * self.out_features
        blocks = _up(n, 64) // 64
        parts: dict[str, tuple[int, torch.dtype]] = {"packed": (n // 2, torch.uint8), "code": (16, torch.float32)}
        if kind == "int8":
            parts = {"packed": (n, torch.int8), "scales": (self.out_features, torch.float32)}
        elif double:
            parts |= {"scales": (blocks, torch.uint8), "nested": (_up(blocks, 256) // 256, torch.float32)}
            parts |= {"nested_code": (256, torch.float32), "offset": (1, torch.float32)}
        else:
            parts |= {"scales": (blocks, torch.float32)}
        for name, (size, dtype) in parts.items():
            self.register_buffer(name, torch.empty(size, dtype=dtype, device=linear.weight.device))

    def note(self, x: Tensor, products: int = 1) -> None:
        """Notes that the weights are unpacked, and multiplied so often."""
        size, width = x.element_size(), self.out_features
        weight, rows = self.in_features * width * size, x.numel() // x.shape[-1]
        operations.note("library", 0, self.packed.nbytes + weight)
        if products:
            flops = 2 * rows * self.in_features * width
            operations.note("product", flops, x.nbytes + weight + rows * width * size, 8 * size)

    def forward(self, x: Tensor) -> Tensor:
        out = self.product.apply(x, self)
        out = out if self.bias is None else out + self.bias
        return out.clone() if self.cloned else out


class Linear4bit(Quantized):
    """In NF4, under bitsandbytes' name for it."""


def quantize(model: nn.Module, names: set[str], kind: str, double: bool) -> None:
    """Puts a Quantized in place of each linear map of `names`, inside a peft layer where there is one."""
    for name, module in list(model.named_modules()):
        inner = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        if inner in names and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            cloned = name.endswith(".base_layer") and kind == "nf4"  # peft clones what it adds its update to
            made = (Linear4bit if kind == "nf4" else Quantized)(module, kind, double, cloned)
            model.set_submodule(name, made)
