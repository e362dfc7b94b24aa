"""peftlab itself, as everybody has it, and with parts of what makes it fast left out."""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from ...resolve import resolve
from ...run import train, warm_up
from ...spec import Json, Resolved
from . import Peer, register


def run(spec: Resolved, eager: bool = False, plain: bool = False) -> Json:
    """Trains with evaluations, saving and all. `eager` takes no graph, `plain` no fused operations."""
    with tempfile.TemporaryDirectory() as folder:
        warm_up(spec)  # as the app does when it has loaded the model
        began = time.perf_counter()
        events = list(train(spec, Path(folder) / "run", eager=eager, plain=plain))
        whole = time.perf_counter() - began
    start, done = next(e for e in events if e["type"] == "start"), events[-1]
    steps = [e["seconds"] for e in events if e["type"] == "step"]
    return {
        "gear": next((e["gear"] for e in events if e["type"] == "gear"), start["gear"]),
        "not_fused": start["not_fused"],
        "first_step_seconds": steps[0],
        "step_seconds": statistics.median(steps),
        "training_seconds": done["training_seconds"],
        "tokens_per_second": done["tokens_per_second"],
        "peak_bytes": done["measured_peak_bytes"],
        "predicted_peak_bytes": done["predicted_peak_bytes"],
        "score": next(iter(done["eval"]["after"].values())),
        "click_to_saved_seconds": whole,
    }


def _in_bf16(spec: Resolved) -> Json:
    return run(resolve(spec.but(adapter_precision="bf16")))


register(
    Peer("peftlab", "peft", run, turn=0, seeded=True),
    Peer("peftlab, bf16 adapters", "peft", _in_bf16, turn=0),
    Peer("peftlab, nothing fused", "peft", partial(run, plain=True), turn=0),
    Peer("peftlab, eager", "peft", partial(run, eager=True), turn=0),
    Peer("plain eager loop", "peft", partial(run, eager=True, plain=True), turn=0),
)
