"""What visitors wait for: simulated ones, over HTTP on this machine, at the page and at a bare Gradio app in turn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..base.models import MODELS
from ..measured import provenance
from ..methods import METHODS
from ..places import ROOT
from ..spec import Json
from . import Say, held, write
from .server import Server
from .visitors import CONNECTIONS, FAILURES, Connection, Page

APPS = {"bare": ROOT / "demos" / "page" / "echo.py", "peftlab": ROOT / "app.py"}
VISITORS = (50, 200)
SECONDS = 24.0
ROUNDS = 2
PAUSE = 4.0
"""Seconds from a visitor's click to their next one, on average: each time between half and one and a half of it."""
CLICKS_ALONE, CLICKS_EACH, ARRIVALS_ALONE = 400, 4, 20
"""So many clicks and arrivals, one after the other, tell what one costs the server; so many clicks are one visitor's."""
SPREAD = 20.0
"""Seconds over which visitors arrive where they do not come all at once."""
ARRIVING = {"at once": 0.0, "spread": SPREAD}
"""How visitors arrive, and over how many seconds."""


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


async def rush(
    server: Server, page: Page, crowd: Crowd, visitors: int, spread: float, seconds: float, seed: str
) -> None:
    """Visitors arrive over `spread` seconds and click for `seconds` each; one more asks for traces where the app has them.

    Both apps get the visitors of one `seed`. Another rush has other ones: else an app that keeps answers would have these.
    """
    draw = random.Random(seed)
    people = [Visitor(server, page, crowd, random.Random(draw.random())) for _ in range(visitors)]
    beside = [asyncio.create_task(_remember(server, crowd))]
    tracer = Visitor(server, page, crowd, random.Random(draw.random()))
    if page.has_exact:
        beside.append(asyncio.create_task(tracer.trace()))
    before, own = server.processor(), time.process_time()
    try:
        await asyncio.gather(*(one.visit(draw.uniform(0, spread), seconds) for one in people))
    finally:
        crowd.generator += time.process_time() - own
        crowd.processor += server.processor() - before
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        for one in [*people, tracer]:
            one.leave()


async def alone(server: Server, page: Page) -> Json:
    """What a click and an arrival cost the process that answers, in seconds of a processor, one after the other.

    Unlike how long they take, this hardly depends on what else the machine does.
    """
    draw = random.Random("alone")
    before = server.own_processor()
    for _ in range(CLICKS_ALONE // CLICKS_EACH):
        one = Visitor(server, page, Crowd(), random.Random(draw.random()))
        for _ in range(CLICKS_EACH):
            await one.click()
        one.leave()
    between = server.own_processor()
    for _ in range(ARRIVALS_ALONE):
        one = Visitor(server, page, Crowd(), draw)
        await one.arrive()
        one.leave()
    after = server.own_processor()
    return {"click": (between - before) / CLICKS_ALONE, "arrival": (after - between) / ARRIVALS_ALONE}


async def _remember(server: Server, crowd: Crowd) -> None:
    while True:
        crowd.memory.append((time.monotonic() - server.began, server.memory()))
        await asyncio.sleep(1)


def record_serve(
    out: Path, say: Say, visitors: Sequence[int] = (), seconds: float = SECONDS, rounds: int = ROUNDS,
    arriving: Sequence[str] = (),
) -> Json:  # fmt: skip
    """Writes to `out` how long arrivals and clicks took at both apps, in seconds, and their memory in bytes.

    Raises PeftlabError when an app does not start.
    """
    spreads = {how: min(spread, seconds) for how, spread in ARRIVING.items() if how in (arriving or ARRIVING)}
    return asyncio.run(_record(out, say, visitors or VISITORS, seconds, rounds, spreads))


async def _record(
    out: Path, say: Say, visitors: Sequence[int], seconds: float, rounds: int, spreads: Mapping[str, float]
) -> Json:
    about = {"seconds": seconds, "rounds": rounds, "pause_seconds": PAUSE, "spread_seconds": SPREAD}
    document = provenance() | {"kind": "serve", **about, "rows": []}
    gc.freeze()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        servers = {name: Server(path, Path(scratch) / f"{name}.log") for name, path in APPS.items()}
        for server in servers.values():
            stack.callback(server.end)
        ready = await asyncio.gather(*(server.ready() for server in servers.values()))
        pages = dict(zip(servers, ready, strict=True))
        for name, server in servers.items():  # what an app makes for its first visitor alone
            await rush(server, pages[name], Crowd(), 1, 0.0, 0.0, seed="first")
        document["alone"] = {name: await alone(server, pages[name]) for name, server in servers.items()}
        for name, of in document["alone"].items():
            say(
                f"{name}: a click costs {1000 * of['click']:.1f} ms of a processor, an arrival {1000 * of['arrival']:.0f} ms"
            )
        for count in visitors:
            for pattern, spread in spreads.items():
                crowds = {name: Crowd() for name in APPS}
                for turn in range(rounds):
                    for name, crowd in crowds.items():
                        await rush(
                            servers[name], pages[name], crowd, count, spread, seconds, f"{count} {pattern} {turn}"
                        )
                for name, crowd in crowds.items():
                    document["rows"].append(row := _row(name, count, pattern, pages[name], crowd))
                    say(_line(row))
                write(document, out)
    return document


def _row(name: str, visitors: int, pattern: str, page: Page, crowd: Crowd) -> Json:
    return {
        "app": name,
        "visitors": visitors,
        "arriving": pattern,
        "requests_an_arrival": len(page.files) + 2,
        "arrivals": crowd.arrivals.summary(),
        "clicks": crowd.clicks.summary(),
        "own_events": crowd.events.summary(),
        "traces": crowd.traces.summary(),
        "memory_bytes": held.summary(crowd.memory),
        "processor_seconds": crowd.processor,
        "generator_seconds": crowd.generator,
    }


def _line(row: Json) -> str:
    def times(of: Json) -> str:
        if of["median"] is None:
            return f"none; {of['errors']} errors"
        return f"{of['median']:.3f} s, 95% within {of['p95']:.3f}, {of['errors']} of {of['count']} failed"

    memory, settled = row["memory_bytes"], row["memory_bytes"]["after_warm_up"]
    return (
        f"{row['app']}, {row['visitors']} {row['arriving']}: arrivals {times(row['arrivals'])}; clicks {times(row['clicks'])}; "
        f"traces {row['traces']['count']}; {memory['first'] / 2**20:.0f} to {memory['last'] / 2**20:.0f} MiB, "
        f"after warm-up {settled['first'] / 2**20:.0f} to {settled['last'] / 2**20:.0f}"
    )
