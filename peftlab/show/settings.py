"""A run's settings in words: their names, which of them differ from automatic, and what the run then uses."""

from __future__ import annotations

from html import escape
from typing import Any

from .. import hardware
from ..base.models import MODELS
from ..errors import SpecError
from ..resolve import resolve, resolve_here
from ..spec import RunSpec


def label(name: str) -> str:
    return name.replace("_", " ").capitalize().replace("gpu", "GPU").replace("Gpu", "GPU")


def short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def changed(spec: RunSpec) -> str:
    """Which settings differ from automatic, in a line."""
    try:
        usual = resolve(RunSpec(model=spec.model, method=spec.method, task=spec.task))
    except SpecError:
        return ""
    marks = [
        f"{escape(label(name))} <b>{escape(short(value))}</b>"
        for name, value in spec.to_dict().items()
        if name not in ("model", "method", "task") and value != getattr(usual, name)
    ]
    return "Changed: " + ", ".join(marks) if marks else "Every setting is automatic."


def settings_line(spec: RunSpec) -> str:
    """What a run with these settings uses, automatic values included."""
    r = resolve_here(spec)
    parts = [
        f"learning rate {r.learning_rate:g}",
        f"{r.steps} steps of {r.batch_size} examples",
        *(
            f"{label(n).lower()} {short(getattr(r, n))}"
            for n in ("rank", "alpha", "virtual_tokens", "bottleneck", "block_size")
            if getattr(r, n)
        ),
        *([f"a base in {r.quantization}"] if r.quantization != "none" else []),
        f"{r.precision} on {hardware.here().device.upper()}",
    ]
    return f"Runs with {', '.join(parts)}.{escape(terms(r.model or ''))} {changed(spec)}"


def terms(model: str) -> str:
    """A model's licence, as a sentence after others; empty for one that is not in the catalogue."""
    return f" {MODELS[model].name} is under: {MODELS[model].licence}." if model in MODELS else ""
