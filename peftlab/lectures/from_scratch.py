"""LoRA from scratch, as texts that people read and run: one layer in plain torch; and the lecture's own, with its mistake."""

from __future__ import annotations

import math
from string import Template

from ..errors import SpecError
from . import text

LECTURE = text("lecture_layer.txt")
"""Lecture 11-2, "LoRA Implementation", parts 1 and 2, with underscores and indents where scanning lost them."""
WHY = text("why_it_raises.md")
"""Why LECTURE raises, as Markdown."""


def lora_layer(d_in: int, d_out: int, rank: int, alpha: float) -> str:
    """A complete script: the layer for a weight of d_out × d_in, checks of its start and its merging, and its size.

    It runs as it is and needs nothing but torch. Raises SpecError for sizes below 1, for a rank above the matrix's own and
    for an alpha that is not a positive number.
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
    return Template(text("lora_layer.txt")).substitute(d_in=d_in, d_out=d_out, rank=rank, alpha=shown)
