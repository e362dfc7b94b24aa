"""What a browser does at an app of Gradio, over raw HTTP/1.1: this costs a tenth of what a client library would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from ..errors import PeftlabError
from ..spec import Json

PATIENCE = 120.0  # seconds after which an answer counts as lost
CONNECTIONS = 6  # that a browser opens to one host
HEADERS = (
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36\r\n"
    "Accept: */*\r\nAccept-Language: en-US,en;q=0.9\r\nAccept-Encoding: gzip, deflate, br, zstd\r\n"
)
"""What a browser sends with each request, as text: the server reads these headers, too."""
FAILURES = (OSError, asyncio.TimeoutError, EOFError, ValueError)


class Connection:
    """One connection, kept alive between requests, as browsers do; it is opened again when the server has closed it."""

    def __init__(self, port: int, headers: str = HEADERS) -> None:
        self.port = port
        self.common = f"Host: 127.0.0.1:{port}\r\nConnection: keep-alive\r\n{headers}"
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the response. Raises one of FAILURES."""
        about = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        request = f"{method} {path} HTTP/1.1\r\n{self.common}{about}\r\n".encode() + body
        return await asyncio.wait_for(self._ask(request), PATIENCE)

    async def pieces(self, path: str) -> AsyncIterator[bytes]:
        """The pieces of a response that goes on, as they come. Raises one of FAILURES."""
        head = await asyncio.wait_for(self._begun(f"GET {path} HTTP/1.1\r\n{self.common}\r\n".encode()), PATIENCE)
        if int(head[9:12]) != 200:
            raise ValueError(f"status {head[9:12].decode()} of {path}")
        while piece := await asyncio.wait_for(self._piece(), PATIENCE):
            yield piece

    async def _ask(self, request: bytes) -> tuple[int, bytes]:
        try:
            head = b""
            if self.streams is not None:
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                    head = await self._begun(request)
            if not head:  # the server had closed it while nothing was asked
                self.close()
                head = await self._begun(request)
            body = await self._body(head)
        except BaseException:
            self.close()
            raise
        if b"connection: close" in head:
            self.close()
        return int(head[9:12]), body

    async def _begun(self, request: bytes) -> bytes:
        """The head of the response, in small letters."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        reader, writer = self.streams
        writer.write(request)
        return (await reader.readuntil(b"\r\n\r\n")).lower()

    async def _body(self, head: bytes) -> bytes:
        assert self.streams
        reader = self.streams[0]
        if b"transfer-encoding: chunked" not in head:
            length = re.search(rb"content-length: (\d+)", head)
            return await reader.readexactly(int(length[1]) if length else 0)
        parts = []
        while piece := await self._piece():
            parts.append(piece)
        return b"".join(parts)

    async def _piece(self) -> bytes:
        """The next piece of a response that comes in pieces; empty at its end."""
        assert self.streams
        reader = self.streams[0]
        size = int(await reader.readuntil(b"\r\n"), 16)
        return (await reader.readexactly(size + 2))[:-2]

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


@dataclass(frozen=True)
class Page:
    """What there is to know of an app's page before people visit it."""

    files: tuple[str, ...]
    """What a browser fetches besides the page itself, in about its order."""
    events: tuple[bytes, ...]
    """Bodies of the events that a page sends by itself as it opens (its timers), each but for the session's name."""
    carrier: int
    """The component that has the function `answer`."""
    has_exact: bool
    presses: dict[str, tuple[int, int]]
    """The function and the component of each button whose press the server does, by the button's name on the page."""


async def look(port: int) -> Page:
    """Reads an app's page as a browser does: its styles and scripts, what these import, and those of its components.

    Raises PeftlabError where it finds none of what Gradio's page has.
    """
    connection = Connection(port, headers="")
    _, html = await connection.ask("GET", "/")
    text = html.decode()
    found = re.search(r"window\.gradio_config = (\{.*?\});</script>", text)
    config = json.loads(found[1]) if found else {}
    carriers = [c for c in config.get("components", ()) if "answer" in (c["props"].get("server_fns") or ())]
    if not carriers:
        raise PeftlabError(
            f"the page at port {port} has no server function; this version of Gradio writes it in another way"
        )
    files = dict.fromkeys(_addresses(text) + _addresses(config.get("head") or ""))
    files |= dict.fromkeys(["/static/js/iframeResizer.contentWindow.min.js", f"/theme.css?v={config['theme_hash']}"])
    files |= dict.fromkeys(f"/{path}" for c in config["components"] for path in _fetched(c["props"]))
    kinds = {c["type"] for c in config["components"]}
    unread = deque(path for path in files if path.startswith("/assets/"))
    while unread:
        path = unread.popleft()
        if path.endswith(".js"):
            _, script = await connection.ask("GET", path)
            for name in _imports(script.decode(), kinds):
                if (more := f"/assets/{name}") not in files:
                    files[more] = None
                    unread.append(more)
    connection.close()
    ticking = {c["id"] for c in config["components"] if c["type"] == "timer" and c["props"].get("active")}
    events = tuple(
        json.dumps({"data": [], "event_data": None, "fn_index": of["id"], "trigger_id": target}).encode()
        for of in config["dependencies"]
        for target, event in of["targets"]
        if of["backend_fn"] and (event == "load" or (event == "tick" and target in ticking))
    )
    names = {c["id"]: c["props"].get("elem_id") for c in config["components"] if c["type"] == "button"}
    presses = {
        names[target]: (of["id"], target)
        for of in config["dependencies"]
        for target, event in of["targets"]
        if of["backend_fn"] and event == "click" and names.get(target)
    }
    return Page(tuple(files), events, carriers[0]["id"], "exact" in carriers[0]["props"]["server_fns"], presses)


def _addresses(html: str) -> list[str]:
    """Addresses of the styles and scripts that a piece of HTML names."""
    named = re.findall(r"""<(?:script|link)[^>]*?(?:src|href)=["'](\.?/?(?!/|https?:)[^"']+\.(?:js|css))["']""", html)
    return ["/" + name.removeprefix(".").removeprefix("/") for name in named]


def _fetched(properties: Json) -> list[str]:
    """Addresses that a component's own script fetches as it is loaded."""
    return re.findall(r"\bfetch\('([\w/.-]+)'", properties.get("js_on_load") or "")


def _imports(script: str, kinds: Iterable[str]) -> list[str]:
    """Names of the files that one of Gradio's scripts has a browser fetch on a page of components of these kinds."""
    names = re.findall(r"""(?:from|import)["'`]\./([^"'`]+)["'`]""", script)
    files = re.search(r"m\.f=(\[[^]]*\])", script)
    later = json.loads(files[1]) if files else []
    loads = r"import\(`\./(%s[^`]+)`\)[^`]*?__vite__mapDeps\(\[([\d,]*)\]\)"
    found = re.findall(loads % "(?:Index|Blocks)-", script) if "gradio_config" in script or "./Login-" in script else []
    for kind in kinds:
        for group in re.findall(rf"[{{,]{kind}:\{{(\w+:\(\)=>[^{{}}]+)\}}", script):
            found += re.findall(r"(?:base|component):\(\)=>\w+\(\(\)=>" + loads % "", group)
    for name, needs in found:
        names += [name, *(later[int(i)].removeprefix("./") for i in needs.split(",") if i)]
    return names
