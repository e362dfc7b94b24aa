"""Stand-ins for what CUDA runs and a CPU does not: they keep between forward and backward what the real kernels keep.

They give fake tensors of the right shape and type, and compute no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from .. import seam
from ..fused.lora import Context
from . import operations

HALF = (torch.bfloat16, torch.float16)
FLASH_HEAD = 256
"""The widest head that FlashAttention-2 takes."""
CUDNN_HEADS = ((192, 128), (256, 256))
"""Widths of the heads of queries and of values that cuDNN takes above CUDNN_HEAD."""
CUDNN_HEAD = 128
IN_REGISTERS = 128
"""The widest head whose output the memory-efficient kernel adds up without a buffer in fp32."""
BYTES_ALIGNED = 16
"""The memory-efficient kernel takes heads of a multiple of so many bytes, and rows of a mask of so many numbers."""


def _rows(x: Tensor, size: int) -> Tensor:
    """An output (batch, heads, tokens, `size`) with tokens before heads, for queries or keys x."""
    batch, heads, tokens, _ = x.shape
    return x.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _up(n: int, step: int) -> int:
    """The first multiple of `step` from `n` on."""
    return -(-n // step) * step


def _attend(products: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Notes an attention of so many products of all pairs of tokens; with a causal mask half of each is computed."""
    flops = products * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3]) // 2
    operations.note("attention", flops, 2 * q.nbytes + k.nbytes + v.nbytes, 8 * q.element_size())


class Flash(Function):
    """cuDNN's attention, or FlashAttention-2: half precision, grouped keys and values as they are; cuDNN's with any mask, and
    values of another width. Outputs and gradients are laid out as queries, keys and values are.
    """

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        _attend(2, q, k, v)
        out = torch.empty_like(q if v.shape[-1] == q.shape[-1] else q[..., : v.shape[-1]])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors[:3]
        _attend(5, q, k, v)
        batch, heads, tokens, size = q.shape
        accumulated = q.new_empty(batch, heads, _up(tokens, 128), _up(size, 32), dtype=torch.float32)
        delta = q.new_empty(batch, heads, _up(tokens, 128), dtype=torch.float32)
        if heads == k.shape[1]:
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
        dq, *of_each = torch.empty_like(q), *(t.new_empty(batch, t.shape[2], heads, t.shape[3]) for t in (k, v))
        del accumulated, delta
        dk, dv = (g.unflatten(2, (k.shape[1], -1)).sum(3).transpose(1, 2) for g in of_each)
        return dq, dk, dv, None


class Efficient(Function):
    """The memory-efficient kernel: any precision, a mask if need be, one head of keys and values for each of queries.

    The values' heads may have another width.
    """

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        _attend(2 if mask is None else 4, q, k, v)
        out = _rows(q, v.shape[-1])
        if q.dtype in HALF and v.shape[-1] > IN_REGISTERS:
            out.new_empty(out.shape, dtype=torch.float32)
        lse = q.new_empty(*q.shape[:2], _up(q.shape[2], 32), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, *(() if mask is None else (mask,)))
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *rest = ctx.saved_tensors
        _attend(5 if len(rest) == 2 else 10, q, k, v)
        bias = rest[-1].clone() if ctx.needs_input_grad[3] else None
        return _rows(q, q.shape[-1]), _rows(k, k.shape[-1]), _rows(v, v.shape[-1]), bias


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention with the kernel that PyTorch picks on an H100 or a newer GPU.

    That is cuDNN's in half precision, else flash where there is no mask, else the memory-efficient one. This takes no
    grouped heads, and where it does not fit either, the plain mathematics runs instead.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.bfloat16) for t in (query, key, value))
    size, values, half = query.shape[-1], value.shape[-1], query.dtype in HALF
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # true and false as 0 and -inf
        attn_mask = attn_mask.new_empty(attn_mask.shape, dtype=query.dtype)
    trained = attn_mask is not None and attn_mask.requires_grad
    fits = max(size, values) <= CUDNN_HEAD or (size, values) in CUDNN_HEADS
    if half and fits and not trained and size % 8 == values % 8 == 0:
        return Flash.apply(query, key, value, attn_mask)
    if half and attn_mask is None and size == values <= FLASH_HEAD:
        if missing := -size % 8:
            query, key, value = (torch.nn.functional.pad(t, (0, missing)) for t in (query, key, value))
        return Flash.apply(query, key, value, None)[..., :size]
    aligned = all(t.shape[-1] * t.element_size() % BYTES_ALIGNED == 0 for t in (query, value))
    if query.shape[1] == key.shape[1] and aligned:
        if attn_mask is not None and (missing := -attn_mask.shape[-1] % BYTES_ALIGNED):
            attn_mask = torch.nn.functional.pad(attn_mask, (0, missing))[..., :-missing]
        return Efficient.apply(query, key, value, attn_mask)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


def register() -> None:
    """Has transformers make masks for fake tensors as it does for real ones."""
    seam.make_masks_for_fakes()


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
    """Has torch's fused norm and its attention be one operation, as they are on CUDA."""

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
        if func is torch.nn.functional.scaled_dot_product_attention:
            return attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def checkpoint_contexts() -> tuple[nullcontext[None], Fused]:
    """What a checkpoint runs and runs again in: the backward pass has left the mode that the forward pass was in."""
    return nullcontext(), Fused()


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
        self.packed: Tensor
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

    @property
    def weight(self) -> Tensor:
        """The weights unpacked, for a model that multiplies by them itself."""
        return self.packed.new_empty((self.out_features, self.in_features), dtype=self.compute_dtype)

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
    """Puts a Quantized in place of each linear map of `names`, inside a peft layer where there is one.

    What a method has hung on a map stays on it.
    """
    base = seam.writer(model) or model
    for name, module in list(base.named_modules()):
        inner = name.removesuffix(".base_layer")
        if inner in names and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            cloned = inner != name and kind == "nf4"  # peft clones what it adds its update to
            made = (Linear4bit if kind == "nf4" else Quantized)(module, kind, double, cloned)
            made._modules.update(module._modules)
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                getattr(made, hooks).update(getattr(module, hooks))
            base.set_submodule(name, made)
