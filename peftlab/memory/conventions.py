"""The conventions that lectures and papers count training memory by, as bytes a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from ..base.architecture import Architecture
from ..errors import SpecError
from ..spec import Resolved, closest


@dataclass(frozen=True)
class Convention:
    """Bytes for each trained parameter; a frozen one takes FROZEN_BYTES."""

    key: str
    name: str
    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments, and the fp32 master copy where there is one."""
    note: str
    source: str

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


FROZEN_BYTES = 2
FP4_BYTES = 0.5
"""A 4-bit number without its scales, as lectures count it. Real NF4 takes NF4_BITS."""
NF4_BITS = {False: 4 + 32 / 64, True: 4 + 8 / 64 + 32 / (64 * 256)}
"""Bits of a weight in NF4: 4, and an fp32 scale for each block of 64. With double quantization (True) the scale is 8 bits,
and 256 scales share one fp32. Source: QLoRA, arXiv 2305.14314 section 3."""

_MIXED = "16-bit weights and gradients; the optimizer holds an fp32 master copy and two fp32 moments."
CONVENTIONS: dict[str, Convention] = {
    c.key: c
    for c in (
        Convention("8n", "8N, everything 16-bit", 2, 2, 4, "Adam's moments are 16-bit too.", "kiit-tutorial"),
        Convention("12n", "12N, fp32 moments", 2, 2, 8, "16-bit weights and gradients, 32-bit moments.", "lecture-11-2"),
        Convention("16n-fp32", "16N, pure fp32", 4, 4, 8, "Nothing is 16-bit.", "lecture-11-2"),
        Convention("16n-mixed", "16N, mixed precision", 2, 2, 12, _MIXED, "ZeRO, arXiv 1910.02054 section 3.1"),
        Convention(
            "18n", "18N, Megatron", 2, 4, 12, "As mixed precision, with gradients accumulated in fp32.",
            "Megatron-LM, arXiv 2205.05198",
        ),
    )
}  # fmt: skip
EXACT = "exact"
"""The name for no convention: the run's own precisions count."""


def find(key: str) -> Convention | None:
    """The convention of that name; None for `exact`. Raises SpecError for an unknown name."""
    if key == EXACT:
        return None
    if key not in CONVENTIONS:
        raise SpecError(f"convention={key}: {closest(key, (EXACT, *CONVENTIONS))}")
    return CONVENTIONS[key]


def quantizable(shape: Architecture) -> int:
    """Weights that quantization packs: those of linear maps. Embeddings, norms and the head stay as they are."""
    return sum(m.weight * m.count for m in shape.linear())


def quantized_bits(spec: Resolved) -> float:
    """Bits of a packed weight. int8's scales, one for each output, are left out."""
    return NF4_BITS[spec.double_quantization] if spec.quantization == "nf4" else 8
