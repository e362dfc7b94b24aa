"""A server that is killed at random steps and started again: what is found of its runs, and how they go on."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..room.records import OVER, Record, Records
from ..run import Event
from ..run.events import standing
from ..spec import Json
from . import Say, small
from .browser import Browser
from .server import Server
from .visitors import FAILURES, Page

METHODS = ("lora", "full", "adalora", "prompt")
"""Of the runs in turn. AdaLoRA keeps more than its parameters, and full fine-tuning all of them."""
STEPS = 240
"""Of each run: a few seconds, so that some are killed before their first checkpoint and some after."""
PATIENCE = 120.0
"""Seconds after which a run that does not come to its end counts as lost."""
Found = TypeVar("Found")


@dataclass
class Killed:
    """A run whose server was killed."""

    run: str
    method: str
    at: int
    """The last step that was in the log before the kill."""
    resumed: int = 0
    """The step that it went on from; 0 for the beginning."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """All that the log has, from before and after the kill, with their steps."""
    kept: list[float] = field(default_factory=list)
    """Those of the run as it counts in the end."""


class Data:
    """A server's data folder, looked at from outside while the server writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, run: str) -> Record | None:
        return self._read(lambda records: records.find(run))

    def events(self, run: str) -> list[Event]:
        return self._read(lambda records: [event for _, event in records.events(run)])

    def finished(self) -> dict[str, tuple[int, bytes]]:
        """The runs that came to their end: how many events each has, and its adapter."""

        def of(records: Records) -> dict[str, tuple[int, bytes]]:
            over = [r for r in records.where("state = ?", OVER) if r.last and r.last["type"] == "done"]
            return {r.id: (len(records.events(r.id)), self.adapter(r.id)) for r in over}

        return self._read(of)

    def adapter(self, run: str) -> bytes:
        from ..adapters import TENSORS

        file = self.folder / "jobs" / run / "adapter" / TENSORS
        return file.read_bytes() if file.exists() else b""

    def _read(self, of: Callable[[Records], Found]) -> Found:
        records = Records(self.folder / "jobs.sqlite")
        try:
            return of(records)
        finally:
            records.close()


def steps_of(events: list[Event]) -> list[Event]:
    return [event for event in events if event["type"] == "step"]


class Service:
    """A server over one data folder, which is killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, Data(folder / "data")
        self.server: Server | None = None
        self.page: Page | None = None
        self.restarts: list[float] = []
        """Seconds until it answered, each time."""

    async def start(self) -> None:
        began = time.perf_counter()
        self.server = Server(
            small.APP, self.folder / "app.log", str(self.folder / "bases"), PEFTLAB_DATA=str(self.data.folder)
        )
        self.page = self.page or await self.server.ready(rested=False)
        await self.server.answers()
        self.restarts.append(time.perf_counter() - began)

    def browser(self, **state: object) -> Browser:
        assert self.server and self.page
        return Browser(self.server.port, self.page, **state)

    async def until(self, run: str, step: int) -> int:
        """Waits for a step of a run, and returns the last one that is known then."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            seen = steps_of(self.data.events(run))
            if seen and seen[-1]["step"] >= step:
                return int(seen[-1]["step"])
            record = self.data.record(run)
            if record and record.state == OVER:
                return int(seen[-1]["step"]) if seen else 0
            await asyncio.sleep(0.02)
        raise ValueError(f"{run} did not come to step {step}")

    async def over(self, run: str) -> Record:
        """A run once it is over."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            record = self.data.record(run)
            if record and record.state == OVER:
                return record
            await asyncio.sleep(0.05)
        raise ValueError(f"{run} is not over after {PATIENCE:g} seconds")


async def _one(service: Service, number: int, draw: random.Random) -> tuple[Killed, int]:
    """Starts a run, kills the server at a random step, and has a new one resume it; also how much that was finished is lost."""
    method = METHODS[number % len(METHODS)]
    person = service.browser(method=method, steps=STEPS, seed=number % len(METHODS))
    await person.open()
    run = await person.press("go")
    at = await service.until(run, draw.randint(1, STEPS))
    await asyncio.sleep(draw.uniform(0, 0.05))  # in the midst of a step, or of what is written after it
    assert service.server
    finished = service.data.finished()
    service.server.kill()
    person.close()
    await service.start()
    after = service.data.finished()
    lost = sum(after.get(one) != kept for one, kept in finished.items())
    again = service.browser(**person.state)
    again.kept = person.kept
    await again.open()
    record = service.data.record(run)
    if record and record.last and record.last.get("resumable"):
        await again.press("resume")
    await service.over(run)
    again.close()
    return _told(service.data.events(run), run, method, at), lost


def _told(events: list[Event], run: str, method: str, at: int) -> Killed:
    on = [event["step"] for event in events if event["type"] == "resumed"]
    found = Killed(run, method, at, on[-1] if on else 0)
    found.losses = [(event["step"], event["loss"]) for event in steps_of(events)]
    found.kept = [event["loss"] for event in steps_of(list(standing(events)))]
    return found


async def _killed(folder: Path, count: int, say: Say) -> tuple[list[Killed], list[str], int, list[float]]:
    service, draw = Service(folder), random.Random(0)
    found: list[Killed] = []
    errors: list[str] = []
    lost = 0
    await service.start()
    try:
        for number in range(count):
            try:
                one, gone = await _one(service, number, draw)
            except FAILURES as error:
                errors.append(f"kill {number}: {type(error).__name__}: {error}"[:300])
                continue
            found.append(one)
            lost += gone
            say(f"kill {number + 1}: {one.method} after step {one.at}, gone on from step {one.resumed}")
    finally:
        if service.server:
            service.server.end()
    return found, errors, lost, service.restarts


def kills(count: int, say: Say) -> Json:
    """A server is killed so many times, each time while a run is under way, and the next one resumes the run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small.make(folder / "bases", 1, small.QUICK)
        found, errors, lost, restarts = asyncio.run(_killed(folder, count, say))
        return _compared(folder, found) | {
            "kills": count, "steps": STEPS, "finished_and_lost": lost, "errors": len(errors),
            "first_error": next(iter(errors), None), "restart_seconds": max(restarts, default=None),
        }  # fmt: skip


def _compared(folder: Path, found: list[Killed]) -> Json:
    """The runs beside those that nobody interrupted, of which each method has one."""
    data = Data(folder / "data")
    firsts = {one.method: one for one in reversed(found)}
    records = {method: data.record(one.run) for method, one in firsts.items()}
    specs = {method: record.arguments["spec"] for method, record in records.items() if record}
    again = small.alone(folder / "bases", list(specs.values()), folder / "alone")
    whole = {method: [e["loss"] for e in steps_of(events)] for method, events in zip(specs, again, strict=True)}
    rows: list[Json] = []
    for one in found:
        place = list(specs).index(one.method)
        adapter = small.difference(
            data.folder / "jobs" / one.run / "adapter", folder / "alone" / str(place) / "adapter"
        )
        apart = [abs(loss - whole[one.method][step - 1]) for step, loss in one.losses]
        rows.append(
            {"method": one.method, "killed_after": one.at, "resumed_at": one.resumed, "complete": len(one.kept) == STEPS,
             "loss_difference": max(apart, default=0.0), "adapter_difference": adapter}
        )  # fmt: skip
    return {
        "complete": sum(row["complete"] for row in rows),
        "largest_loss_difference": max((row["loss_difference"] for row in rows), default=None),
        "largest_adapter_difference": max((row["adapter_difference"] for row in rows), default=None),
        "rows": rows,
    }
