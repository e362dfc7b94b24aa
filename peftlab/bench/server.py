"""An app in a process of its own: started, watched for what it computes and holds, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from ..errors import PeftlabError
from .visitors import FAILURES, Connection, Page, look

STARTING = 180.0
"""Longest that an app may take to answer and to be at rest."""


class Server:
    """An app in a process of its own on a free port."""

    def __init__(self, program: Path, log: Path, *arguments: str, **environment: str) -> None:
        """Starts it with these arguments, and with these variables beside those of this process."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        own = {"GRADIO_SERVER_PORT": str(self.port), "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SSR_MODE": "False"}
        own |= environment
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(program), *arguments],
                env={**os.environ, **own},
                stdout=out,
                stderr=out,
                cwd=log.parent,
            )
        self.program, self.log, self.began = program, log, time.monotonic()

    async def ready(self, rested: bool = True) -> Page:
        """The page, once the app answers and, if it is to be `rested`, computes nothing more.

        Raises PeftlabError when it does not come to that.
        """
        await self.answers()
        page = await look(self.port)
        if rested:
            await self._rest()
        self.began = time.monotonic()
        return page

    async def answers(self) -> None:
        """Waits until the app answers. Raises PeftlabError when it does not come to that."""
        while time.monotonic() - self.began < STARTING and self.process.poll() is None:
            with contextlib.suppress(*FAILURES), contextlib.closing(Connection(self.port)) as connection:
                if (await connection.ask("GET", "/"))[0] == 200:
                    return
            await asyncio.sleep(0.02)
        last = (self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise PeftlabError(f"{self.program} did not start: {last}")

    async def _rest(self) -> None:
        """Waits until the app has loaded its model."""
        while time.monotonic() - self.began < STARTING:
            before = self.processor()
            await asyncio.sleep(2)
            if self.processor() - before < 0.2:
                break

    def family(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def processor(self) -> float:
        """Seconds that the app's processes have computed."""
        return sum(sum(times[:2]) for times in self._each("cpu_times"))

    def own_processor(self) -> float:
        """Seconds that the app's first process has computed, which answers."""
        return sum(psutil.Process(self.process.pid).cpu_times()[:2])

    def memory(self) -> int:
        """Bytes that the app's processes hold."""
        return sum(info.rss for info in self._each("memory_info"))

    def _each(self, what: str) -> list:
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                found.append(getattr(process, what)())
        return found

    def kill(self) -> None:
        """Ends the app by the signal that nothing can catch."""
        self.process.kill()
        self.process.wait(20)

    def end(self) -> None:
        for process in reversed(self.family()):
            with contextlib.suppress(psutil.Error):
                process.terminate()
        self.process.wait(20)
