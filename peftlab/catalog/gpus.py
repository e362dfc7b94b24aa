"""GPUs a run can be compared with. `gpus.json` holds one a line, with its data sheet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import SpecError
from ..spec import closest


@dataclass(frozen=True)
class GPU:
    key: str
    name: str
    memory_gb: float
    """As the vendor sells it."""
    memory_bytes: int
    """As nvidia-smi reports it: an upper bound of what a program can have."""
    bandwidth_gb_s: float
    bf16_tflops: float | None
    """Dense; None where the chip has no bf16."""
    architecture: str
    year: int
    source: str


GPUS: dict[str, GPU] = {
    key: GPU(key, **entry) for key, entry in json.loads((Path(__file__).parent / "gpus.json").read_text()).items()
}

PRICE = 2.5
"""What an hour of any GPU is taken to cost until somebody types their own price. An assumption, without a currency."""


def find(gpu: str) -> GPU:
    if gpu not in GPUS:
        raise SpecError(f"gpu={gpu}: no such GPU; {closest(gpu, GPUS)}")
    return GPUS[gpu]
