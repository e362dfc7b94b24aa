"""What takes a few lines to record: a run and its comparison, the gear of every method, and what the page costs."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .. import adapters
from ..compare import on_task
from ..data import tasks
from ..errors import PeftlabError, RunError
from ..measured import provenance
from ..methods import METHODS
from ..places import ROOT
from ..resolve import resolve, resolve_here
from ..run import Event, pace, train, warm_up
from ..run.events import Work
from ..spec import Json, RunSpec
from . import Say, write


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
            if event["type"] in ("start", "step", "eval", "done"):
                events.append(event)
        done = events[-1]
        if done["type"] != "done" or done["adapter"] is None:
            raise RunError("the run ended before it had learned anything; nothing was recorded")
        adapter = adapters.read(done["adapter"])
        report = Work(on_task([adapter], tasks.find(spec.task))).finished()
        if adapter_out:
            shutil.copytree(adapter.folder, adapter_out, dirs_exist_ok=True)
    del done["adapter"]  # a folder that is gone
    scores = [asdict(score) for score in report.scores]
    document = {"kind": "train", "spec": spec.to_dict(), "events": events, "comparison": scores}
    return write(provenance() | document, out)


def record_gears(spec: RunSpec, out: Path, say: Say) -> Json:
    """Writes to `out` each method's gear, why it is not the graph, and the seconds of a usual step."""
    spec = resolve_here(spec)
    document = provenance() | {"kind": "gears", "spec": spec.to_dict(), "methods": []}
    for method in METHODS:
        row: Json = {"method": method}
        document["methods"].append(row)
        try:
            # the first half of the steps leave time to capture a graph
            found = pace(resolve(RunSpec(model=spec.model, task=spec.task, method=method)), steps=16)
            row |= {"gear": found.gear, "why_eager": found.why_eager, "step_seconds": found.seconds}
            row["not_fused"] = list(found.not_fused)
        except (PeftlabError, RuntimeError) as error:
            row["error"] = str(error).splitlines()[0][:300]
        say(f"{method}: {row.get('gear')} {row.get('why_eager') or row.get('error') or ''}")
        write(document, out)
    return document


def record_page(out: Path, say: Say) -> Json:
    """Writes to `out` the processor time of every tab's answers to random settings, in milliseconds, and the size of the
    page's configuration, in bytes. Raises PeftlabError where the page cannot be measured.

    It is measured in a process of its own, because peftlab itself never imports gradio.
    """
    done = subprocess.run([sys.executable, str(ROOT / "demos" / "page" / "measure.py")], capture_output=True, text=True)
    if done.returncode:
        raise PeftlabError(f"the page could not be measured: {done.stderr.strip().splitlines()[-1]}")
    document = provenance() | {"kind": "page", **json.loads(done.stdout.splitlines()[-1])}
    for tab, found in document["answers_milliseconds"].items():
        say(f"{tab}: an answer takes {found['median']:.1f} ms of processor time, 95% at most {found['p95']:.1f}")
    kilo, packed = document["config_bytes"] / 1000, document["config_gzip_bytes"] / 1000
    say(f"the page's configuration: {kilo:.0f} kB, {packed:.0f} kB compressed")
    return write(document, out)
