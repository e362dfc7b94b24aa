"""Jobs: one training at a time, in order of arrival, each with a log of events that a page can come back to."""

import contextlib
import contextvars
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..base import fetching, weights
from ..errors import SpecError, plain
from ..resolve import resolve_here
from ..run import STOP, Event, train, warm_up
from ..spec import Resolved, RunSpec

RUNS = Path("runs")
Trainer = Callable[[Resolved, Path], Iterator[Event]]


class Job:
    """A run that is queued, under way or over. Its events stay, so that a page that comes back sees all of them."""

    def __init__(self, spec: Resolved, owner: str, trainer: Trainer) -> None:
        self.id = f"{spec.task}-{spec.method}-{time.strftime('%H%M%S')}-{uuid.uuid4().hex[:6]}"
        self.spec, self.owner, self.trainer = spec, owner, trainer
        self.folder = RUNS / self.id
        self.events: list[Event] = []
        self.begun = self.over = False
        self._changing = threading.RLock()

    def add(self, event: Event, over: bool = False) -> None:
        """Appends an event; it is the last one where the job is `over`."""
        with self._changing:
            self.events.append(event)
            if over:  # a run that was refused leaves the stop file, and the folder where it was made for that alone
                (self.folder / STOP).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
            self.over = over

    def stop(self) -> None:
        """Asks the run to end after the step in progress; what it learned is kept. A job that waits is over at once."""
        with self._changing:
            if not self.begun and not self.over:
                self.add({"type": "error", "message": "Stopped while it waited: nothing was learned."}, over=True)
            elif not self.over:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / STOP).touch()

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop and has not ended yet."""
        return not self.over and (self.folder / STOP).exists()

    def run(self) -> None:
        """Runs the job, unless it was stopped before its turn came."""
        with self._changing:
            self.begun = not self.over
        if not self.begun:
            return
        last: Event = {"type": "error", "message": "the run ended without a word"}
        try:
            for event in self.trainer(self.spec, self.folder):
                if event["type"] == "done":
                    last = event
                else:
                    self.add(event)
        except Exception as error:
            last = {"type": "error", "message": plain(error)}
        self.add(last, over=True)  # once the trainer has cleaned up


_pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train")
_jobs: dict[str, Job] = {}
_lock = threading.RLock()
"""Held while the table of jobs is read through or added to. `start` holds it when it asks `running`, so it is re-entrant."""


def find(job_id: str | None) -> Job | None:
    return _jobs.get(job_id or "")


def running(owner: str) -> Job | None:
    with _lock:
        return next((j for j in _jobs.values() if j.owner == owner and not j.over), None)


def ahead(job: Job) -> int:
    """How many runs come before this one, the one under way included."""
    with _lock:
        before = list(_jobs.values())
    return sum(not other.over for other in before[: before.index(job)])


def finished() -> list[tuple[Resolved, Event]]:
    """The spec and last event of every run that came to its end, the newest first."""
    with _lock:
        over = [(job.spec, job.events[-1]) for job in _jobs.values() if job.over and job.events[-1]["type"] == "done"]
    return [(spec, done) for spec, done in reversed(over) if done.get("steps")]


def start(spec: RunSpec, owner: str, trainer: Trainer = train) -> Job:
    """Queues a run. Raises SpecError when `owner` already has one that is not over, or the spec cannot run."""
    spec = resolve_here(spec)
    with _lock:
        if running(owner):
            said = "wait for it, or stop it first; what it learned is kept"
            raise SpecError(f"a run of yours is already under way: {said}")
        job = Job(spec, owner, trainer)
        _jobs[job.id] = job
    job.add({"type": "queued", "ahead": ahead(job)})
    _pool.submit(contextvars.copy_context().run, job.run)  # a shared GPU's quota hangs on the request
    return job


class Preparation:
    """A base model being fetched and loaded in the background, so that the page need not wait for it."""

    def __init__(self, model: str) -> None:
        self.spec = resolve_here(RunSpec(model=model))
        self.progress = fetching.Progress("looking", "")
        self.error: str | None = None
        self.ready = False
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def begin(self) -> None:
        """Starts, or starts again after an error; does nothing while under way or done."""
        if self.ready or (self._thread and self._thread.is_alive()):
            return
        self.error = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="prepare")
        self._thread.start()

    def stop(self) -> None:
        """Ends a download that is under way, and removes what it has left on the disk."""
        self._stopped.set()
        if self._thread and self.progress.stage != "loading":
            self._thread.join(5)

    def _work(self) -> None:
        try:
            with contextlib.closing(fetching.fetch(self.spec.model)) as stages:
                for told in stages:
                    self.progress = told if told.stage != "ready" else fetching.Progress("loading", told.detail)
                    if self._stopped.is_set():
                        return
            weights.load(self.spec)
            warm_up(self.spec)
            self.ready = True
        except Exception as error:
            self.error = plain(error)
