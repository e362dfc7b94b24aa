"""Fine-tunings of one task held side by side: the same rows, order, seeds and budget, and a line of the board for each."""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from .. import adapters, methods
from ..base import models, weights
from ..compare import proofs
from ..count import count
from ..data import tasks
from ..errors import PeftlabError, SpecError, plain
from ..measured import provenance
from ..memory import predict
from ..methods.where import where
from ..resolve import resolve_here
from ..run import STOP, pace, train
from ..run.generate import answer_loss
from ..spec import SETTINGS, Resolved, RunSpec, closest

RESAMPLES = 9999
TOKENS, ROUNDS = 8, 3
"""Of the latency of each finisher: enough to tell 1.0× from 1.5×, and no longer."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Racer:
    name: str
    spec: Resolved


@dataclass
class Line:
    """A racer's line of the board. Lists have an entry for each seed that it has finished."""

    name: str
    spec: dict[str, Any]
    trainable_parameters: int
    trainable_percent: float
    adapter_bytes: int
    """Predicted; what is written is that and a header."""
    predicted_peak_bytes: int
    """Of a step, in the closed form where the run itself predicted none."""
    measured_peak_bytes: int | None = None
    """On a GPU."""
    steps: int = 0
    training_seconds: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    """Seeds × steps, in nats per answer token of the batch."""
    base_loss: float | None = None
    """On the held-out rows, in nats per answer token, before."""
    loss: list[float] = field(default_factory=list)
    """The same, after."""
    base_scores: list[float] = field(default_factory=list)
    """0 or 1 by the task's metric, for each held-out row."""
    scores: list[list[float]] = field(default_factory=list)
    """Seeds × held-out rows."""
    forgetting: list[float] = field(default_factory=list)
    """Nats per token that ordinary prose costs more than before."""
    apart: float | None = None
    """Seconds a token over the base's, the adapter beside its weights."""
    merged: float | None = None
    """The same with the adapter in the weights; None where it cannot be merged."""
    error: str | None = None
    """Why it did not finish."""

    @property
    def score(self) -> float:
        return _mean([_mean(rows) for rows in self.scores])

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the mean score, over held-out rows, of which each has its mean over the seeds."""
        return _interval(tuple(_mean(row) for row in zip(*self.scores, strict=True)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def bootstrap(values: Sequence[float], confidence: float = 0.95, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The percentile interval of a mean. Efron 1979. NaN for no values."""
    import numpy as np

    if not values:
        return math.nan, math.nan
    draw, numbers = np.random.default_rng(0), np.asarray(values, dtype=float)
    means = numbers[draw.integers(len(numbers), size=(resamples, len(numbers)))].mean(1)
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


@lru_cache(maxsize=4096)
def _interval(values: tuple[float, ...]) -> tuple[float, float]:
    return bootstrap(values)


def along(spec: RunSpec, axes: Mapping[str, Sequence[str]]) -> list[Racer]:
    """A racer for each value of a setting, and of several settings for each combination; of the method, without values,
    those that suit the model.

    Raises SpecError for an unknown setting, and for fewer than two different racers.
    """
    values: dict[str, Sequence[str]] = {}
    for setting, given in axes.items():
        name = setting.replace("-", "_")
        if name not in SETTINGS:
            raise SpecError(f"vary={setting}: no such setting; {closest(name, SETTINGS)}")
        suiting = not given and name == "method"
        values[name] = [key for key in methods.METHODS if _suits(spec.but(method=key))] if suiting else given
    racers = [_racer(spec, dict(zip(values, chosen, strict=True))) for chosen in product(*values.values())]
    if len({racer.spec for racer in racers}) < 2:
        asked = "; ".join(" ".join([setting, *given]) for setting, given in axes.items())
        raise SpecError(f"vary={asked}: a race takes at least 2 different racers; name more values")
    return list({racer.spec: racer for racer in racers}.values())


def _racer(spec: RunSpec, chosen: Mapping[str, str]) -> Racer:
    resolved = resolve_here(RunSpec.from_dict({**spec.to_dict(), **chosen}))
    named = {
        "method": methods.find(resolved.method).name,
        "model": models.find(resolved.model).name,
        "target_modules": where(resolved),
    }
    parts = [named.get(name, f"{name.replace('_', ' ')} {value}") for name, value in chosen.items()]
    return Racer(", ".join(parts), resolved)


def _suits(spec: RunSpec) -> bool:
    try:
        count(resolve_here(spec))
    except SpecError:
        return False
    return True


def race(
    racers: Sequence[Racer],
    out: Path,
    seeds: int = 1,
    seconds: float | None = None,
    latency: bool = True,
    known: Sequence[Line] = (),
) -> Iterator[Event]:
    """Runs each racer on each seed, one after another, and yields events. What ends one ends that one only.

    `seconds` of training for each, instead of the spec's steps: as many as fit by the pace of its first ones. Without
    `latency`, tokens are not timed: where racers differ in what they read, not in what they are. `known` are lines of the
    same race begun earlier, to go on from. No adapter is kept. A STOP file in `out` ends the race after the step under way.
    Events: `racers` with the lines to begin with, `run` (a racer's, seed's own event of
    `train`), `line` when one has changed, and `done` with all of them. Raises SpecError where racers differ in what they are
    to learn.
    """
    if len(found := {str(racer.spec.task) for racer in racers}) > 1:
        raise SpecError(f"task={', '.join(sorted(found))}: a race is of one task; choose one")
    if seconds is not None and not 0 < seconds < math.inf:
        raise SpecError(f"seconds={seconds}: a budget is above 0; try 5")
    begun = {json.dumps(line.spec): line for line in known if not line.error}
    lines = [_go_on(racer, begun.get(json.dumps(racer.spec.to_dict()))) for racer in racers]
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
            except PeftlabError as error:
                line.error = str(error)
            except Exception as error:
                line.error = plain(error)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                gc.collect()  # an adapted model refers to itself, and would count in the next racer's peak
            yield {"type": "line", "racer": i, "line": asdict(line)}
    stopped = (out / STOP).exists()
    (out / STOP).unlink(missing_ok=True)
    yield {"type": "done", "lines": [asdict(line) for line in lines], "stopped": stopped}


def _go_on(racer: Racer, begun: Line | None) -> Line:
    return replace(deepcopy(begun), name=racer.name) if begun else _line(racer)


def _line(racer: Racer) -> Line:
    try:
        report = count(racer.spec)
        peak = predict(racer.spec)
    except PeftlabError as error:
        return Line(racer.name, racer.spec.to_dict(), 0, 0.0, 0, 0, error=str(error))
    return Line(
        racer.name,
        racer.spec.to_dict(),
        report.trainable_parameters,
        report.trainable_percent,
        report.adapter_bytes,
        peak.allocated or peak.states,
    )


def _run(spec: Resolved, line: Line, out: Path, folder: Path, latency: bool) -> Iterator[Event]:
    """One seed: trains, and adds to the line what came of it. One that was stopped adds nothing."""
    losses: list[float] = []
    for event in train(spec, folder):
        if (out / STOP).exists():
            (folder / STOP).touch()
        if event["type"] == "step":
            losses.append(round(event["loss"], 4))
        yield event
    if event["stopped"]:
        return
    adapter = adapters.read(event["adapter"])
    line.steps = event["steps"]
    line.training_seconds.append(event["training_seconds"])
    line.losses.append(losses)
    line.scores.append([row["adapted_score"] for row in adapter.result["heldout"]])
    line.base_scores = [row["base_score"] for row in adapter.result["heldout"]]
    line.forgetting.append(event["forgetting"])
    line.measured_peak_bytes = max(event["measured_peak_bytes"] or 0, line.measured_peak_bytes or 0) or None
    line.predicted_peak_bytes = event["predicted_peak_bytes"] or line.predicted_peak_bytes
    base, task = weights.load(spec), tasks.find(spec.task)
    if line.base_loss is None:
        line.base_loss = answer_loss(base.quick, base.tokenizer, task)
    line.loss.append(answer_loss(adapters.apply(base, adapter), base.tokenizer, task))
    if latency and line.apart is None:
        merges = methods.find(spec.method).merge is not None
        what = (proofs.BASE, proofs.APART, proofs.MERGED) if merges else (proofs.BASE, proofs.APART)
        work = proofs.latency(adapter, task.heldout[0].prompt, TOKENS, ROUNDS, what)
        while True:
            try:
                yield {"type": "progress", "what": "timing its tokens", "share": next(work)}
            except StopIteration as finished:
                ratios = {speed.what: speed.ratio for speed in finished.value.speeds}
                break
        line.apart, line.merged = ratios[proofs.APART], ratios.get(proofs.MERGED)


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    unit: str
    of: Callable[[Line], Any]
    """A number to sort by; None where the line has none."""
    high_is_good: bool = False


def _finished(of: Callable[[Line], Any]) -> Callable[[Line], Any]:
    return lambda line: of(line) if line.scores else None


COLUMNS = (
    Column("score", "held-out score", "", _finished(lambda line: line.score), high_is_good=True),
    Column("low", "at least", "", _finished(lambda line: line.interval[0]), high_is_good=True),
    Column("high", "at most", "", _finished(lambda line: line.interval[1]), high_is_good=True),
    Column("loss", "held-out loss", "nats per answer token", _finished(lambda line: _mean(line.loss))),
    Column("forgetting", "forgetting", "nats per token", _finished(lambda line: _mean(line.forgetting))),
    Column("trainable_parameters", "trainable parameters", "", lambda line: line.trainable_parameters),
    Column("adapter_bytes", "adapter", "bytes", lambda line: line.adapter_bytes),
    Column("predicted_peak_bytes", "peak memory, predicted", "bytes", lambda line: line.predicted_peak_bytes),
    Column("measured_peak_bytes", "peak memory, measured", "bytes", lambda line: line.measured_peak_bytes),
    Column("steps", "steps", "", _finished(lambda line: line.steps), high_is_good=True),
    Column("training_seconds", "training", "seconds", _finished(lambda line: _mean(line.training_seconds))),
    Column("apart", "time a token, apart", "× the base's", lambda line: line.apart),
    Column("merged", "time a token, merged", "× the base's", lambda line: line.merged),
)
BY_KEY = {c.key: c for c in COLUMNS}


def column(key: str) -> Column:
    """Raises SpecError where there is none."""
    if key not in BY_KEY:
        raise SpecError(f"sort={key}: no such column; {closest(key, BY_KEY)}")
    return BY_KEY[key]


def ranked(lines: Sequence[Line], key: str = "score") -> list[Line]:
    """The best first by a column; lines without a number last, in their own order. Raises SpecError for no such column."""
    chosen = column(key)
    sign = -1 if chosen.high_is_good else 1
    return sorted(lines, key=lambda line: math.inf if (value := chosen.of(line)) is None else sign * value)


def to_csv(lines: Sequence[Line]) -> str:
    """The board, a column for each of COLUMNS with its unit, and the error of those that did not finish."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    titles = [f"{c.title} ({c.unit})" if c.unit else c.title for c in COLUMNS]
    writer.writerow(["racer", *titles, "error"])
    for line in lines:
        writer.writerow([line.name, *("" if (v := c.of(line)) is None else v for c in COLUMNS), line.error or ""])
    return text.getvalue()


def document(axes: Mapping[str, Sequence[str]], lines: Sequence[Line]) -> dict[str, Any]:
    """A race as it is recorded: command, hardware, versions and date, and the board."""
    return provenance() | {"kind": "race", "vary": dict(axes), "lines": [asdict(line) for line in lines]}


def record(file: Path, axes: Mapping[str, Sequence[str]], lines: Sequence[Line]) -> None:
    """Writes `document`, a line of the file for each of the board."""
    head = document(axes, [])
    del head["lines"]
    rows = ",\n".join(json.dumps(asdict(line)) for line in lines)
    file.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "lines": [\n{rows}\n]}}\n', encoding="utf-8")


def read(file: Path) -> list[Line]:
    """The lines of a recorded race. Raises SpecError for a file that is none."""
    try:
        return [Line(**line) for line in json.loads(file.read_text(encoding="utf-8"))["lines"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{file}: not a recorded race ({error}); give another path") from None
