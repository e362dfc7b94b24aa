"""Predicted memory of a training run: weights, gradients and optimizer states, under a named convention."""

from .closed_form import MemoryReport, exact, predict
from .conventions import CONVENTIONS, Convention
from .fit import Fit, Storage, fits, storage

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Fit",
    "MemoryReport",
    "Storage",
    "exact",
    "fits",
    "predict",
    "storage",
]
