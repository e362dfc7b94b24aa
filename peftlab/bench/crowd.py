"""A room full of visitors who train at once: what each of them sees, and what becomes of each run."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..room.records import Record, Records
from ..run import Event
from ..spec import Json
from . import Say, small
from .browser import Browser
from .clicks import CLICKS, Times
from .server import Server
from .visitors import FAILURES, Page

ARRIVING = 10.0
"""Seconds within which all of them press Train."""
FEWEST = 16
"""Steps of the first visitor's run. Each has one more than the one before, by which its picture is told from any other."""


class Trainee:
    """A visitor who trains, and may open the page anew or cancel in between."""

    def __init__(self, number: int, browser: Browser) -> None:
        self.number, self.browser = number, browser
        self.reloads = number % 2 == 0
        self.cancels = "waiting" if number % 10 == 0 else "running" if number % 10 == 5 else ""
        """What its run does when it is cancelled; empty for one that is left to its end."""
        self.messages = 0
        self.shown: list[tuple[int, list[float]]] = []
        """Of the messages that show as much: the steps of the run in them, and the losses in the chart."""
        self.errors: list[str] = []

    async def visit(self, wait: float, draw: random.Random) -> None:
        """Arrives after `wait` seconds and stays until the run is over."""
        await asyncio.sleep(wait)
        try:
            await self.browser.open()
            await self.browser.press("go")
            if self.reloads:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._watch(), draw.uniform(0.5, ARRIVING))
                await self._reload()
            if self.cancels == "waiting":
                await self.browser.press("cancel")
            await self._watch()
        except FAILURES as error:
            self.errors.append(f"visitor {self.number}: {type(error).__name__}: {error}"[:300])
        finally:
            self.browser.close()

    async def _reload(self) -> None:
        answer = await self.browser.open()
        run = answer.get("follow")
        if run not in (None, f"live/{self.browser.kept['run']}"):
            self.errors.append(f"visitor {self.number}: the page follows {run} after it was opened anew")

    async def _watch(self) -> None:
        """Follows the run to its end. Somebody who cancels while it runs does so at the first step that is seen."""
        async for message in self.browser.follow():
            self.messages += 1
            self._note(message)
            if self.cancels == "running" and self.shown:
                self.cancels = "asked"
                await self.browser.press("cancel")

    def _note(self, message: Json) -> None:
        bar = re.search(r"step \d+ of (\d+)", (message.get("live.bar") or {}).get("value") or "")
        chart: Any = (message.get("live.loss") or {}).get("value")
        if bar:  # before it begins, a recorded run is shown
            losses = [float(y) for y in chart["light"]["data"][0]["y"]] if chart else []
            self.shown.append((int(bar[1]), losses))

    def foreign(self, own: Sequence[float], steps: int) -> int:
        """How many messages show something of another run than its own, whose losses and number of steps are given."""
        wrong = sum(of != steps or losses != list(own)[: len(losses)] for of, losses in self.shown)
        return wrong + len(self.browser.heard - {self.browser.kept.get("run", "")})


async def _click(browser: Browser, clicks: Times, draw: random.Random) -> None:
    """Another visitor changes a setting on the Memory tab each second."""
    browser.state = {}
    while True:
        began = time.perf_counter()
        browser.state |= draw.choice(CLICKS)(draw)
        with clicks.one():
            await browser.ask("memory")
        await asyncio.sleep(max(0.0, 1 - (time.perf_counter() - began)))


async def _fill(server: Server, page: Page, trainees: Sequence[Trainee], clicks: Times) -> None:
    draw = random.Random(0)
    beside = asyncio.create_task(_click(Browser(server.port, page), clicks, random.Random(1)))
    waits = [draw.uniform(0, ARRIVING * 0.9) for _ in trainees]
    try:
        await asyncio.gather(
            *(one.visit(wait, random.Random(one.number)) for one, wait in zip(trainees, waits, strict=True))
        )
    finally:
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)


def visitors(count: int, say: Say) -> Json:
    """So many visitors train at one server, and the runs that came to their end are trained again, each alone."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small.make(folder / "bases", 1, small.QUICK)
        clicks = Times()
        began = time.perf_counter()
        trainees = asyncio.run(_served(folder, count, clicks))
        spent = time.perf_counter() - began
        say(f"{count} visitors: over after {spent:.0f} s; each run is trained again alone")
        found = _compared(folder, trainees)
    row = {
        "visitors": count,
        "arriving_seconds": ARRIVING,
        "seconds": spent,
        **found,
        "memory_clicks": clicks.summary(),
    }
    say(
        f"{row['finished']} of {count} runs came to their end and {row['cancelled']} were cancelled; {row['different']} differ "
        f"from the run alone; {row['foreign_messages']} of {row['messages']} messages were of another run; "
        f"95% of {row['memory_clicks']['count']} clicks within {row['memory_clicks']['p95'] or 0:.2f} s; {row['errors']} errors"
    )
    return row


async def _served(folder: Path, count: int, clicks: Times) -> list[Trainee]:
    server = Server(small.APP, folder / "app.log", str(folder / "bases"), PEFTLAB_DATA=str(folder / "data"))
    try:
        page = await server.ready()
        settings = [{"method": "lora", "rank": 4, "steps": FEWEST + n, "seed": n} for n in range(count)]
        trainees = [Trainee(n, Browser(server.port, page, **one)) for n, one in enumerate(settings)]
        await _fill(server, page, trainees, clicks)
        return trainees
    finally:
        server.end()


def losses(events: Sequence[Event]) -> list[float]:
    """Of a run's steps, in their order."""
    return [event["loss"] for event in events if event["type"] == "step"]


def _compared(folder: Path, trainees: Sequence[Trainee]) -> Json:
    """What came of the visitors' runs, beside the same runs alone."""
    records = Records(folder / "data" / "jobs.sqlite")
    runs = {one.number: records.find(one.browser.kept.get("run", "")) for one in trainees}
    events = {n: [event for _, event in records.events(run.id)] if run else [] for n, run in runs.items()}
    records.close()
    ended = {n: run for n, run in runs.items() if run and run.last and run.last["type"] == "done"}
    again = small.alone(folder / "bases", [run.arguments["spec"] for run in ended.values()], folder / "alone")
    whole = dict(zip(ended, again, strict=True))
    apart = {
        n: small.difference(folder / "data" / "jobs" / run.id / "adapter", folder / "alone" / str(place) / "adapter")
        for place, (n, run) in enumerate(ended.items())
    }
    foreign = [one.foreign(losses(events[one.number]), FEWEST + one.number) for one in trainees]
    errors = [error for one in trainees for error in one.errors]
    return {
        "reloaded": sum(one.reloads for one in trainees),
        "cancelled": sum(map(_dropped, runs.values())),
        "finished": len(ended),
        "different": sum(bool(d) for d in apart.values()) + sum(losses(whole[n]) != losses(events[n]) for n in ended),
        "largest_difference": max(apart.values(), default=0.0),
        "messages": sum(one.messages for one in trainees),
        "foreign_messages": sum(foreign),
        "errors": len(errors),
        "first_error": next(iter(errors), None),
    }


def _dropped(run: Record | None) -> bool:
    """Whether a run was cancelled, while it waited or later."""
    said = run.last.get("message", "") if run and run.last else ""
    return said.startswith(("Cancelled", "Stopped while it waited"))
