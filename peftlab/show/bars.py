"""What the Memory tab's script draws from: two runs as polynomials in batch, length and rank, and the words beside them."""

from __future__ import annotations

from html import escape
from typing import Any

from .. import units
from ..catalog.gpus import GPUS
from ..memory import ClosedForm, MemoryReport
from . import sentences
from .figures import COMPONENTS
from .marks import explained, how

OVERHEAD = (("reserve", "overhead", "reserve"), ("context", "overhead", "CUDA context"))
CLOSED = how(
    "estimated",
    "A closed form: polynomials in batch, length and rank, worked out from what autograd keeps. The allocator's reserve is "
    "taken as usual. Once you pause, a trace of the whole step takes its place.",
) + explained(" at once, from the closed form. The exact figure follows when you pause.")


def bars_value(
    reports: tuple[MemoryReport, ...],
    forms: tuple[ClosedForm | None, ...],
    at: tuple[int, int, int],
    share: float | None = None,
) -> dict[str, Any]:
    """What the page draws: full fine-tuning first, then the chosen method unless that is the same.

    Of a model that is only a number, `share` percent is trained.
    """
    if reports[-1].spec.method == "full":
        reports, forms = reports[:1], forms[:1]
    chosen = reports[-1]
    return {
        "at": at,
        "ranked": any(r.spec.rank for r in reports),
        "model": escape(chosen.model_name),
        "runs": [_run(r, f, share) for r, f in zip(reports, forms, strict=True)],
        "gpus": [[sentences.gpu_name(g), g.memory_bytes] for g in GPUS.values()],
        "words": sentences.SENTENCES | sentences.it(chosen),
        "kinds": [*COMPONENTS, *OVERHEAD],
        "closed": CLOSED if forms[-1] else _counted(chosen),
        "exact": _compared(reports, forms),
    }


def _run(report: MemoryReport, form: ClosedForm | None, share: float | None) -> dict[str, Any]:
    exact = None
    if report.source == "trace" and report.peak and report.reserved:
        exact = {**report.peak.bytes, "reserve": report.reserved - report.peak.total, "context": report.context}
    spec = report.spec
    name = sentences.method_name(report)
    if share is not None and spec.method != "full":
        name += f", {share:g}% trained"
    elif spec.rank:
        name = name.replace(f"rank {spec.rank}", "rank {rank}", 1)
    return {
        "name": escape(name),
        "note": explained(escape(", ".join(filter(None, (spec.precision, _base(report)))))) if form else "",
        "form": form.to_data() if form else None,
        "states": {k: getattr(report, k) for k in ("frozen_weights", "trainable_weights", "gradients", "optimizer")},
        "exact": exact,
    }


def _base(report: MemoryReport) -> str:
    quantization = report.spec.quantization
    return f"base in {quantization}" if quantization not in (None, "none") else ""


def _counted(report: MemoryReport) -> str:
    return "<b>Not in these bars:</b> activations, logits and the CUDA context. " + (
        "A bare count has no layers to predict them from."
        if report.convention == "exact"
        else "The convention leaves them out."
    )


def _compared(reports: tuple[MemoryReport, ...], forms: tuple[ClosedForm | None, ...]) -> str:
    chosen, form = reports[-1], forms[-1]
    if chosen.source != "trace" or form is None:
        return ""
    mark = how(
        "exact",
        "One training step traced on fake tensors, replayed through a model of PyTorch's allocator, every token predicted. "
        "Held against an H100 in assets/measured/memory-h100.json.",
    )
    estimate, needed, allocated = form.report().process or 0, chosen.process or 1, chosen.allocated or 1
    agrees = abs(estimate / needed - 1) < 5e-4
    said = explained(
        f"a traced step: {units.size(allocated)} allocated at the peak, {units.size(needed)} with PyTorch's reserve and the "
        f"CUDA context. The closed form had {'said the same' if agrees else f'estimated {units.size(estimate)}'}."
    )
    return f"{mark} {said}"
