"""One run that all visitors follow: whether each sees its end, how late what they see is, and what their clicks wait for."""

from __future__ import annotations

import asyncio
import random
import re
import time

from ..spec import Json
from .browser import Browser
from .clicks import PAUSE, Crowd, Times, Visitor
from .server import Server
from .visitors import FAILURES, Page

RUN = {"task": "intent", "steps": 12}
"""The run that is followed: of the bundled tasks, the one whose steps and answers take the least time."""
STEP = re.compile(r"step (\d+) of")


class Follower:
    """Somebody who watches a run of another's, and clicks on the Memory tab meanwhile."""

    def __init__(self, visitor: Visitor, browser: Browser) -> None:
        self.visitor, self.browser = visitor, browser
        self.seen: dict[str, float] = {}
        """When each step was first on screen, in seconds of the machine's clock."""
        self.messages = 0
        self.saw_the_end = False

    async def follow(self) -> None:
        clicking = asyncio.create_task(self._click())
        try:
            async for message in self.browser.follow():
                self.messages += 1
                if step := STEP.search((message.get("live.bar") or {}).get("value") or ""):
                    self.seen.setdefault(step[1], time.perf_counter())
            self.saw_the_end = True
        finally:
            clicking.cancel()
            await asyncio.gather(clicking, return_exceptions=True)
            self.visitor.leave()

    async def _click(self) -> None:
        draw = self.visitor.draw
        await asyncio.sleep(draw.uniform(0, PAUSE))
        while True:
            with self.visitor.crowd.clicks.one():
                await self.visitor.click()
            await asyncio.sleep(draw.uniform(PAUSE / 2, 1.5 * PAUSE))


async def follow(server: Server, page: Page, visitors: int) -> Json:
    """Somebody trains, and so many visitors follow the run; `late` is how long after the first of them each saw a step."""
    crowd, draw = Crowd(), random.Random(f"{visitors} follow")
    runner = Browser(server.port, page, **RUN)
    await runner.open()
    run = await runner.press("go")
    runner.close()
    people = []
    for _ in range(visitors):
        watching = Browser(server.port, page)
        watching.kept["run"] = run
        people.append(Follower(Visitor(server, page, crowd, random.Random(draw.random())), watching))
    before, began = server.processor(), time.perf_counter()
    ended = await asyncio.gather(*(one.follow() for one in people), return_exceptions=True)
    late = Times()
    for step in sorted({step for one in people for step in one.seen}):
        at = sorted(one.seen[step] for one in people if step in one.seen)
        late.seconds += [moment - at[0] for moment in at]
    errors = [f"{type(e).__name__}: {e}"[:200] for e in ended if isinstance(e, FAILURES)]
    late.errors += errors
    return {
        "visitors": visitors,
        "saw_the_end": sum(one.saw_the_end for one in people),
        "messages": sum(one.messages for one in people),
        "seconds": time.perf_counter() - began,
        "late": late.summary(),
        "clicks": crowd.clicks.summary(),
        "processor_seconds": server.processor() - before,
    }
