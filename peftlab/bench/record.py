"""A training run and its comparison, recorded: what the app shows as measured elsewhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import adapters
from ..compare import on_task
from ..data import tasks
from ..errors import RunError
from ..measured import provenance
from ..resolve import resolve_here
from ..run import train, warm_up
from ..spec import RunSpec

KEPT_EVENTS = ("start", "step", "eval", "done")


def record_train(
    spec: RunSpec, out: Path, adapter_out: Path | None = None, say: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Trains and compares `spec`, and writes every loss and score to `out`. Raises RunError when the run fails."""
    spec = resolve_here(spec)
    warm_up(spec)  # as the app does when it has loaded the model
    with tempfile.TemporaryDirectory() as scratch:
        events = []
        for event in train(spec, Path(scratch) / "run"):
            if say:
                say(event)
            if event["type"] in KEPT_EVENTS:
                events.append(event)
        if events[-1]["type"] != "done" or events[-1]["adapter"] is None:
            raise RunError("the run ended before it had learned anything; nothing was recorded")
        adapter = adapters.read(events[-1]["adapter"])
        work = on_task([adapter], tasks.find(spec.task))
        while True:
            try:
                next(work)
            except StopIteration as finished:
                report = finished.value
                break
        if adapter_out:
            import shutil

            shutil.copytree(adapter.folder, adapter_out, dirs_exist_ok=True)
    events[-1].pop("adapter")
    document = provenance() | {
        "kind": "train",
        "spec": spec.to_dict(),
        "events": events,
        "comparison": [s.__dict__ for s in report.scores],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    return document
