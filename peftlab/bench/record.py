"""A training run and its comparison, recorded: what the app shows as measured elsewhere."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .. import adapters
from ..compare import on_task
from ..data import tasks
from ..errors import RunError
from ..measured import provenance
from ..resolve import resolve_here
from ..run import Event, train, warm_up
from ..spec import Json, RunSpec
from . import result_of, write

KEPT_EVENTS = ("start", "step", "eval", "done")


def record_train(spec: RunSpec, out: Path, say: Callable[[Event], None], adapter_out: Path | None = None) -> Json:
    """Trains and compares, and writes every loss and score to `out`; the adapter goes to `adapter_out`, if anywhere.

    Raises RunError when the run fails.
    """
    spec = resolve_here(spec)
    warm_up(spec)  # as the app does when it has loaded the model
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as scratch:
        for event in train(spec, Path(scratch) / "run"):
            say(event)
            if event["type"] in KEPT_EVENTS:
                events.append(event)
        done = events[-1]
        if done["type"] != "done" or done["adapter"] is None:
            raise RunError("the run ended before it had learned anything; nothing was recorded")
        adapter = adapters.read(done["adapter"])
        report = result_of(on_task([adapter], tasks.find(spec.task)))
        if adapter_out:
            shutil.copytree(adapter.folder, adapter_out, dirs_exist_ok=True)
    del done["adapter"]  # a folder that is gone
    scores = [asdict(score) for score in report.scores]
    document = {"kind": "train", "spec": spec.to_dict(), "events": events, "comparison": scores}
    return write(provenance() | document, out)
