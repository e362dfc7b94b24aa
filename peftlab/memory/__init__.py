"""Predicted memory of a training run: the closed form, the exact trace, several GPUs, what fits where, and conventions."""

from .closed_form import ClosedForm, closed_form, exact, predict
from .conventions import CONVENTIONS
from .fit import Fit, cheapest_changes, fits, gpu_grid, largest, largest_model, serve, storage
from .here import make_room, must_fit
from .report import MemoryReport, Moment

__all__ = [
    "CONVENTIONS", "ClosedForm", "Fit", "MemoryReport", "Moment", "cheapest_changes", "closed_form", "exact", "fits",
    "gpu_grid", "largest", "largest_model", "make_room", "must_fit", "predict", "serve", "storage",
]  # fmt: skip
