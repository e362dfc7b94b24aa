"""A server that is told to end while a run is under way: it ends within ten seconds, and no step is lost."""

import asyncio
import json
import time

import pytest

from peftlab.bench import kills, small
from peftlab.bench.visitors import Connection
from peftlab.run.events import last_of

pytest.importorskip("gradio")


async def _ended_and_gone_on(folder):
    service = kills.Service(folder)
    await service.start()
    try:
        person = service.browser(method="lora", steps=5000, seed=0)
        await person.open()
        run = await person.press("go")
        at = await service.until(run, 5)
        status, told = await Connection(service.server.port).ask("GET", "/healthz")
        assert status == 200 and json.loads(told)["status"] == "ok" and json.loads(told)["busy"]
        began = time.monotonic()
        service.server.process.terminate()
        assert service.server.process.wait(10) == 0 and time.monotonic() - began < 10
        person.close()
        events = service.data.events(run)
        last = last_of(events, "step")["step"]
        assert at <= last < 5000 and events[-1]["message"] == (
            f"The server ended while this ran, after step {last}. Resume goes on from there."
        )
        await service.start()
        again = service.browser(**person.state)
        again.kept = person.kept
        await again.open()
        await again.press("resume")
        await service.until(run, last + 1)
        assert last_of(service.data.events(run), "resumed")["step"] == last
        again.close()
    finally:
        service.server.end()


def test_a_server_that_is_told_to_end_keeps_the_run_under_way(tmp_path):
    small.make(tmp_path / "bases", 1, small.QUICK)
    asyncio.run(_ended_and_gone_on(tmp_path))
