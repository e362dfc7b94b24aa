"""The type of what an autograd Function keeps between forward and backward."""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """torch passes such an object as `ctx`. What stands below the tensors is there in the Functions that set it."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    columns: list[slice]
    ranks: list[list[int]]
    sizes: list[int]
    shape: torch.Size
    scales: list[float]
    dtype: torch.dtype
