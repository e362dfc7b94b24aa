"""GPUs that a run can be compared with, and what an hour of one costs."""

from __future__ import annotations

from dataclasses import dataclass

from . import read

PRICE = 2.5
"""What an hour of any GPU is taken to cost until somebody types their own price. An assumption, without a currency."""


@dataclass(frozen=True)
class GPU:
    """A GPU that a run can be compared with, and its data sheet."""

    key: str
    name: str
    memory_gb: float
    """As the vendor sells it."""
    memory_bytes: int
    """As nvidia-smi reports it: an upper bound of what a program can have."""
    bandwidth_gb_s: float
    bf16_tflops: float | None
    """Dense; None where the chip has no bf16."""
    fp32_tflops: float
    """Without tensor cores, as torch multiplies fp32 numbers unless it is told otherwise."""
    architecture: str
    year: int
    source: str


GPUS = {key: GPU(key, **entry) for key, entry in read("gpus").items()}
