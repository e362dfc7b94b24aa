"""Recorded steps beside what is predicted for them."""

from __future__ import annotations

from ..base import models
from ..measured import documents
from ..resolve import resolve
from ..spec import Json, RunSpec
from .compute import utilisation


def summary(document: Json) -> Json:
    """Predicted and measured bytes allocated of each row, with the `mean` absolute and the `worst` error as shares."""
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
    """The share of its bf16 peak that a GPU reached in the recording of the largest model that had it to itself."""
    found = (run for document in documents("memory") for run in utilisation(document["rows"]))
    return max(found, key=lambda run: models.find(run[0].model).total_parameters or 0)[1]
