"""Layers of our own that methods attach. Importing this imports torch."""

import torch
from torch import Tensor, nn


class Kronecker(nn.Module):
    """x (…, d_in) → (…, d_out), multiples of n, by Σᵢ Aᵢ ⊗ sᵢtᵢᵀ with shared Aᵢ (n, n, n): arXiv 2106.04647, section 4."""

    def __init__(self, rules: nn.Parameter, d_in: int, d_out: int) -> None:
        super().__init__()
        n = len(rules)
        self.rules = rules
        self.s = nn.Parameter(torch.randn(n, d_in // n) * (3 * d_in) ** -0.5)
        self.t = nn.Parameter(torch.randn(n, d_out // n))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("nab,nc,nd->acbd", self.rules, self.s, self.t)
        return x @ weight.flatten(2).flatten(0, 1) + self.bias


class Bottleneck(nn.Module):
    """What an adapter adds to x (…, width): up(gelu(down(x))), zero at the start, computed in its own precision."""

    def __init__(self, width: int, bottleneck: int, rules: nn.Parameter | None = None) -> None:
        super().__init__()
        self.down: nn.Linear | Kronecker
        self.up: nn.Linear | Kronecker
        if rules is None:
            self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
            nn.init.zeros_(self.up.weight)
        else:
            self.down, self.up = Kronecker(rules, width, bottleneck), Kronecker(rules, bottleneck, width)
            nn.init.zeros_(self.up.t)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = x.to(self.down.bias.dtype)
        return self.up(nn.functional.gelu(self.down(inner))).to(x.dtype)
