"""Somebody who opens the page and clicks on the Memory tab, and how long that took each time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..base.models import MODELS
from ..methods import METHODS
from ..spec import Json
from .server import Server
from .visitors import CONNECTIONS, FAILURES, Connection, Page

PAUSE = 4.0
"""Seconds from a visitor's click to their next one, on average: each time between half and one and a half of it."""


@dataclass
class Times:
    """How long something took each time, in seconds; and what went wrong instead."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        except FAILURES as error:
            self.errors.append(f"{type(error).__name__}: {error}"[:200])
        else:
            self.seconds.append(time.perf_counter() - began)

    def add(self, other: Times) -> None:
        self.seconds += other.seconds
        self.errors += other.errors

    def summary(self) -> Json:
        """Median, p95 and most in seconds, None of nothing; how many, and how many errors, with the first of them."""
        s = sorted(self.seconds)
        found = {
            "median": statistics.median(s) if s else None,
            "p95": s[min(len(s) - 1, int(0.95 * len(s)))] if s else None,
            "most": s[-1] if s else None,
        }
        return found | {"count": len(s), "errors": len(self.errors), "first_error": next(iter(self.errors), None)}


@dataclass
class Crowd:
    """What the visitors of one app met, over all rounds of one size and pattern."""

    arrivals: Times = field(default_factory=Times)
    clicks: Times = field(default_factory=Times)
    events: Times = field(default_factory=Times)
    traces: Times = field(default_factory=Times)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the app was at rest, and bytes that its processes hold."""
    processor: float = 0.0
    """Seconds that the app's processes computed."""
    generator: float = 0.0
    """Seconds that this process computed for it."""


class Visitor:
    """Somebody with a browser."""

    def __init__(self, server: Server, page: Page, crowd: Crowd, draw: random.Random) -> None:
        self.page, self.crowd, self.draw = page, crowd, draw
        self.connections = [Connection(server.port) for _ in range(CONNECTIONS)]
        self.session = secrets.token_hex(6)
        self.asked, self.state, self.kept = 0, dict[str, str](), dict[str, str]()

    async def visit(self, wait: float, seconds: float) -> None:
        """Arrives after `wait` seconds, clicks for `seconds`, and leaves."""
        await asyncio.sleep(wait)
        with self.crowd.arrivals.one():
            await self.arrive()
        event = asyncio.create_task(self.own_events())
        end = time.perf_counter() + seconds
        await asyncio.sleep(self.draw.uniform(0, PAUSE))
        while time.perf_counter() < end:
            with self.crowd.clicks.one():
                await self.click()
            await asyncio.sleep(self.draw.uniform(PAUSE / 2, 1.5 * PAUSE))
        await event
        self.leave()

    async def click(self) -> None:
        self.state |= self.draw.choice(CLICKS)(self.draw)
        await self.ask("answer")

    async def trace(self) -> None:
        """Asks for exact answers, one after the other, each of settings that nobody has asked for."""
        while True:
            self.state = {name: value for click in CLICKS for name, value in click(self.draw).items()}
            with self.crowd.traces.one():
                await self.ask("exact")
            await asyncio.sleep(0.05)

    async def arrive(self) -> None:
        """Fetches the page, then its files over all connections, and asks the question that a page asks as it opens."""
        await self.get(self.connections[0], "/")
        files = iter(self.page.files)

        async def fetch(connection: Connection) -> None:
            for path in files:
                await self.get(connection, path)

        await asyncio.gather(*map(fetch, self.connections))
        await self.ask("exact" if self.page.has_exact else "answer")

    async def own_events(self) -> None:
        """What the page's timers send and hear a second after it is there."""
        await asyncio.sleep(1)
        for event in self.page.events:
            with self.crowd.events.one():
                body = {**json.loads(event), "session_hash": self.session}
                await self.post("/gradio_api/queue/join?", body, self.connections[1])
                await self.get(self.connections[1], f"/gradio_api/queue/data?session_hash={self.session}")

    async def ask(self, function: str) -> None:
        """Asks one of the page's server functions. Raises ValueError where the answer is not one to this question."""
        self.asked += 1
        question = {"number": self.asked, "tab": "memory", "state": self.state, "kept": self.kept, "open": []}
        asked = {"data": question, "component_id": self.page.carrier, "fn_name": function, "session_hash": self.session}
        answer = json.loads(await self.post("/gradio_api/component_server/", asked, self.connections[0]))
        if answer.get("number") != self.asked or (self.page.has_exact and not answer.get("show")):
            raise ValueError(f"not an answer to question {self.asked}: {str(answer)[:100]}")
        if "visitor" in answer:  # the token of a browser that was new
            self.kept = {"visitor": answer["visitor"]}

    async def get(self, connection: Connection, path: str) -> None:
        status, body = await connection.ask("GET", path)
        if status != 200 or not body:
            raise ValueError(f"status {status} of {path}")

    async def post(self, path: str, content: Json, connection: Connection) -> bytes:
        status, body = await connection.ask("POST", path, json.dumps(content).encode())
        if status != 200:
            raise ValueError(f"status {status} of {path}")
        return body

    def leave(self) -> None:
        for connection in self.connections:
            connection.close()


CAUSAL = [key for key, model in MODELS.items() if model.is_causal]
RANKED = [key for key, method in METHODS.items() if "rank" in method.settings]
CLICKS = (
    lambda draw: {"model": draw.choice(CAUSAL)},
    lambda draw: {"method": draw.choice(RANKED)},
    lambda draw: {"rank": str(draw.randint(1, 128))},
    lambda draw: {"batch_size": str(draw.randint(1, 32))},
    lambda draw: {"sequence_length": str(16 * draw.randint(1, 256))},
)
"""The settings that one click changes, drawn at random."""
