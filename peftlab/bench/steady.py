"""A server's memory over many runs on several bases, of which it may keep two."""

from __future__ import annotations

import asyncio
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..count import BYTES
from ..errors import PeftlabError
from ..resolve import resolve
from ..spec import Json, RunSpec
from . import Say, small
from .browser import Browser
from .server import Server

BASES = 5
STEPS = 4
"""Of each run: what it loads and lets go of is measured, and not what it learns."""
FIRST = 10
"""Runs after which everything that is made once is there."""


def held(process: int) -> dict[str, int]:
    """Bytes of memory that a process holds, by Linux' account. Raises PeftlabError on other systems."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        raise PeftlabError(
            "the memory of a process is read from /proc, which Linux alone has; run this there"
        ) from None
    found = dict(re.findall(r"^(Rss|Pss):\s+(\d+) kB", text, re.MULTILINE))
    return {name.lower(): 1024 * int(size) for name, size in found.items()}


def usual(rows: Sequence[Json]) -> float:
    """Bytes resident after the last runs, one on each base, in the median."""
    return statistics.median(row["rss"] for row in rows[-BASES:])


async def _trained(folder: Path, keys: list[str], size: int, runs: int, say: Say) -> list[Json]:
    """The memory after each run on bases that take `size` bytes each."""
    share = 2.5 * size / _memory()  # of two bases; the others are let go of and loaded again
    server = Server(
        small.APP, folder / "app.log", str(folder / "bases"),
        PEFTLAB_DATA=str(folder / "data"), PEFTLAB_MEMORY=f"{share:.6f}",
    )  # fmt: skip
    rows: list[Json] = []
    try:
        page = await server.ready()
        person = Browser(server.port, page)
        await person.open()
        for number in range(runs):
            person.state = {
                "model": keys[number % len(keys)],
                "method": "lora",
                "steps": str(STEPS),
                "seed": str(number),
            }
            run = await person.press("go")
            async for _ in person.follow():
                pass
            await asyncio.sleep(0.1)  # the thread of jobs tidies up
            rows.append({"run": number + 1, **held(server.process.pid)})
            if number + 1 in (1, FIRST) or (number + 1) % 20 == 0:
                say(f"run {number + 1}: {rows[-1]['rss'] / 1e6:.0f} MB ({run.split('-')[1]})")
        person.close()
    finally:
        server.end()
    return rows


def _memory() -> float:
    from .. import hardware

    return float(hardware.here().memory_bytes or 0)


def memory(runs: int, say: Say) -> Json:
    """So many runs on BASES bases in turn at one server, and its memory after each."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        small.make(folder / "bases", BASES, small.HEAVY)
        keys = small.register(folder / "bases")
        files = (folder / "bases" / "small-0").glob("*.safetensors")
        precision = resolve(RunSpec(model=keys[0])).precision  # which the machine decides; the files are in fp32
        size = sum(file.stat().st_size for file in files) * BYTES[precision] // BYTES["fp32"]
        began = time.perf_counter()
        rows = asyncio.run(_trained(folder, keys, size, runs, say))
        spent = time.perf_counter() - began
    early, late = usual(rows[:FIRST]), usual(rows)
    growth = late / early - 1
    say(f"{early / 1e6:.0f} MB after {min(FIRST, runs)} runs, {late / 1e6:.0f} after {runs}: {growth:+.1%}")
    found = {"first": min(FIRST, runs), "bytes_after_first": early, "bytes_at_last": late, "growth": growth}
    most = max(row["rss"] for row in rows)
    return {
        "runs": runs,
        "bases": BASES,
        "base_bytes": size,
        "seconds": spent,
        **found,
        "most_bytes": most,
        "rows": rows,
    }
