"""The gear in which every method trains by default on one model and task."""

from pathlib import Path

from ..errors import PeftlabError
from ..measured import provenance
from ..methods import METHODS
from ..resolve import resolve, resolve_here
from ..run import pace
from ..spec import Json, RunSpec
from . import Say, write

STEPS = 16
"""Steps that show a method's gear; the first half leave time to capture a graph."""


def record_gears(spec: RunSpec, out: Path, say: Say) -> Json:
    """Writes to `out` each method's gear, why it is not the graph, and the seconds of a usual step."""
    spec = resolve_here(spec)
    document = provenance() | {"kind": "gears", "spec": spec.to_dict(), "methods": []}
    for method in METHODS:
        row: Json = {"method": method}
        document["methods"].append(row)
        try:
            found = pace(resolve(RunSpec(model=spec.model, task=spec.task, method=method)), STEPS)
            row |= {"gear": found.gear, "why_eager": found.why_eager, "step_seconds": found.seconds}
            row["not_fused"] = list(found.not_fused)
        except (PeftlabError, RuntimeError) as error:
            row["error"] = str(error).splitlines()[0][:300]
        say(f"{method}: {row.get('gear')} {row.get('why_eager') or row.get('error') or ''}")
        write(document, out)
    return document
