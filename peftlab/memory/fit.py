"""Which GPUs hold a number of bytes, and what N tasks take on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..catalog.gpus import GPU, GPUS
from .conventions import FROZEN_BYTES
from .report import MemoryReport


@dataclass(frozen=True)
class Fit:
    gpu: GPU
    n_gpus: int
    """GPUs needed when the states are spread evenly; 1 where one holds them."""
    share: float
    """Of one GPU's memory."""


def fits(required: int) -> list[Fit]:
    """Every GPU of the catalogue against `required` bytes, smallest first."""
    return [Fit(g, math.ceil(required / g.memory_bytes), required / g.memory_bytes) for g in GPUS.values()]


@dataclass(frozen=True)
class Storage:
    """Bytes on disk for a number of tasks, 16-bit."""

    tasks: int
    full: int
    """A whole model for each task."""
    adapters: int
    base: int
    """The one base model that all adapters share."""


def storage(report: MemoryReport, tasks: int) -> Storage:
    copy = report.total_parameters * FROZEN_BYTES
    return Storage(tasks, copy * tasks, report.trainable_parameters * FROZEN_BYTES * tasks, copy)
