"""What the Memory tab's script draws from: two runs as polynomials in batch, length and rank, and the words beside them."""

from __future__ import annotations

from html import escape

from .. import units
from ..catalog import GPUS
from ..memory import ClosedForm, MemoryReport
from . import sentences
from .marks import explained, how
from .memory_figures import COMPONENTS
from .settings import gpu_name, method_name

OVERHEAD = (("reserve", "overhead", "reserve"), ("context", "overhead", "CUDA context"))
"""What stands above the kinds of allocated memory in a bar, in the form of COMPONENTS."""
CLOSED = how(
    "estimated",
    "A closed form: polynomials in batch, length and rank, worked out from what autograd keeps. The allocator's reserve is "
    "taken as usual. Once you pause, a trace of the whole step takes its place.",
) + explained(" at once, from the closed form. The exact figure follows when you pause.")

NOT_COUNTED = "<b>Not in these bars:</b> activations, logits and the CUDA context. "
BARE, LEFT_OUT = "A bare count has no layers to predict them from.", "The convention leaves them out."


def bars_value(
    reports: tuple[MemoryReport, ...],
    forms: tuple[ClosedForm | None, ...],
    at: tuple[int, int, int],
    share: float | None = None,
) -> dict[str, object]:
    """What the page draws: full fine-tuning first, then the chosen method unless that is the same.

    `at` is the batch, the length and the rank. Of a model that is only a number, `share` percent is trained.
    """
    if reports[-1].spec.method == "full":
        reports, forms = reports[:1], forms[:1]
    chosen = reports[-1]
    return {
        "at": at,
        "ranked": any(r.spec.rank for r in reports),
        "model": escape(chosen.model_name),
        "runs": [_run(r, f, share) for r, f in zip(reports, forms, strict=True)],
        "gpus": [[gpu_name(g), g.memory_bytes] for g in GPUS.values()],
        "words": sentences.SENTENCES | sentences.it(chosen),
        "kinds": [*COMPONENTS, *OVERHEAD],
        "closed": CLOSED if forms[-1] else NOT_COUNTED + (BARE if chosen.convention == "exact" else LEFT_OUT),
        "exact": _compared(chosen, forms[-1]),
    }


def _run(report: MemoryReport, form: ClosedForm | None, share: float | None) -> dict[str, object]:
    """One bar: its name, its polynomials, its bytes where a convention counts, and those of a trace where there is one."""
    exact, spec = None, report.spec
    if report.source == "trace" and report.peak and report.reserved:
        exact = {**report.peak.bytes, "reserve": report.reserved - report.peak.total, "context": report.context}
    name = method_name(report)
    if share is not None and spec.method != "full":
        name += f", {share:g}% trained"
    elif spec.rank:
        name = name.replace(f"rank {spec.rank}", "rank {rank}", 1)  # the page fills it as the slider moves
    base = f", base in {spec.quantization}" if spec.quantization != "none" else ""
    return {
        "name": escape(name),
        "note": explained(spec.precision + base) if form else "",
        "form": form.to_data() if form else None,
        "states": {k: getattr(report, k) for k in ("frozen_weights", "trainable_weights", "gradients", "optimizer")},
        "exact": exact,
    }


def _compared(chosen: MemoryReport, form: ClosedForm | None) -> str:
    """A traced step beside what the closed form estimated; empty until there is one."""
    if chosen.source != "trace" or form is None:
        return ""
    mark = how(
        "exact",
        "One training step traced on fake tensors, replayed through a model of PyTorch's allocator, every token predicted. "
        "Held against an H100 in assets/measured/memory-h100.json.",
    )
    estimate, needed = form.report().needed, chosen.needed
    guess = "said the same" if abs(estimate / needed - 1) < 5e-4 else f"estimated {units.size(estimate)}"
    said = explained(
        f"a traced step: {units.size(chosen.allocated)} allocated at the peak, {units.size(needed)} with PyTorch's reserve and "
        f"the CUDA context. The closed form had {guess}."
    )
    return f"{mark} {said}"
