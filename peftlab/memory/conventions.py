"""How lectures and papers count the bytes of a parameter: 8N, 12N, 16N and 18N, N being the number of parameters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Convention:
    """Bytes for each trained parameter; a frozen one takes FROZEN_BYTES."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments, and the fp32 master copy where there is one."""
    note: str
    source: str


FROZEN_BYTES = 2
FP4_BYTES = 0.5
"""A 4-bit number without its scales, as lectures count it. Real NF4 takes NF4_BITS."""
_MIXED = "16-bit weights and gradients; the optimizer holds an fp32 master copy and two fp32 moments."
_MEGATRON = "As mixed precision, with gradients accumulated in fp32."
CONVENTIONS = {
    "8n": Convention("8N, everything 16-bit", 2, 2, 4, "Adam's moments are 16-bit too.", "kiit-tutorial"),
    "12n": Convention("12N, fp32 moments", 2, 2, 8, "16-bit weights and gradients, 32-bit moments.", "lecture-11-2"),
    "16n-fp32": Convention("16N, pure fp32", 4, 4, 8, "Nothing is 16-bit.", "lecture-11-2"),
    "16n-mixed": Convention("16N, mixed precision", 2, 2, 12, _MIXED, "ZeRO, arXiv 1910.02054 section 3.1"),
    "18n": Convention("18N, Megatron", 2, 4, 12, _MEGATRON, "Megatron-LM, arXiv 2205.05198"),
}
