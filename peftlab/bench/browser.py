"""A visitor's browser as the room knows it: its token, its settings, the run it has started, and the stream of that run."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncIterator

from ..spec import Json
from .visitors import Connection, Page

RUN = re.compile(r"\b\w+-[\w-]+-[0-9a-f]{32}\b")
"""The id of a run: task, method and random digits."""


class Browser:
    """Somebody with a browser on the Live tab. Its methods raise one of FAILURES."""

    def __init__(self, port: int, page: Page, **state: object) -> None:
        """`state` are the settings that this visitor has chosen."""
        self.port, self.page = port, page
        self.state = {name: str(value) for name, value in state.items()}
        self.kept: dict[str, str] = {}
        """What the browser keeps: the visitor's token, and the run."""
        self.connection = Connection(port)
        self.session = ""
        """The name that each page which is loaded gives itself."""
        self.asked = 0
        self.heard: set[str] = set()
        """Ids of all runs that any answer to this browser has named."""

    async def open(self) -> Json:
        """Loads the page, as for the first time or once more, and returns what the Live tab shows."""
        self.session = secrets.token_hex(6)
        status, body = await self.connection.ask("GET", "/")
        if status != 200 or not body:
            raise ValueError(f"status {status} of the page")
        return await self.ask("live")

    async def ask(self, tab: str) -> Json:
        """The answer to what a tab shows, whose token a new browser keeps."""
        self.asked += 1
        question = self._question(tab) | {"number": self.asked}
        asked = {"data": question, "component_id": self.page.carrier, "fn_name": "answer", "session_hash": "none"}
        answer = json.loads(await self._post("/gradio_api/component_server/", asked))
        if answer.get("number") != self.asked or not answer.get("show") or answer.get("problems"):
            raise ValueError(f"{tab} answered {str(answer)[:300]}")
        if "visitor" in answer:
            self.kept["visitor"] = answer["visitor"]
        self.heard |= set(RUN.findall(answer.get("follow") or ""))
        return answer

    async def press(self, button: str) -> str:
        """Presses a button of the Live tab. Returns the run that the browser then keeps."""
        function, component = self.page.presses[f"live-{button}"]
        event = {"data": [self._question("live")], "event_data": None, "fn_index": function, "trigger_id": component}
        await self._post("/gradio_api/queue/join?", event | {"session_hash": self.session})
        _, told = await self.connection.ask("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        found = set(RUN.findall(told.decode()))
        self.heard |= found
        if len(found) != 1:
            raise ValueError(f"{button} was answered with {told.decode()[-700:]}")
        self.kept["run"] = found.pop()
        return self.kept["run"]

    async def follow(self) -> AsyncIterator[Json]:
        """What changes in the picture of the run, until that is over."""
        connection = Connection(self.port)
        rest = b""
        try:
            async for piece in connection.pieces(f"/gradio_api/peftlab/follow/live/{self.kept['run']}"):
                *messages, rest = (rest + piece).split(b"\n\n")
                for message in messages:
                    if message.startswith(b"event: over"):
                        return
                    self.heard |= set(RUN.findall(message.decode()))
                    yield json.loads(message.removeprefix(b"data: "))
        finally:
            connection.close()
        raise EOFError("the stream ended before the run was over")

    def close(self) -> None:
        self.connection.close()

    def _question(self, tab: str) -> Json:
        return {"tab": tab, "state": self.state, "kept": self.kept, "open": []}

    async def _post(self, path: str, content: Json) -> bytes:
        status, body = await self.connection.ask("POST", path, json.dumps(content).encode())
        if status != 200:
            raise ValueError(f"status {status} of {path}: {body.decode(errors='replace')[:200]}")
        return body
