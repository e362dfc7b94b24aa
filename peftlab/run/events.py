"""What a run tells while it goes on: small dicts, which JSON, another thread and a worker process carry alike."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, TypedDict, TypeVar

from ..spec import Json

Result = TypeVar("Result")
OF_A_RUN = Literal["loading", "start", "resumed", "gear", "note", "progress", "eval", "step", "done"]


class _Typed(TypedDict):
    type: OF_A_RUN | Literal["racers", "run", "line", "queued", "error"]


class Event(_Typed, total=False):
    """One thing that happened. Each type has some of these keys."""

    model: str  # loading and start
    source: str  # start: where the base's weights came from
    spec: Json  # every setting of the run
    trainable_parameters: int
    trainable_percent: float
    heldout: int  # how many rows are held out
    metric: str
    packed: bool  # rows are read as one sequence
    fused: dict[str, int]  # modules with fused operations, by kind
    not_fused: list[str]
    gear: str  # start and gear: how steps are run
    why_eager: str  # empty where a step is one CUDA graph
    what: str  # progress: the work under way
    share: float  # how much of it is done, from 0 to 1
    when: Literal["before", "during", "after"]  # eval: where in the run
    metrics: dict[str, float]
    items: int
    examples: Any  # eval: some held-out rows with what the model said; step: how many training rows were read
    step: int  # resumed, eval and step: how many are done
    steps: int  # step: how many there will be; done: how many were taken
    loss: float  # nats per answer token of the step's rows
    gradient_norm: float  # before clipping
    learning_rate: float
    peak_bytes: int  # step, on a GPU: the most that steps have allocated so far
    seconds: float  # eval, step, done: how long it took
    eta_seconds: float  # of training that are left
    adapter: str | None  # done: its folder; None where nothing was learned
    stopped: bool
    message: str  # done without an adapter, resumed at step 0, note, error
    training_seconds: float
    tokens_per_second: float  # step and done: of the run's training so far, without padding
    train_loss: float
    eval: Json  # the metric `before` and `after` (None where not measured) and the number of `items`
    forgetting: float | None  # nats per token that ordinary prose costs more than it cost the base
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None
    device: str
    lines: list[Json]  # racers, and a race's done: every line of the board
    seeds: int
    racer: int  # run and line: its place in the race, from 0
    seed: int
    event: Event  # run: what the racer's own training told
    line: Json
    ahead: int  # queued: how many runs come first
    report: Json  # a scoring's done: a ComparisonReport
    resumable: bool  # error: the run can go on from where it was
    cancelled: bool  # error: its visitor wanted it so
    as_before: bool  # the end of a run that went on and was cancelled: how it had ended before
    settings: dict[str, Any]  # error: settings that cure it, where some are known
    change: str  # error: these settings in words
    job_seconds: float  # done: how long the job took, with loading


def last_of(events: Sequence[Event], kind: str) -> Event | None:
    """The last event of a kind, None where there is none."""
    return next((e for e in reversed(events) if e["type"] == kind), None)


def standing(events: Iterable[Event]) -> list[Event]:
    """The events of a run as if nothing had interrupted it: what it did again after it went on is there once.

    What it did after it went on is gone where it was cancelled then.
    """
    kept, ended = list[Event](), list[Event]()
    last = 0
    for event in events:
        if event.get("as_before"):
            kept = [*ended]
        elif event["type"] in ("done", "error"):
            ended = [*kept]
        if event["type"] == "step":
            if event["step"] <= last:
                kept = [e for e in kept if e["type"] not in ("step", "eval") or e["step"] < event["step"]]
            last = event["step"]
        elif event["type"] == "eval":
            kept = [e for e in kept if e["type"] != "eval" or e["when"] != event["when"]]
        kept.append(event)
    return kept


class Work(Generic[Result]):
    """Iterates over the shares done that `work` yields, from 0 to 1; then `result` is what it has returned."""

    result: Result

    def __init__(self, work: Generator[float, None, Result]) -> None:
        self.work = work

    def __iter__(self) -> Iterator[float]:
        self.result = yield from self.work

    def finished(self) -> Result:
        """Takes the work to its end, and returns its result."""
        for _ in self:
            pass
        return self.result


def progress(
    work: Generator[float, None, Result], what: str, stopped: Callable[[], bool] = lambda: False
) -> Generator[Event, None, Result | None]:
    """Tells the shares that `work` yields as events; returns its result, or None where it was `stopped` before its end."""
    for share in (told := Work(work)):
        if stopped():
            work.close()
            return None
        yield {"type": "progress", "what": what, "share": share}
    return told.result
