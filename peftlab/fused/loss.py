"""The loss with its logits made a piece at a time, where the map to logits is frozen and is the last step of a model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch.nn import Linear, Module
from torch.nn.functional import linear

from .. import seam
from .lora import Context

if TYPE_CHECKING:
    from torch import Tensor

LOGITS = 32_000_000  # how many a loss makes at a time


def head(model: Module) -> Head | None:
    """The map to logits that a quickened model leaves to its loss; None where it makes logits itself."""
    return next((module for module in model.modules() if isinstance(module, Head)), None)


def cross_entropy(out: Tensor, labels: Tensor, head: Head | None) -> Tensor:
    """The sum of the losses at those of the labels, rows × length, that are not negative.

    `out` is rows × length × vocabulary, or hidden states where a `head` in training is given. Then at most LOGITS logits
    exist at a time, and none outlives this call.
    """
    out, labels = out.flatten(0, 1), labels.flatten()
    if head is None or not head.training:
        return torch.nn.functional.cross_entropy(out.float(), labels, reduction="sum")
    return _CrossEntropy.apply(out, head.weight, head.bias, labels)


class Head(Linear):
    """The frozen map to logits, which a model in training skips."""

    __module__ = Linear.__module__

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else super().forward(x)


class _Given(Module):
    """Gives `out` whatever its input is. Whatever part of it is asked for is this module again."""

    def __init__(self, out: Tensor | _States) -> None:
        super().__init__()
        self.out = out

    def forward(self, *_: object, **__: object) -> Tensor | _States:
        return self.out

    def __getattr__(self, name: str) -> _Given:
        return self


class _States:
    """The output of a model's body: hidden states, and None for whatever else a family has there."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, place: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def last_map(model: Module) -> tuple[Linear | None, str]:
    """(the map to logits where it is linear, frozen and the last step of the model, why it is not the last step)"""
    causal = seam.writer(model)
    last = causal and causal.get_output_embeddings()
    if causal is None or type(last) is not Linear or any(p.requires_grad for p in last.parameters()):
        return None, ""
    name = next((name for name, child in causal.named_children() if child is last), "")
    like, logits = copy.copy(causal), torch.empty(1, 1, 1)
    like._modules = {causal.base_model_prefix: _Given(_States(torch.empty(1, 1, 1))), name: _Given(logits)}
    try:
        found = like(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False, return_dict=True).logits
    except Exception as error:  # anybody's architecture, in transformers' code
        return None, f"its last step could not be tried: {type(error).__name__}"
    return (last, "") if found is logits else (None, "the logits are changed once more")


class _CrossEntropy(torch.autograd.Function):
    """The sum of −log softmax(x Wᵀ + bias) at the labels, W frozen; forward makes x's gradient too. Hsu et al. 2024, Liger."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        grad, total = torch.empty_like(x), torch.zeros((), device=x.device)
        pieces = -(-x.shape[0] * weight.shape[0] // LOGITS)
        for rows, at, out in zip(x.chunk(pieces), labels.chunk(pieces), grad.chunk(pieces), strict=True):
            asked, at = (at >= 0)[:, None], at.clamp(min=0)[:, None]
            logp = torch.log_softmax(linear(rows, weight, bias).float(), -1)
            total -= (logp.gather(1, at) * asked).sum()
            p = logp.exp_().scatter_add_(1, at, -torch.ones_like(at, dtype=logp.dtype))
            torch.mm(p.to(x.dtype), weight, out=out).mul_(asked)
            del logp, p
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Context, total: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * total, None, None, None
