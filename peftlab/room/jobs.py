"""A job: a run, a race or a scoring, with a log of events that outlives the page and the server."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from pathlib import Path
from typing import cast

from .. import adapters
from ..data import tasks
from ..errors import Curable, Interrupted, PeftlabError, RunError, SpecError, plain
from ..resolve import resolve
from ..run import CHECKPOINT, LEAVE, STOP, Event
from ..run.events import progress
from ..spec import Json, Resolved, RunSpec
from .records import OVER, RUNNING, WAITING, Record, Records

log = logging.getLogger(__name__)
CANCEL = "cancel"
"""A file of this name in a job's folder: nothing is to be kept of what it learns from now on."""
BEFORE, LEARNED = "before", ("adapter", CHECKPOINT)
"""A folder in that of a run which goes on: what it had learned until then, by the same names."""
Doing = Callable[[Json, Path, bool], Iterator[Event]]
"""Does a job of some kind by its arguments in its folder, from the beginning or, where it is true, from where it was."""

TRAINS = ("train", "race")
"""The kinds that train: a host may bound them, and one that was interrupted goes on. Others are short, and begin anew."""


def _train(arguments: Json, folder: Path, again: bool) -> Iterator[Event]:
    from ..run import train

    return train(resolved(arguments["spec"]), folder, resume=again)


def _race(arguments: Json, folder: Path, again: bool) -> Iterator[Event]:
    from ..race import Line, Racer, race

    racers = [Racer(name, resolved(spec)) for name, spec in arguments["racers"]]
    known = [Line(**line) for line in arguments.get("known", ())]
    return race(racers, folder, arguments["seeds"], arguments["seconds"], known=known)


def _score(arguments: Json, folder: Path, again: bool) -> Iterator[Event]:
    from ..compare import on_task

    adapter = adapters.read(arguments["folder"])
    work = on_task([adapter], tasks.find(arguments["spec"]["task"]))
    report = yield from progress(work, "scoring", (folder / STOP).exists)
    if report is None:
        raise RunError("this was stopped before its end, and nothing was measured")
    yield {"type": "done", "report": report.to_dict()}


def resolved(spec: Json) -> Resolved:
    """The settings of a run out of the log."""
    return resolve(RunSpec.from_dict(spec))


WORK: dict[str, Doing] = {"train": _train, "race": _race, "score": _score}
"""What each kind of job does. The page puts in its place the same work where a shared GPU does it."""


class Job:
    """A job that waits, is under way or over. Its events stay, so that a page that comes back sees all of them."""

    place = 0
    """Its turn among those that wait."""

    def __init__(self, record: Record, folder: Path, records: Records, events: list[Event] | None = None) -> None:
        """Its `events` are in the log, unless they are given: then it is a copy, which stays as it is."""
        self.is_copy = events is not None
        self.record, self.folder = record, folder
        self.id, self.kind, self.arguments, self.owner = record.id, record.kind, record.arguments, record.owner
        self._records, self._changing = records, threading.RLock()
        self._state = record.state
        self._cancelled = False
        told = records.events(record.id) if events is None else list(enumerate(events))
        self.events: list[Event] = [event for _, event in told]
        self._next = told[-1][0] + 1 if told else 0
        self._began: float | None = None

    @cached_property
    def spec(self) -> Resolved:
        """What is trained; a race's first racer."""
        return resolved(self.arguments["spec"])

    @property
    def over(self) -> bool:
        return self._state == OVER

    @property
    def begun(self) -> bool:
        return self._state != WAITING

    @property
    def again(self) -> bool:
        """Whether something was done already, from which it is to go on. The log knows, so that no restart forgets it."""
        return any(event["type"] != "queued" for event in self.events)

    def add(self, event: Event, over: bool = False) -> None:
        """Appends an event; it is the last one where the job is `over`. One that only tells of progress is not stored."""
        with self._changing:
            self.events.append(event)
            number, self._next = self._next, self._next + 1
            with _tolerant():
                if "progress" not in (event["type"], event.get("event", {}).get("type")):
                    self._records.say(self.id, number, event)
            if over:  # a job that was refused leaves the stop file, and the folder where it was made for that alone
                with contextlib.suppress(OSError):
                    (self.folder / STOP).unlink(missing_ok=True)
                    self.folder.rmdir()
                self.put(OVER, event)

    def put(self, state: str, last: Event | None = None) -> None:
        with self._changing:
            self._state = state
            with _tolerant():
                self._records.put(self.id, state, last)

    def begin(self) -> bool:
        """Whether it still waits; then it is under way from now on. Somebody may stop it in this very moment."""
        with self._changing:
            if self._state == WAITING:
                self._cancelled = False
                self.put(RUNNING)
                return True
            return False

    def stop(self) -> None:
        """Asks the run to end after the step in progress; what it learned is kept. A job that waits is over at once."""
        with self._changing:
            if self._state == WAITING and self.again:
                said = "Stopped while it waited to go on: what it had learned is kept."
                self.add({"type": "error", "message": said, "resumable": True}, over=True)
            elif self._state == WAITING:
                self.add({"type": "error", "message": "Stopped while it waited: nothing was learned."}, over=True)
            elif not self.over:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / STOP).touch()

    def cancel(self) -> None:
        """Asks the job to end, and drops what it has learned."""
        with self._changing:
            if self._state == RUNNING:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / CANCEL).touch()
                self._cancelled = True
                self.stop()
            elif self._state == WAITING:
                self.add(self._dropped(), over=True)

    @property
    def stopping(self) -> bool:
        """Whether the run was asked to stop and has not ended yet."""
        return not self.over and (self.folder / STOP).exists()

    @property
    def readable(self) -> bool:
        """Whether this version knows the settings that it was started with; another one may have begun it."""
        try:
            return bool(self.spec)
        except SpecError:
            return False

    @property
    def cancelling(self) -> bool:
        """Whether it was cancelled and has not ended yet."""
        return not self.over and self._cancelled

    @property
    def resumable(self) -> bool:
        """Whether it ended early, though it did not fail by itself, and can go on from there."""
        last = self.events[-1] if self.over and self.events and not self.is_copy else None
        return last is not None and bool(last.get("resumable") or (last["type"] == "done" and last.get("stopped")))

    @property
    def seconds(self) -> float:
        """For how long it has been under way."""
        return time.monotonic() - self._began if self._began is not None and not self.over else 0.0

    def leave(self) -> None:
        """Asks a run to end at once, as the server does, and to go on another time."""
        with self._changing:
            if self._state == RUNNING and self.kind == "train":
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / LEAVE).touch()

    def interrupted(self) -> None:
        """The server that did it is no more."""
        self.add(self._interruption(), over=True)

    def _interruption(self) -> Event:
        """The last event of a job whose server has ended."""
        steps = [event["step"] for event in self.events if event["type"] == "step"]
        far = f"after step {steps[-1]}" if steps else "before the first step"
        said = f"The server ended while this ran, {far}. Resume goes on from there."
        last: Event = {"type": "error", "message": said, "resumable": True}
        if self.kind not in TRAINS:
            last = {"type": "error", "message": "The server ended while this ran; start it again."}
        return self._dropped() if (self.folder / CANCEL).exists() else last

    def run(self, longest: float) -> None:
        """Does the job, in at most so many seconds: then it is stopped, and keeps what it has learned."""
        last: Event = {"type": "error", "message": "the run ended without a word"}
        self._began, limit = time.monotonic(), ""
        try:
            (self.folder / LEAVE).unlink(missing_ok=True)
            self._set_aside()
            work = cast("Generator[Event]", WORK[self.kind](self._asked(), self.folder, self.again))
            with contextlib.closing(work):
                for number, event in enumerate(work):
                    if not number:  # before it, a shared GPU lets it wait
                        self._began = time.monotonic()
                    if (self.folder / CANCEL).exists():
                        break
                    if not limit and self.seconds > longest:
                        limit = f"It ended after {longest:g} seconds, which is the most that a run may take here."
                        self.stop()
                    if event["type"] == "done":
                        last = {**event, "job_seconds": self.seconds}
                        if limit:
                            last["message"] = limit
                    else:
                        self.add(event)
            if last["type"] == "error" and (self.folder / LEAVE).exists():
                last = self._interruption()
        except Exception as error:
            log.info("job %s: %s", self.id, error)
            last = self._failed(error)
        with self._changing:  # nobody may cancel it between the look and the end
            try:
                if (self.folder / CANCEL).exists():
                    last = self._dropped()
                shutil.rmtree(self.folder / BEFORE, ignore_errors=True)
                (self.folder / LEAVE).unlink(missing_ok=True)
            except OSError as error:
                last = self._failed(error)
            self.add(last, over=True)  # once the trainer has cleaned up

    def broken(self, error: Exception) -> None:
        """Puts an end to a job whose own end has failed; nothing of this is written down."""
        with self._changing:
            self.events.append({"type": "error", "message": plain(error)})
            self._state = OVER

    def _set_aside(self) -> None:
        """Before a run goes on: what is kept of it so far, to which it returns when it is cancelled."""
        if self.kind == "train" and self.again:
            before = self.folder / BEFORE
            shutil.rmtree(before, ignore_errors=True)
            for name in filter(lambda name: (self.folder / name).exists(), LEARNED):
                for file in (self.folder / name).rglob("*") if (self.folder / name).is_dir() else (self.folder / name,):
                    put = before / file.relative_to(self.folder)
                    put.parent.mkdir(parents=True, exist_ok=True)
                    if file.is_file():
                        _linked(file, put)

    def _dropped(self) -> Event:
        """Drops what was learned since the job began or went on; the last event of one that was cancelled."""
        earlier = next((event for event in reversed(self.events) if event["type"] in ("done", "error")), None)
        if earlier is None or self.kind != "train":
            shutil.rmtree(self.folder, ignore_errors=True)
            return {"type": "error", "message": "Cancelled: nothing is kept.", "cancelled": True}
        if (self.folder / BEFORE).exists():
            for name in LEARNED:
                gone, kept = self.folder / name, self.folder / BEFORE / name
                shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
                if kept.exists():
                    kept.replace(gone)
        (self.folder / CANCEL).unlink(missing_ok=True)
        said: Event = {"type": earlier["type"], "message": "Cancelled: what it had learned before it went on is kept."}
        return {**earlier, **said, "as_before": True}

    def _failed(self, error: Exception) -> Event:
        """The last event of a job that failed: why, what cures it, what is kept of it, and whether it can go on."""
        if isinstance(error, Curable):
            return {"type": "error", "message": str(error), "settings": dict(error.settings), "change": error.change}
        if isinstance(error, Interrupted):
            said = f"{plain(error)[:1].upper()}{plain(error)[1:]}."
            return {"type": "error", "message": said, "resumable": self.kind in TRAINS}
        if isinstance(error, PeftlabError) or not any(event["type"] == "step" for event in self.events):
            return {"type": "error", "message": plain(error)}  # it says by itself what is kept, or there is nothing
        kept = "The adapter that was last saved is kept" if (self.folder / "adapter").exists() else "No adapter is kept"
        if not (self.folder / CHECKPOINT).exists():
            return {"type": "error", "message": f"{plain(error)}. {kept}."}
        return {"type": "error", "message": f"{plain(error)}. {kept}. Resume goes on from there.", "resumable": True}

    def _asked(self) -> Json:
        """The arguments; those of a race that goes on have the lines that are known."""
        if not self.again or self.kind != "race":
            return self.arguments
        return self.arguments | {"known": [event["line"] for event in self.events if event["type"] == "line"]}


def _linked(file: Path, to: Path) -> None:
    """The same file under another name, which stays as it is when this one is replaced; a copy where links cannot be made."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)


@contextlib.contextmanager
def _tolerant() -> Iterator[None]:
    """A job goes on though its log cannot be written: then it is known until the server ends."""
    try:
        yield
    except sqlite3.Error as error:
        log.warning("the log of jobs cannot be written (%s): runs are forgotten when the server ends", error)
