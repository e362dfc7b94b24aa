"""How long a host waits for an app that begins: to its first byte, and to the model; beside a bare Gradio app."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from ..measured import provenance
from ..spec import Json
from . import Say, write
from .serve import APPS
from .server import STARTING, Server
from .visitors import FAILURES, Connection


def record_start(out: Path, say: Say, rounds: int) -> Json:
    """Writes to `out` the seconds from the start of a process to its first answer, of each app in turn, and to its model.

    Raises PeftlabError when an app does not start.
    """
    times: dict[str, list[float]] = {name: [] for name in APPS}
    ready: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds + 1):
            for name, program in APPS.items():
                first, at = asyncio.run(_start(program, Path(scratch) / f"{name}.log", name == "peftlab"))
                if turn:  # the one before it brought the files into memory
                    times[name].append(first)
                    ready += [] if at is None else [at]
    of_page, of_bare = median(times["peftlab"]), median(times["bare"])
    say(f"{of_page:.1f} s to the first byte, {of_page / of_bare:.2f} times a bare app's {of_bare:.1f}")
    if ready:
        say(f"{median(ready):.1f} s until the model is ready")
    document = provenance() | {"kind": "start", "first_byte": times, "ratio": of_page / of_bare, "model_ready": ready}
    write(document, out)
    return document


async def _start(program: Path, log: Path, has_model: bool) -> tuple[float, float | None]:
    """Seconds to the first answer, and to the model where the app has one."""
    server, begun = Server(program, log, PEFTLAB_DATA=str(log.with_suffix(".data"))), time.monotonic()
    try:
        await server.answers()
        first = time.monotonic() - begun
        while has_model and time.monotonic() - begun < STARTING:
            with contextlib.suppress(*FAILURES), contextlib.closing(Connection(server.port)) as connection:
                state = json.loads((await connection.ask("GET", "/healthz"))[1])["model"]
                if state in ("ready", "failed"):
                    return first, time.monotonic() - begun if state == "ready" else None
            await asyncio.sleep(0.1)
        return first, None
    finally:
        server.end()
