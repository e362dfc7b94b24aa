"""The loss with its logits made a piece at a time, where the map to logits is frozen and the last that a model does."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from .. import seam

if TYPE_CHECKING:
    from torch import Tensor

LOGITS = 32_000_000
"""Logits that a loss makes at a time."""


def head(model: Any) -> Head | None:
    """The map to logits that a quickened model leaves to its loss."""
    return next((module for module in model.modules() if isinstance(module, Head)), None)


def cross_entropy(out: Tensor, labels: Tensor, head: Head | None) -> Tensor:
    """Summed over the labels, rows × length, that are not negative. `out` is logits, or hidden states that `head` maps to them.

    With a head, LOGITS of them are there at a time, and none outlives this.
    """
    out, labels = out.flatten(0, 1), labels.flatten()
    if head is None or not head.training:
        return torch.nn.functional.cross_entropy(out.float(), labels, reduction="sum")
    return _CrossEntropy.apply(out, head.weight, head.bias, labels)


class Head(torch.nn.Linear):
    """The frozen map to logits, which a model in training skips."""

    __module__ = torch.nn.Linear.__module__

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else super().forward(x)


class _Given(torch.nn.Module):
    """Gives `out` whatever it is given, and so does each part of it that is asked for."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self.out = out

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.out

    def __getattr__(self, name: str) -> Any:
        return self


class _States:
    """What the body of a model returns: hidden states, and None for all else that a family has there."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, place: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def last_map(model: Any) -> tuple[Any, str]:
    """(the map to logits, where it is linear, frozen and the last thing that the model does; why it is not the last)"""
    causal = seam.writer(model)
    last = causal and causal.get_output_embeddings()
    if type(last) is not torch.nn.Linear or any(p.requires_grad for p in last.parameters()):
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
    """Sum of −log softmax(x Wᵀ + bias) at the labels, with frozen W. The gradient of x is made on the way, while the logits
    are there. Hsu et al. 2024 (Liger).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
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
    def backward(ctx: Any, total: Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        return grad * total, None, None, None
