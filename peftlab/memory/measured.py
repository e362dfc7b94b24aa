"""Recorded steps beside what is predicted for them."""

from __future__ import annotations

from typing import Any

from ..base import models
from ..measured import documents
from ..resolve import resolve
from ..spec import RunSpec
from .compute import utilisation


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured bytes allocated, row by row, with their `mean` absolute and `worst` error as shares."""
    rows = []
    for row in (r for r in document["rows"] if "error" not in r):
        spec, there, here = row["spec"], row["measured"], row["predicted"]
        usual = resolve(RunSpec(model=spec["model"], method=spec["method"], gpu=spec["gpu"])).to_dict()
        own = [f"{spec['batch_size']} × {spec['sequence_length']}", spec["precision"]]
        own += [
            name.replace("_", " ") if value is True else f"{name.replace('_', ' ')} {value}"
            for name, value in spec.items()
            if name not in ("model", "method", "batch_size", "sequence_length", "precision", "alpha")
            and usual.get(name) != value
        ]
        rows.append(
            {
                "spec": spec,
                "settings": ", ".join(own),
                "predicted": here["peak_allocated_bytes"],
                "measured": there["peak_allocated_bytes"],
                "error": here["peak_allocated_bytes"] / there["peak_allocated_bytes"] - 1,
                "reserved_error": here["peak_reserved_bytes"] / there["peak_reserved_bytes"] - 1,
            }
        )
    errors = [row["error"] for row in rows]
    return {"rows": rows, "mean": sum(map(abs, errors)) / len(errors), "worst": max(errors, key=abs)}


def measured_utilisation() -> float:
    """Share of its bf16 peak that a GPU of the recordings reached with the largest model that had it to itself."""
    found = [u for document in documents("memory") for u in utilisation(document["rows"])]
    return max(found, key=lambda u: models.find(u.spec.model).total_parameters or 0).share
