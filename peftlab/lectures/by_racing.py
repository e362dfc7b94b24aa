"""Tests of statements by a race: each takes the race's board and the `given` of a statement, and returns a finding.

Scores are compared by the bootstrap's 95% interval of the mean difference over held-out rows, each its mean over the seeds. A
statement is open where its limit is within that interval, which is somewhat too narrow where the same scores chose the best
or the worst of several racers. Every test raises LookupError or ValueError where a racer that it needs has not finished.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from .. import units
from ..race import Line, bootstrap
from ..race.recordings import Board
from .facts import SAME_TIME
from .statements import FAILS, HOLDS, OPEN, Finding, decided

Settings = Mapping[str, object]
"""The settings that tell a racer from the others; a tuple means the mean over racers of each of its values."""


@dataclass(frozen=True)
class Side:
    """What is compared: a racer, or the mean of several."""

    name: str
    rows: tuple[float, ...]
    """The score of each held-out row, the mean over the seeds, and over the racers where they are several."""

    @property
    def score(self) -> float:
        return fmean(self.rows)

    def __str__(self) -> str:
        return f"{self.name} {units.score(self.score)}"


def _side(name: str, lines: Sequence[Line]) -> Side:
    of_each = [[fmean(row) for row in zip(*line.scores, strict=True)] for line in lines]
    return Side(name, tuple(fmean(row) for row in zip(*of_each, strict=True)))


def _sides(board: Board, named: Mapping[str, Settings]) -> list[Side]:
    """The racers of these settings. Raises LookupError where one of them has not finished."""
    sides = []
    for name, settings in named.items():
        values = [value if isinstance(value, tuple) else (value,) for value in settings.values()]
        lines = [board.of(**dict(zip(settings, chosen, strict=True))) for chosen in product(*values)]
        sides.append(_side(name, lines))
    return sides


def compared(one: Side, other: Side, least: float, words: str) -> Finding:
    """Whether `one` scores at least `least` more than `other`."""
    low, high = bootstrap(tuple(a - b for a, b in zip(one.rows, other.rows, strict=True)))
    return Finding(HOLDS if low >= least else FAILS if high < least else OPEN, words, (low, high))


def scores(
    board: Board, of: Mapping[str, Settings], than: Mapping[str, Settings] | None = None, least: float = 0.0
) -> Finding:
    """The worst of `of` scores at least `least` more than the best of `than`, or of all other racers without it."""
    ours, shown = _sides(board, of), _sides(board, {**of, **(than or {})})
    if than is None:
        rest = [line for line in board.lines if not any(line.spec.items() >= wanted.items() for wanted in of.values())]
        best = max(rest, key=lambda line: line.score)
        rival = _side(best.name, [best])
        shown.append(rival)
    else:
        rival = max(_sides(board, than), key=lambda side: side.score)
    return compared(min(ours, key=lambda side: side.score), rival, least, ", ".join(map(str, shown)))


def one_rate(board: Board, ranks: Sequence[int], apart: float) -> Finding:
    """At each learning rate that all ranks were raced at, the highest and the lowest score are more than `apart`."""
    found = []
    for rate in sorted({line.spec["learning_rate"] for line in board.lines}):
        sides = _sides(board, {f"rank {rank}": {"rank": rank, "learning_rate": rate} for rank in ranks})
        low, high = (choose(sides, key=lambda side: side.score) for choose in (min, max))
        found.append((high, low, f"{rate:g} {units.score(low.score)} to {units.score(high.score)}"))
    words = f"ranks {', '.join(map(str, ranks))} at {'; '.join(text for *_, text in found)}"
    highest, lowest, _ = min(found, key=lambda pair: pair[0].score - pair[1].score)
    return compared(highest, lowest, apart, words)


def _measured(line: Line, what: str) -> tuple[float, str]:
    """The `forgetting`, `seconds` or `peak` of a racer, as a number and as it is written."""
    forgetting, seconds = fmean(line.forgetting), fmean(line.training_seconds)
    peak = line.measured_peak_bytes or line.predicted_peak_bytes
    return {
        "forgetting": (forgetting, f"{forgetting:.2f} nats a token"),
        "seconds": (seconds, f"{units.seconds(seconds)} for {line.steps} steps in {line.spec['precision']}"),
        "peak": (peak, f"{units.size(peak)} {'measured' if line.measured_peak_bytes else 'predicted'}"),
    }[what]


def less(board: Board, what: str, of: str = "lora", than: str = "full") -> Finding:
    """A method has less of a quantity than another; how many of all methods do is said beside it."""
    mine, other = board.of(method=of), board.of(method=than)
    (value, said), (limit, other_said) = (_measured(line, what) for line in (mine, other))
    rest = [line for line in board.lines if line.spec["method"] != than]
    fewer = sum(_measured(line, what)[0] < limit for line in rest)
    words = f"{mine.name} {said}, {other.name} {other_said}; {fewer} of {len(rest)} methods are below {other.name}"
    return decided(value < limit, words)


def merged_time(board: Board) -> Finding:
    """A token takes longer with Houlsby's adapters, and no longer with merged LoRA."""
    houlsby, lora = board.of(method="houlsby"), board.of(method="lora")
    if houlsby.apart is None or lora.merged is None or lora.apart is None:
        raise LookupError("no token was timed")
    words = (
        f"a token takes {houlsby.apart:.2f}× the base's with Houlsby; with LoRA {lora.merged:.2f}× once merged "
        f"({lora.apart:.2f}× before)"
    )
    return decided(houlsby.apart > SAME_TIME >= lora.merged, words)


def parallel_time(board: Board) -> Finding:
    """A token takes less time with a parallel adapter than with one in series at the same place."""
    parallel, serial = board.of(method="parallel").apart, board.of(method="pfeiffer").apart
    if parallel is None or serial is None:
        raise LookupError("no token was timed")
    words = f"{parallel:.2f}× the base's time a token, against {serial:.2f}× in series at the same place"
    return decided(parallel * SAME_TIME < serial, words)


def higher_rate(board: Board, of: Sequence[str], than: str, times: float) -> Finding:
    """The best learning rate of each method is higher than another method's, and `times` it at least."""
    best = {key: board.best("learning_rate", key) for key in (*of, than)}
    words = ", ".join(f"{board.of(method=key).name.partition(',')[0]} {rate:g}" for key, rate in best.items())
    ratio = min(best[key] for key in of) / best[than]
    return decided(ratio >= times and ratio > 1, f"best rates: {words}")
