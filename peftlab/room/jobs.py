"""Who is running what: one training at a time, in order of arrival, each with its log of events to attach to again."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..base import weights
from ..errors import PeftlabError, SpecError, plain
from ..resolve import resolve_here
from ..run import STOP, train, warm_up
from ..spec import Resolved, RunSpec

RUNS = Path("runs")
Trainer = Callable[[Resolved, Path], Iterator[dict[str, Any]]]


class Job:
    """A run, queued or under way or over. Its events stay, so that a page that comes back sees all of them."""

    def __init__(self, spec: Resolved, owner: str, trainer: Trainer) -> None:
        self.id = f"{spec.task}-{spec.method}-{time.strftime('%H%M%S')}-{uuid.uuid4().hex[:6]}"
        self.spec = spec
        self.owner = owner
        self.trainer = trainer
        self.folder = RUNS / self.id
        self.events: list[dict[str, Any]] = []
        self.begun = self.over = False
        self._changed = threading.Condition()

    def add(self, event: dict[str, Any], over: bool = False) -> None:
        with self._changed:
            self.events.append(event)
            self.over = over
            if over:
                self._forget_stop()
            self._changed.notify_all()

    def follow(self, patience: float = 1.0) -> Iterator[list[dict[str, Any]]]:
        """All events so far, again whenever there are more (or after `patience` seconds), until the job is over."""
        while True:
            with self._changed:
                seen, over = len(self.events), self.over
                events = list(self.events)
            yield events
            if over:
                return
            with self._changed:
                if len(self.events) == seen:
                    self._changed.wait(patience)

    def stop(self) -> None:
        """Asks the run to end after the step in progress; what it learned is kept. One that waits is over at once."""
        with self._changed:
            if not self.begun and not self.over:
                self.add({"type": "error", "message": "Stopped while it waited: nothing was learned."}, over=True)
            elif not self.over:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / STOP).touch()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop and has not come to it."""
        return not self.over and (self.folder / STOP).exists()

    def begin(self) -> bool:
        """Its turn has come. False where it was stopped before."""
        with self._changed:
            self.begun = not self.over
        return self.begun

    def _forget_stop(self) -> None:
        """A run that was refused has not removed the file itself, nor the folder that was made for it alone."""
        (self.folder / STOP).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


_pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="train")
_jobs: dict[str, Job] = {}
_lock = threading.RLock()
"""Held while the table is read through or added to; `start` asks `running` while it holds it."""


def find(job_id: str | None) -> Job | None:
    return _jobs.get(job_id or "")


def running(owner: str) -> Job | None:
    with _lock:
        return next((j for j in _jobs.values() if j.owner == owner and not j.over), None)


def ahead(job: Job) -> int:
    """How many runs are before it, the one under way included."""
    with _lock:
        before = list(_jobs.values())
    return sum(not other.over for other in before[: before.index(job)])


def finished() -> list[tuple[Resolved, dict[str, Any]]]:
    """The spec and last event of every run that came to its end, the newest first."""
    with _lock:
        over = [(job.spec, job.events[-1]) for job in _jobs.values() if job.over and job.events[-1]["type"] == "done"]
    return [(spec, done) for spec, done in reversed(over) if done.get("steps")]


def start(spec: RunSpec, owner: str, trainer: Trainer = train) -> Job:
    """Queues a run. Raises SpecError when `owner` already has one that is not over, or the spec cannot run."""
    spec = resolve_here(spec)
    with _lock:
        if running(owner):
            raise SpecError(
                "a run of yours is already under way: wait for it, or stop it first; what it learned is kept"
            )
        job = Job(spec, owner, trainer)
        _jobs[job.id] = job
    job.add({"type": "queued", "ahead": ahead(job)})
    _pool.submit(contextvars.copy_context().run, _work, job)  # a shared GPU's quota hangs on the request
    return job


def _work(job: Job) -> None:
    if not job.begin():
        return
    last: dict[str, Any] = {"type": "error", "message": "the run ended without a word"}
    try:
        for event in job.trainer(job.spec, job.folder):
            if event["type"] == "done":
                last = event
            else:
                job.add(event)
        job.add(last, over=True)  # once it has cleaned up
    except PeftlabError as error:
        job.add({"type": "error", "message": str(error)}, over=True)
    except Exception as error:
        job.add({"type": "error", "message": plain(error)}, over=True)


class Preparation:
    """A base model being fetched and loaded in the background, so that the page need not wait for it."""

    def __init__(self, model: str) -> None:
        self.spec = resolve_here(RunSpec(model=model))
        self.progress = weights.Progress("looking", "")
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
            with contextlib.closing(weights.fetch(self.spec.model)) as fetching:
                for progress in fetching:
                    self.progress = (
                        progress if progress.stage != "ready" else weights.Progress("loading", progress.detail)
                    )
                    if self._stopped.is_set():
                        return
            weights.load(self.spec)
            warm_up(self.spec)
            self.ready = True
        except PeftlabError as error:
            self.error = str(error)
        except Exception as error:
            self.error = plain(error)
