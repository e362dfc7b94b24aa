"""Predicted memory of a training run: the closed form, the exact trace, several GPUs, what fits where, and conventions."""

from .closed_form import ClosedForm, closed_form, exact, predict
from .conventions import CONVENTIONS, Convention
from .fit import Fit, Storage, cheapest_changes, fits, gpu_grid, largest, largest_model, storage
from .report import MemoryReport, Moment
from .serving import Serving, serve

__all__ = [
    "CONVENTIONS",
    "ClosedForm",
    "Convention",
    "Fit",
    "MemoryReport",
    "Moment",
    "Serving",
    "Storage",
    "cheapest_changes",
    "closed_form",
    "exact",
    "fits",
    "gpu_grid",
    "largest",
    "largest_model",
    "predict",
    "serve",
    "storage",
]
