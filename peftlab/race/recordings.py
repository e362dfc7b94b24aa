"""A race's board: a line for each racer, with columns to rank by; written as it goes on, read again from assets/measured/."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import SpecError
from ..measured import documents, provenance
from ..spec import Json, closest


@dataclass
class Line:
    """A racer's line of the board. Lists have an entry for each seed that it has finished."""

    name: str
    spec: Json
    trainable_parameters: int
    trainable_percent: float
    adapter_bytes: int  # predicted; what is written is that and a header
    predicted_peak_bytes: int  # of a step, by the closed form where the run itself predicted none
    measured_peak_bytes: int | None = None  # on a GPU
    steps: int = 0
    training_seconds: list[float] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)  # seeds × steps, in nats per answer token of the batch
    base_loss: float | None = None  # the base's loss on the held-out rows, in nats per answer token
    loss: list[float] = field(default_factory=list)  # the same after training
    base_scores: list[float] = field(default_factory=list)  # 0 or 1 by the task's metric, for each held-out row
    scores: list[list[float]] = field(default_factory=list)  # seeds × held-out rows
    forgetting: list[float] = field(default_factory=list)  # nats per token that ordinary prose costs more than before
    apart: float | None = None  # seconds a token over the base's, the adapter beside its weights
    merged: float | None = None  # the same with the adapter in the weights; None where it cannot be merged
    error: str | None = None  # why it did not finish

    @property
    def score(self) -> float:
        """The mean over seeds and held-out rows, from 0 to 1; NaN before the first seed is finished."""
        return fmean(map(fmean, self.scores)) if self.scores else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean score over held-out rows, each of which has its mean over the seeds."""
        return bootstrap(tuple(map(fmean, zip(*self.scores, strict=True))))


@lru_cache(maxsize=4096)
def bootstrap(values: tuple[float, ...]) -> tuple[float, float]:
    """The 95% percentile interval of a mean by 9999 resamples (Efron 1979); NaN for no values."""
    import numpy as np

    if not values:
        return math.nan, math.nan
    draw, numbers = np.random.default_rng(0), np.asarray(values, dtype=float)
    means = numbers[draw.integers(len(numbers), size=(9999, len(numbers)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    unit: str
    of: Callable[[Line], float | None]
    """A number to sort by; None where the line has none."""
    high_is_good: bool = False


def _finished(of: Callable[[Line], float]) -> Callable[[Line], float | None]:
    return lambda line: of(line) if line.scores else None


COLUMNS = (
    Column("score", "held-out score", "", _finished(lambda line: line.score), high_is_good=True),
    Column("low", "at least", "", _finished(lambda line: line.interval[0]), high_is_good=True),
    Column("high", "at most", "", _finished(lambda line: line.interval[1]), high_is_good=True),
    Column("loss", "held-out loss", "nats per answer token", _finished(lambda line: fmean(line.loss))),
    Column("forgetting", "forgetting", "nats per token", _finished(lambda line: fmean(line.forgetting))),
    Column("trainable_parameters", "trainable parameters", "", lambda line: line.trainable_parameters),
    Column("adapter_bytes", "adapter", "bytes", lambda line: line.adapter_bytes),
    Column("predicted_peak_bytes", "peak memory, predicted", "bytes", lambda line: line.predicted_peak_bytes),
    Column("measured_peak_bytes", "peak memory, measured", "bytes", lambda line: line.measured_peak_bytes),
    Column("steps", "steps", "", _finished(lambda line: line.steps), high_is_good=True),
    Column("training_seconds", "training", "seconds", _finished(lambda line: fmean(line.training_seconds))),
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
        writer.writerow([line.name, *(c.of(line) for c in COLUMNS), line.error])  # None is written as nothing
    return text.getvalue()


class Board:
    """A race's finished lines, found by their settings."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = [line for line in lines if line.scores]

    def of(self, **settings: object) -> Line:
        """The line of these settings, the best of several. Raises LookupError where none finished."""
        found = [line for line in self.lines if all(line.spec[name] == value for name, value in settings.items())]
        if not found:
            raise LookupError(f"no racer of {settings} finished")
        return max(found, key=lambda line: line.score)

    def score(self, **settings: object) -> float:
        return self.of(**settings).score

    def best(self, setting: str, of: str) -> Any:
        """The value of a setting at which a method scores highest; of equals, the one with the lower loss."""
        found = [line for line in self.lines if line.spec["method"] == of]
        return max(found, key=lambda line: (line.score, -fmean(line.loss))).spec[setting]


@dataclass(frozen=True)
class Recording:
    """Races of one lesson on one machine."""

    lines: tuple[Line, ...]
    hardware: str
    device: str
    date: str
    versions: Mapping[str, str]
    commands: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, int]:
        """The fewest and the most that a racer has finished, of those that finished any."""
        finished = [len(line.scores) for line in self.lines if line.scores]
        return min(finished, default=0), max(finished, default=0)


@lru_cache
def of(key: str) -> list[Recording]:
    """A lesson's recordings, one a machine: the one with the most runs first, of equals a GPU's.

    All files `race-KEY-*.json` of one machine make one recording; of two lines of the same settings the later file's counts.
    """
    found: dict[str, list[Json]] = {}
    for one in documents(f"race-{key}"):
        found.setdefault(one["hardware"], []).append(one)
    made = []
    for together in found.values():
        told = [line for one in together for line in one["lines"] if line["scores"] or line["error"]]
        lines = {json.dumps(line["spec"] | {"seed": 0}): Line(**line) for line in told}
        last, commands = max(together, key=lambda one: one["date"]), tuple(one["command"] for one in together)
        about = last["hardware"], last["device"], last["date"], last["versions"]
        made.append(Recording(tuple(lines.values()), *about, commands))
    return sorted(made, key=lambda r: (-sum(len(line.scores) for line in r.lines), r.device != "cuda"))


def document(axes: Mapping[str, Sequence[str]], lines: Sequence[Line]) -> Json:
    """A race as it is recorded: command, hardware, versions and date, and the board."""
    return provenance() | {"kind": "race", "vary": dict(axes), "lines": [asdict(line) for line in lines]}


def record(file: Path, axes: Mapping[str, Sequence[str]], lines: Sequence[Line]) -> None:
    """Writes `document`, a line of the file for each of the board."""
    head = json.dumps(document(axes, []), indent=1).removesuffix("[]\n}")
    rows = ",\n".join(json.dumps(asdict(line)) for line in lines)
    file.write_text(f"{head}[\n{rows}\n]}}\n", encoding="utf-8")


def read(file: Path) -> list[Line]:
    """The lines of a race that a command recorded. Raises SpecError for a file that is none."""
    try:
        return [Line(**line) for line in json.loads(file.read_text(encoding="utf-8"))["lines"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{file}: not a recorded race ({error}); give another path") from None
