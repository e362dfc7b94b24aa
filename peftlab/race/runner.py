"""Running a race: fine-tunings of one task held side by side, with the same rows, order, seeds and budget."""

import gc
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

from .. import adapters, methods
from ..base import weights
from ..compare import APART, BASE, MERGED, proofs
from ..count import count
from ..data import tasks
from ..errors import PeftlabError, SpecError, plain
from ..memory import predict
from ..run import STOP, Event, pace, train
from ..run.events import progress
from ..run.scoring import answer_loss
from ..spec import Resolved
from .racers import Racer
from .recordings import Line


def race(
    racers: Sequence[Racer], out: Path, seeds: int = 1, seconds: float | None = None, latency: bool = True,
    known: Sequence[Line] = (),
) -> Iterator[Event]:  # fmt: skip
    """Runs each racer on each seed, one after another, and yields events. An error ends the racer that it happens to.

    With `seconds`, each racer takes as many steps as fit into so much training by its pace. Without `latency` no tokens are
    timed. `known` are lines of the same race, to go on from. No adapter is kept. A STOP file in `out` ends the race after the
    step under way. Events: `racers` with the lines to begin with, `run` (an event of a racer's own training), `line` when one
    has changed, and `done` with all of them. Raises SpecError for racers of several tasks.
    """
    if len(found := {racer.spec.task for racer in racers}) > 1:
        raise SpecError(f"task={', '.join(sorted(found))}: a race is of one task; choose one")
    if seconds is not None and not 0 < seconds < math.inf:
        raise SpecError(f"seconds={seconds}: a budget is above 0; try 5")
    begun = {json.dumps(line.spec): line for line in known if not line.error}
    lines = [_line(racer, begun.get(json.dumps(racer.spec.to_dict()))) for racer in racers]
    yield {"type": "racers", "lines": [asdict(line) for line in lines], "seeds": seeds}
    paces: dict[int, int] = {}
    for seed in range(seeds):
        for i, (racer, line) in enumerate(zip(racers, lines, strict=True)):
            if line.error or len(line.scores) > seed or (out / STOP).exists():
                continue
            folder = out / f"{i}-{racer.spec.method}-{seed}"
            try:
                if seconds and i not in paces:
                    paces[i] = max(1, round(seconds / pace(racer.spec).seconds))
                spec = replace(racer.spec, seed=racer.spec.seed + seed, steps=paces.get(i, racer.spec.steps))
                for event in _run(spec, line, out, folder, latency):
                    yield {"type": "run", "racer": i, "seed": seed, "event": event}
            except Exception as error:
                line.error = plain(error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                gc.collect()  # an adapted model refers to itself, and would count in the next racer's peak
            yield {"type": "line", "racer": i, "line": asdict(line)}
    stopped = (out / STOP).exists()
    (out / STOP).unlink(missing_ok=True)
    yield {"type": "done", "lines": [asdict(line) for line in lines], "stopped": stopped}


def _line(racer: Racer, begun: Line | None) -> Line:
    """The line that a racer goes on from, or a new one with what is known before it runs."""
    spec = racer.spec
    if begun:
        return replace(deepcopy(begun), name=racer.name)
    try:
        report, peak = count(spec), predict(spec)
    except PeftlabError as error:
        return Line(racer.name, spec.to_dict(), 0, 0.0, 0, 0, error=str(error))
    return Line(
        racer.name, spec.to_dict(), report.trainable_parameters, report.trainable_percent, report.adapter_bytes,
        peak.allocated or peak.states,
    )  # fmt: skip


def _run(spec: Resolved, line: Line, out: Path, folder: Path, latency: bool) -> Iterator[Event]:
    """Trains on one seed, and adds to the line what came of it; nothing where it was stopped."""
    losses: list[float] = []
    for event in train(spec, folder):
        if (out / STOP).exists():
            (folder / STOP).touch()
        if event["type"] == "step":
            losses.append(round(event["loss"], 4))
        yield event
    if event["stopped"]:
        return
    adapter = adapters.read(folder / "adapter")
    rows = adapter.result["heldout"]
    line.steps = event["steps"]
    line.training_seconds.append(event["training_seconds"])
    line.losses.append(losses)
    line.scores.append([row["adapted_score"] for row in rows])
    line.base_scores = [row["base_score"] for row in rows]
    line.forgetting.append(adapter.result["forgetting"])
    line.measured_peak_bytes = max(event["measured_peak_bytes"] or 0, line.measured_peak_bytes or 0) or None
    line.predicted_peak_bytes = event["predicted_peak_bytes"] or line.predicted_peak_bytes
    base, task = weights.load(spec), tasks.find(spec.task)
    if line.base_loss is None:
        line.base_loss = answer_loss(base.quick, base.tokenizer, task)
    line.loss.append(answer_loss(adapters.apply(base, adapter), base.tokenizer, task))
    if latency and line.apart is None:
        merges = methods.find(spec.method).merge is not None
        what = (BASE, APART, MERGED) if merges else (BASE, APART)
        timed = proofs.latency(adapter, task.heldout[0].prompt, 8, 3, what)  # enough to tell 1.0× from 1.5×
        report = yield from progress(timed, "timing its tokens")
        ratios = {speed.what: speed.ratio for speed in report.speeds} if report else {}
        line.apart, line.merged = ratios.get(APART), ratios.get(MERGED)
