"""Predicted memory of a training run: weights, gradients and optimizer states, under a named convention."""

from .closed_form import exact, predict
from .conventions import CONVENTIONS, Convention
from .fit import Fit, Storage, fits, storage
from .report import MemoryReport, Moment

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Fit",
    "MemoryReport",
    "Moment",
    "Storage",
    "exact",
    "fits",
    "predict",
    "storage",
]
