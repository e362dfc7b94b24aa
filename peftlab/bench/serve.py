"""What visitors wait for: simulated ones, over HTTP on this machine, at the page and at a bare Gradio app in turn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..measured import provenance
from ..places import ROOT
from ..spec import Json
from . import Say, held, write
from .clicks import PAUSE, Crowd, Visitor
from .following import follow
from .server import Server
from .visitors import Page

APPS = {"bare": ROOT / "demos" / "page" / "echo.py", "peftlab": ROOT / "app.py"}
VISITORS = (50, 200)
SECONDS = 24.0
ROUNDS = 2
CLICKS_ALONE, CLICKS_EACH, ARRIVALS_ALONE = 400, 4, 20
"""So many clicks and arrivals, one after the other, tell what one costs the server; so many clicks are one visitor's."""
SPREAD = 20.0
"""Seconds over which visitors arrive where they do not come all at once."""
ARRIVING = {"at once": 0.0, "spread": SPREAD}
"""How visitors arrive, and over how many seconds."""


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
    document = provenance() | {"kind": "serve", **about, "rows": [], "followed": []}
    gc.freeze()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        servers = {
            name: Server(path, Path(scratch) / f"{name}.log", PEFTLAB_DATA=f"{scratch}/data")
            for name, path in APPS.items()
        }
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
        if "live-go" in pages["peftlab"].presses:
            for count in visitors:
                document["followed"].append(found := await follow(servers["peftlab"], pages["peftlab"], count))
                say(
                    f"a run that {count} follow: {found['saw_the_end']} saw its end, clicks {_times(found['clicks'])}; "
                    f"each saw a step {_times(found['late'])} after the first"
                )
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
    memory, settled = row["memory_bytes"], row["memory_bytes"]["after_warm_up"]
    arrivals, clicks = (_times(row[what]) for what in ("arrivals", "clicks"))
    return (
        f"{row['app']}, {row['visitors']} {row['arriving']}: arrivals {arrivals}; clicks {clicks}; "
        f"traces {row['traces']['count']}; {memory['first'] / 2**20:.0f} to {memory['last'] / 2**20:.0f} MiB, "
        f"after warm-up {settled['first'] / 2**20:.0f} to {settled['last'] / 2**20:.0f}"
    )


def _times(of: Json) -> str:
    if of["median"] is None:
        return f"none; {of['errors']} errors"
    return f"{of['median']:.3f} s, 95% within {of['p95']:.3f}, {of['errors']} of {of['count']} failed"
