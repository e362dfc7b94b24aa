"""The jobs of a data folder: who comes first, who may start one, and what is found again after a restart."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import re
import secrets
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import TextIO

from .. import hardware
from ..base import models, weights
from ..errors import NotHere, RunError, SpecError
from ..memory import must_fit
from ..resolve import resolve_here
from ..run import Event
from ..run.events import last_of
from ..spec import Json, Resolved, RunSpec
from . import host, keeping
from .jobs import TRAINS, Job, resolved
from .records import OVER, RUNNING, WAITING, Record, Records
from .visitors import Signer

log = logging.getLogger(__name__)
IN_MEMORY = 64
"""So many jobs that are over stay in memory, those looked at last."""
RECENT = 50
"""So many of the last jobs of a kind say how long one takes."""
ALIKE = ("task", "model", "method", "steps", "batch_size", "accumulation", "quantization")
"""Runs that have these in common take about as long."""
OWN = 8
"""So many of an owner's last runs are offered as adapters."""
TIDY = 3600
"""Seconds after which a server with nothing to do looks for what is to be removed."""
LOOKED_AT = 3600
"""A job that somebody has looked at within so many seconds is not removed."""


class Room:
    """The jobs of one data folder. One is done at a time, whoever has the host's key first; on a shared GPU, all at once."""

    def __init__(self, settings: host.Host) -> None:
        """Raises SpecError where no data folder can be made. One process may have it: another keeps its jobs elsewhere."""
        self.settings, self.folder = settings, settings.data
        self.began, self.forgets = time.monotonic(), host.forgets()
        try:
            (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
            self._claim = _claimed(self.folder / "lock")
        except OSError as error:
            said = f"{host.variable('data')}={self.folder}: no folder that can be locked is to be had there ({error.strerror})"
            raise SpecError(f"{said}; give another one") from None
        if self._claim is None:
            self.folder, self.forgets = Path(tempfile.mkdtemp(prefix="peftlab-")), True
            (self.folder / "jobs").mkdir()
            log.warning("%s is in use by another server: the runs of this one are in %s", settings.data, self.folder)
        self.apart = hardware.is_shared()
        """Whether each job is done by the request that has asked for it, because its visitor's quota hangs on that."""
        weights.SHARE = settings.memory
        self.signer = Signer(self.folder / "key")
        self.records = Records(self.folder / "jobs.sqlite")
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._looked_at: dict[str, float] = {}
        """When somebody last asked for a job (time.monotonic), for as long as it matters."""
        self._places = itertools.count()
        self._changed = threading.Condition(threading.RLock())
        self._closed = False
        self._take_up()
        self.tidy()
        self._thread = threading.Thread(target=self._work, daemon=True, name="jobs")
        self._thread.start()

    def find(self, job_id: object) -> Job | None:
        """The job of this id, from the memory, the table or the second folder; None where there is none."""
        if not isinstance(job_id, str) or not re.fullmatch(r"[\w-]{1,200}", job_id):
            return None
        with self._changed:
            if job_id not in self._jobs:
                if not (record := self.records.find(job_id)):
                    return self._copied(job_id)
                self._keep(Job(record, self.folder / "jobs" / job_id, self.records))
            self._jobs.move_to_end(job_id)
            self._looked_at[job_id] = time.monotonic()
            return self._jobs[job_id]

    def running(self, owner: str) -> Job | None:
        """The owner's job that waits or is under way."""
        with self._changed:
            return next((job for job in self._alive() if job.owner == owner), None)

    def busy(self) -> bool:
        """Whether a job waits or is under way."""
        with self._changed:
            return bool(self._alive())

    def ahead(self, job: Job) -> int:
        """How many jobs come before this one, the one under way included."""
        with self._changed:
            alive = [] if self.apart else self._alive()
            return alive.index(job) if job in alive else 0

    def wait(self, job: Job) -> float | None:
        """Seconds until a job begins, from what the last ones of each kind took; None where that is not known."""
        with self._changed:
            before = self._alive()[: self.ahead(job)]
        if self.apart and not job.begun:  # the shared GPU's own queue, of which nothing is told
            return None
        usual = {kind: self._usual(kind) for kind in {other.kind for other in before}}
        if None in usual.values():
            return None
        return sum(max((usual[other.kind] or 0.0) - other.seconds, _told(other)) for other in before)

    def finished(self) -> list[tuple[Resolved, Event]]:
        """The spec and last event of the last runs that came to their end, the newest first."""
        found = []
        for record, last in self._done("train"):
            with contextlib.suppress(SpecError):  # a version with other settings made it
                found += [(resolved(record.arguments["spec"]), last)] if last.get("steps") else []
        return found

    def takes(self, spec: Resolved) -> float | None:
        """Seconds from its turn to its end that a run like this takes here, from the last ones; None where there were none."""
        took = [
            last["job_seconds"]
            for record, last in self._done("train")
            if "job_seconds" in last and not last.get("stopped")
            and all(record.arguments["spec"].get(name) == getattr(spec, name) for name in ALIKE)
        ]  # fmt: skip
        return median(took) if took else None

    def adapters(self, owner: str) -> list[Job]:
        """The owner's last runs that have an adapter, the newest first."""
        newest = (
            f"number IN (SELECT number FROM jobs WHERE owner = ? AND kind = 'train' ORDER BY number DESC LIMIT {OWN})"
        )
        found = [self.find(record.id) for record in self.records.where(newest, owner)] if owner else []
        return [job for job in reversed(found) if job and (job.folder / "adapter").exists()]

    def start(self, kind: str, arguments: Json, owner: str, first: bool = False) -> Job:
        """Queues a job, whose arguments have the `spec` of its run or of a race's first one.

        Raises SpecError when `owner` has one that is not over, and where this host does not allow it; DoesNotFit where its
        memory does not hold the run; RunError where the job cannot be written down.
        """
        spec = resolve_here(RunSpec.from_dict(arguments["spec"]))
        racers = [resolved(racer) for _, racer in arguments.get("racers", ())]
        for one in (spec, *racers) if kind in TRAINS else ():
            self._allow(one)
        if kind == "train":  # each racer is refused by itself
            self._must_fit(spec)
        with self._changed:
            self._only_one(owner)
            self._has_room(first)
            job_id = f"{spec.task}-{spec.method}-{secrets.token_hex(16)}"
            try:
                record = self.records.add(job_id, kind, arguments | {"spec": spec.to_dict()}, owner, first)
            except sqlite3.Error as error:
                why = f"the table of runs cannot be written ({error})"
                raise RunError(f"{why}; tell the host of this page, whose disk may be full") from None
            job = Job(record, self.folder / "jobs" / job_id, self.records)
            self._queue(job)
        return job

    def resume(self, job: Job) -> None:
        """Queues a job that ended early, to go on from where it was. Raises SpecError where it cannot, as `start` does."""
        if not job.resumable:
            raise SpecError("this run came to its end and cannot go on; start another one")
        self._allow_all(job)
        if job.kind == "train":
            self._must_fit(job.spec)
        with self._changed:
            self._only_one(job.owner)
            self._has_room(job.record.first)
            job.put(WAITING)
            self._queue(job)

    def carry_out(self, job: Job, longest: float) -> None:
        """Does a job that waits, for at most so many seconds, where each is done by the request that has asked for it."""
        if self.apart and job.begin():
            self._do(job, longest)

    def tidy(self) -> None:
        """Removes jobs that are too old or take too much of the disk, but none that was looked at within the hour."""
        with self._changed:
            since = time.monotonic() - LOOKED_AT
            self._looked_at = {id: at for id, at in self._looked_at.items() if at > since}
            over = [(r, self.folder / "jobs" / r.id) for r in self.records.where("state = ?", OVER)]
            most = self.settings.disk * 1e9
            for record in keeping.overdue(over, self.settings.days, most, time.time(), self._looked_at):
                self._jobs.pop(record.id, None)
                self.records.forget(record.id)
                shutil.rmtree(self.folder / "jobs" / record.id, ignore_errors=True)

    def leave(self, patience: float) -> None:
        """Has runs under way keep what they have learned, to go on another time; waits no longer than so many seconds.

        Nothing begins any more.
        """
        until = time.monotonic() + patience
        with self._changed:
            self._closed = True
            under_way = [job for job in self._alive() if job.begun]
        for job in under_way:
            job.leave()
        while time.monotonic() < until and not all(job.over for job in under_way if job.kind == "train"):
            time.sleep(0.05)

    def close(self) -> None:
        """Ends the thread once the job under way is over."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(60)
        self.records.close()
        if self._claim:
            self._claim.close()

    def _queue(self, job: Job) -> None:
        job.place = next(self._places)
        self._looked_at[job.id] = time.monotonic()
        self._keep(job)
        job.add({"type": "queued", "ahead": self.ahead(job)})
        self._changed.notify_all()

    def _only_one(self, owner: str) -> None:
        if not owner:
            raise SpecError("this browser is not known here; reload the page")
        job = self.running(owner)
        if job and not job.cancelling:  # one that is being cancelled is in nobody's way
            said = "wait for it, or stop it first; what it learned is kept"
            raise SpecError(f"a run of yours is already under way: {said}")

    def _has_room(self, first: bool) -> None:
        """Raises SpecError where the queue is full, but not for one that goes `first`."""
        waiting = len(self._alive()) - 1
        if waiting >= self.settings.queue and not first:
            raise SpecError(f"runs that wait: {waiting}, and here at most {self.settings.queue} may; try again later")

    def _allow_all(self, job: Job) -> None:
        """Raises SpecError for a job that this host does not train, as it is set now."""
        if job.kind in TRAINS:
            for spec in (job.arguments["spec"], *(racer for _, racer in job.arguments.get("racers", ()))):
                self._allow(resolved(spec))

    def _allow(self, spec: Resolved) -> None:
        """Raises SpecError for what this host does not train."""
        ours = self.settings
        if not ours.train:
            raise SpecError("this host shows everything and trains nothing; run peftlab yourself to train")
        if ours.models and spec.model not in ours.models:
            said = f"model={spec.model}: this host trains {', '.join(ours.models)}; choose one of these"
            raise NotHere(said, {"model": ours.models[0]}, models.find(ours.models[0]).name)
        tokens = spec.steps * spec.batch_size * spec.accumulation * spec.sequence_length
        if tokens > ours.tokens:
            fits = spec.steps * ours.tokens // tokens
            fix = f"try {fits}" if fits else "lower the batch, the accumulation or the length"
            raise SpecError(f"steps={spec.steps}: {tokens:,} tokens, and a run here has at most {ours.tokens:,}; {fix}")

    def _must_fit(self, spec: Resolved) -> None:
        """What a run under way will leave free is not known, nor what is free on a shared GPU: there all memory counts."""
        with self._changed:
            busy = bool(self._alive())
        must_fit(spec, self.settings.models or None, whole=busy or self.apart)

    def _alive(self) -> list[Job]:
        """Jobs that are not over, in the order in which their turns come."""

        def turn(job: Job) -> tuple[bool, bool, int]:
            return not job.begun, not job.record.first, job.place

        return sorted((job for job in self._jobs.values() if not job.over), key=turn)

    def _waiting(self) -> list[Job]:
        """Jobs to be done by this room's own thread."""
        return [] if self.apart else [job for job in self._alive() if not job.begun]

    def _done(self, kind: str) -> list[tuple[Record, Event]]:
        """The last jobs of a kind that came to their end, with their last events, the newest first."""
        newest = f"number IN (SELECT number FROM jobs WHERE kind = ? AND state = ? ORDER BY number DESC LIMIT {RECENT})"
        over = [(record, record.last) for record in self.records.where(newest, kind, OVER)]
        return [(record, last) for record, last in reversed(over) if last and last["type"] == "done"]

    def _usual(self, kind: str) -> float | None:
        """Seconds that a job of this kind takes here."""
        took = [last["job_seconds"] for _, last in self._done(kind) if "job_seconds" in last]
        return median(took) if took else None

    def _keep(self, job: Job) -> None:
        self._jobs[job.id] = job
        over = [id for id, one in self._jobs.items() if one.over and one is not job]
        for id in over[: max(0, len(over) - IN_MEMORY)]:
            del self._jobs[id]

    def _copied(self, job_id: str) -> Job | None:
        """A job that only the second folder has, as after a restart with an empty disk."""
        if self.settings.copies is None or not (found := keeping.copied(self.settings.copies / job_id)):
            return None
        record, events = found
        job = Job(record, self.settings.copies / job_id, self.records, events)
        self._keep(job)
        return job

    def _take_up(self) -> None:
        """Finds what the last server left: jobs that waited go on waiting, one that ran was interrupted."""
        for record in list(self.records.where("state != ?", OVER)):
            job = Job(record, self.folder / "jobs" / record.id, self.records)
            job.place = next(self._places)
            if record.state == RUNNING:
                job.interrupted()
            elif self.apart:
                said = "The server was started anew while this waited for a GPU; press the button again."
                job.add({"type": "error", "message": said, "resumable": job.again}, over=True)
            else:
                try:
                    self._allow_all(job)
                except SpecError as error:  # the host has changed its mind
                    last: Event = {"type": "error", "message": str(error), "resumable": job.again}
                    job.add(last, over=True)
            self._keep(job)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (waiting := self._waiting()) and not self._closed:
                    if not self._changed.wait(TIDY):
                        break
                if self._closed:
                    return
            try:  # whatever happens, the next job is not to wait for ever
                if not waiting:
                    self.tidy()
                elif waiting[0].begin():
                    self._do_apart(waiting[0])
            except Exception:
                log.exception("job %s", waiting[0].id if waiting else "")

    def _do_apart(self, job: Job) -> None:
        """Runs a job in a thread of its own: what oneDNN keeps for it, as much as its largest batch took, ends with it."""

        def do() -> None:
            try:
                self._do(job)
            except Exception:
                log.exception("job %s", job.id)

        thread = threading.Thread(target=do, daemon=True, name="job")
        thread.start()
        thread.join()

    def _do(self, job: Job, longest: float = math.inf) -> None:
        """Runs a job for at most so many seconds, and cleans up after it."""
        try:
            job.run(min(longest, self.settings.seconds))
        except Exception as error:  # even its own end failed
            job.broken(error)
            raise
        if self.settings.copies and job.events[-1]["type"] == "done":
            keeping.copy(job, self.settings.copies)
        self.tidy()


def _told(job: Job) -> float:
    """Seconds of training that a run has left, as it says itself; 0 before its first step."""
    step = last_of(job.events, "step")
    return step["eta_seconds"] if step and job.begun else 0.0


def _claimed(file: Path) -> TextIO | None:
    """The open `file` that nobody else has claimed; None where another process has."""
    claim = file.open("a")
    try:
        import fcntl

        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no such locks: there a data folder is not shared
        pass
    except OSError as error:
        claim.close()
        if isinstance(error, BlockingIOError):
            return None
        raise  # a file system without locks
    return claim


@lru_cache(maxsize=1)
def _here() -> Room:
    return Room(host.settings())


_first = threading.Lock()


def here() -> Room:
    """This server's room. Raises SpecError for a host's setting that cannot be."""
    with _first:
        return _here()
