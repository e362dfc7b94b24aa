"""LoRA from scratch: one layer in plain torch, to read, run and keep; and the lecture's own, with what is wrong in it.

These are texts. The page shows them, people run them, and the tests run them against peft's layer.
"""

from __future__ import annotations

import math
from string import Template

from ..errors import SpecError

LAYER = Template('''\
import copy
import math

import torch
from torch import nn


class LoRALinear(nn.Module):
    """A frozen linear layer and a trained update of low rank: y = W x + b + (alpha / rank) B A x."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)  # W and b stay as pre-training left them
        self.A = nn.Parameter(torch.empty(rank, base.in_features))  # projects down: d_in -> rank
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))  # projects up: rank -> d_out
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as nn.Linear starts; B = 0 makes the update start at zero
        self.scale = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """One plain linear layer that computes the same, with W + (alpha / rank) B A for its weight."""
        merged = copy.deepcopy(self.base)
        merged.weight += self.scale * (self.B @ self.A)
        return merged


torch.manual_seed(0)
base = nn.Linear($d_in, $d_out)
layer = LoRALinear(base, rank=$rank, alpha=$alpha)
x = torch.randn(4, $d_in)
assert torch.equal(layer(x), base(x))  # it starts as the base layer

nn.init.normal_(layer.B)  # as if it had been trained
apart, merged = layer(x), layer.merge()(x)
assert not torch.equal(apart, base(x))  # now the update counts,
assert (merged - apart).abs().max() < 1e-5 * apart.abs().max()  # and merging changes nothing beyond rounding

trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
frozen = sum(p.numel() for p in base.parameters())
print(f"{trained:,} trained parameters beside {frozen:,} frozen ones: {trained / frozen:.2%}")
''')


def lora_layer(d_in: int, d_out: int, rank: int, alpha: float) -> str:
    """A complete script: the layer for a weight of d_out × d_in, checks of how it starts and merges, and its size.

    It runs as it is, with torch alone. Raises SpecError for sizes below 1, a rank above the matrix's own and an alpha that
    does not scale.
    """
    for name, size in (("d_in", d_in), ("d_out", d_out), ("rank", rank)):
        if size < 1:
            raise SpecError(f"{name}={size}: a matrix needs at least 1; try {8 if name == 'rank' else 64}")
    if rank > (limit := min(d_in, d_out)):
        raise SpecError(
            f"rank={rank}: this matrix has a rank of at most {limit}, so more is wasted; try {min(limit, 8)}"
        )
    if not 0 < alpha < math.inf:
        raise SpecError(f"alpha={alpha:g}: it must be more than 0; try {2 * rank}")
    shown = int(alpha) if alpha == int(alpha) else alpha
    return LAYER.substitute(d_in=d_in, d_out=d_out, rank=rank, alpha=shown)


LECTURE = '''\
import torch
import torch.nn as nn


class LoRALayer(nn.Module):
    def __init__(self, in_features, out_features, rank=16, alpha=16):
        super().__init__()
        self.rank = rank
        self.alpha = alpha

        # Initialize A with small random values, B with zeros
        self.lora_A = nn.Parameter(
            torch.randn(in_features, rank) * 0.01
        )
        self.lora_B = nn.Parameter(
            torch.zeros(rank, out_features)
        )

        # Scaling factor
        self.scaling = alpha / rank

    def forward(self, x):
        # Low-rank update with scaling
        return (x @ self.lora_A @ self.lora_B) * self.scaling


class LoRALinear(nn.Module):
    def __init__(self, linear_layer, rank=16, alpha=16):
        super().__init__()
        # Freeze original weights
        self.linear = linear_layer
        self.linear.weight.requires_grad = False
        if self.linear.bias is not None:
            self.linear.bias.requires_grad = False

        # Add LoRA adapter
        self.lora = LoRALayer(
            linear_layer.in_features,
            linear_layer.out_features,
            rank, alpha
        )

    def forward(self, x):
        # Original + LoRA update
        return self.linear(x) + self.lora(x)

    def merge_weights(self):
        """Merge LoRA weights into base weights for inference"""
        with torch.no_grad():
            # Compute BA and add to original weights
            delta_w = self.lora.lora_B @ self.lora.lora_A
            self.linear.weight.data += (delta_w.T * self.lora.scaling)


# The slides end here. Gemma 3 270M's query projection, at the slides' own rank:
layer = LoRALinear(nn.Linear(640, 1024))
print("forward:", tuple(layer(torch.randn(4, 640)).shape))
layer.merge_weights()
'''
"""Lecture 11-2, "LoRA Implementation", parts 1 and 2, with underscores and indents where scanning lost them."""

WHY = """\
The forward pass is right. `merge_weights` is not, and it raises:
`RuntimeError: mat1 and mat2 shapes cannot be multiplied (16x1024 and 640x16)`.

On the slide the formula is W + (α/r)·BA with B d_out × r and A r × d_in. The code stores both the other way round, to \
write `x @ A @ B`: its A is d_in × r and its B is r × d_out. The update of the weight, which torch stores as \
d_out × d_in, is then (A·B)ᵀ·α/r. `lora_B @ lora_A` multiplies r × d_out by d_in × r, which only fits where \
d_in = d_out, and gives r × r even there. Adding that to the d × d weight raises as well, with two exceptions that are \
worse, because they say nothing and spoil the layer: at r = 1 one number is added to every weight, and at r = d the \
product has the right shape and the wrong numbers, (B·A)ᵀ for (A·B)ᵀ.

The fix is one line: `delta_w = self.lora.lora_A @ self.lora.lora_B`.

A also starts differently from the slides' own text, which says Kaiming uniform: the code draws 0.01·N(0, 1). Either \
starts as the base layer, because B is zero."""
"""What raises in LECTURE, and why; Markdown."""
