"""What the server does for every visitor alike, done once: pages and files kept as bytes, and questions answered at once.

Whatever is not sure here is left to Gradio, which then answers as it would without this.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import inspect
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import brotli
import orjson
from fastapi.encoders import jsonable_encoder
from gradio import Blocks
from gradio.data_classes import _StaticFiles
from gradio.route_utils import BUILD_PATH_LIB, STATIC_PATH_LIB
from gradio.routes import App
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftlab import hardware

PAGES, FILES = 16, 256
"""So many answers are kept: of pages, one for each address that they are reached by; and of files."""
LARGEST = 2**24
"""Bytes of a file that is kept."""
PRESSES = 256
"""So many presses are answered at once on a shared GPU."""
SESSIONS = 1000
"""So many sessions Gradio keeps, the latest: what its components show, which an event of a press reads."""
QUESTION = 2**20
"""Bytes of a question that is answered here."""
ADDRESS = ("host", "x-forwarded-host", "x-forwarded-proto", "x-gradio-server")
"""Headers that say where a page is reached, which it repeats in its text."""
SHARED = ("/", "/config", "/config/", "/theme.css", "/manifest.json")
READ = {"page", "deep_link", "all_endpoints"}
"""Parameters that Gradio reads of a page's address; all others are the page's own business."""
TEXT = re.compile(r"text/|application/(?:json|javascript|manifest\+json)|image/svg")
HASHED = re.compile(r"/assets/.+-[\w-]{8,}\.\w+")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InBytes:
    """A server function's answers as they are sent. The function has this as its attribute `in_bytes`."""

    known: Callable[[object], bytes | None]
    """Gives one that is kept, or that takes no longer than a few milliseconds; None for any other."""
    made: Callable[[object], bytes | Awaitable[bytes]]
    """Makes one, as long as that takes."""


@dataclass(frozen=True)
class Kept:
    """A response that everybody gets."""

    headers: tuple[tuple[bytes, bytes], ...]
    bodies: dict[str, bytes]
    """By content encoding: `identity`, and `br` and `gzip` where that is shorter."""
    etag: str
    made_of: Any
    """What it is valid for: as long as this is the same, so is the response."""

    def response(self, request: Headers) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body for somebody who accepts these encodings, and may have the body already."""
        accepted = encodings(request.get("accept-encoding", ""))
        encoding = next((e for e in ("br", "gzip") if e in self.bodies and e in accepted), "identity")
        etag = f'"{self.etag}-{encoding}"'
        headers = [*self.headers, (b"etag", etag.encode()), (b"vary", b"Accept-Encoding")]
        if etag in request.get("if-none-match", ""):
            return 304, headers, b""
        if encoding != "identity":
            headers.append((b"content-encoding", encoding.encode()))
        body = self.bodies[encoding]
        return 200, [*headers, (b"content-length", str(len(body)).encode())], body


@lru_cache(64)
def encodings(accepted: str) -> frozenset[str]:
    """The content encodings that a header Accept-Encoding names and does not refuse."""
    named = (re.split(r"\s*;\s*", part.strip().lower()) for part in accepted.split(","))
    return frozenset(name for name, *q in named if not any(re.fullmatch(r"q=0(\.0*)?", one) for one in q))


def kept(status: int, headers: list[tuple[bytes, bytes]], body: bytes, path: str, made_of: object) -> Kept | None:
    """A response of Gradio's, compressed; None for one that not everybody may get."""
    names = {name.lower(): value for name, value in headers}
    if status != 200 or b"set-cookie" in names or b"content-encoding" in names or len(body) > LARGEST:
        return None
    bodies = {"identity": body}
    if TEXT.match(names.get(b"content-type", b"").decode("latin-1")) and len(body) > 200:
        shorter = {"br": brotli.compress(body, quality=9), "gzip": gzip.compress(body, 9, mtime=0)}
        bodies |= {encoding: packed for encoding, packed in shorter.items() if len(packed) < len(body)}
    lasting = b"public, max-age=31536000, immutable" if HASHED.fullmatch(path) else b"no-cache"
    own = [(n, v) for n, v in names.items() if n not in (b"content-length", b"etag", b"cache-control", b"vary")]
    return Kept((*own, (b"cache-control", lasting)), bodies, hashlib.sha256(body).hexdigest()[:24], made_of)


class Shelf:
    """The responses of the newest keys."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.made: OrderedDict[Hashable, asyncio.Task[Kept | None]] = OrderedDict()

    async def get(self, key: Hashable, made_of: object, make: Callable[[], Awaitable[Kept | None]]) -> Kept | None:
        """The response for `key`, made once however many ask for it, and again once `made_of` is another."""
        task = self.made.get(key)
        if task and task.done() and (task.cancelled() or task.exception() or not _same(task.result(), made_of)):
            task = None
        if task is None:
            task = self.made[key] = asyncio.ensure_future(make())
        self.made.move_to_end(key)
        while len(self.made) > self.most:
            self.made.popitem(last=False)
        return task.result() if task.done() else await asyncio.shield(task)


def _same(found: Kept | None, made_of: object) -> bool:
    return found is not None and (found.made_of is made_of or (isinstance(made_of, tuple) and found.made_of == made_of))


class Front:
    """Answers what it can for the app behind it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.pages, self.files = Shelf(PAGES), Shelf(FILES)
        self.answering = anyio.CapacityLimiter(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_open(scope["app"]):
            path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
            if scope["method"] == "GET":
                if await self._shared(path, scope, send):
                    return
            elif scope["method"] == "POST" and path.rstrip("/") == "/gradio_api/component_server":
                unanswered = await self._question(scope, receive, send)
                if unanswered is None:
                    return
                receive = unanswered
        await self.app(scope, receive, send)

    async def _shared(self, path: str, scope: Scope, send: Send) -> bool:
        """Sends what everybody gets at this address, if that is known."""
        headers, found = Headers(scope=scope), None
        try:
            if "range" in headers:
                return False
            if path in SHARED:
                if READ & {part.split("=")[0] for part in scope["query_string"].decode("latin-1").split("&")}:
                    return False
                where = (path, scope["scheme"], scope.get("root_path"), *(headers.get(name) for name in ADDRESS))
                config = scope["app"].get_blocks().config
                found = await self.pages.get(where, config, lambda: self._made(path, scope, config))
            elif (file := on_disk(path)) is not None:
                about = file.stat()
                version = (about.st_mtime_ns, about.st_size)
                if about.st_size <= LARGEST:
                    found = await self.files.get(path, version, lambda: self._made(path, scope, version))
        except Exception as error:
            log.debug("left to Gradio: %s: %s", path, error)
        if found is None:
            return False
        status, sent, body = found.response(headers)
        await send({"type": "http.response.start", "status": status, "headers": sent})
        await send({"type": "http.response.body", "body": body})
        return True

    async def _made(self, path: str, scope: Scope, made_of: object) -> Kept | None:
        """What the app answers somebody of whom it knows no more than the address."""
        wanted = [(n, v) for n, v in scope["headers"] if n.decode("latin-1") in ADDRESS]
        status, headers, parts = 0, list[tuple[bytes, bytes]](), list[bytes]()
        begun = False

        async def receive() -> Message:
            nonlocal begun
            if begun:
                await asyncio.Event().wait()  # nobody goes away
            begun = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            else:
                parts.append(message.get("body", b""))

        await self.app({**scope, "headers": wanted, "query_string": b""}, receive, send)
        return await anyio.to_thread.run_sync(kept, status, headers, b"".join(parts), path, made_of)

    async def _question(self, scope: Scope, receive: Receive, send: Send) -> Receive | None:
        """Answers a page's question as Gradio's own route does, but without a session, which the page does not need.

        Where it cannot, it returns what gives the app the question once more.
        """
        body, more = b"", True
        while more and len(body) <= QUESTION:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            asked = orjson.loads(body)
            function = plain(getattr(scope["app"].get_blocks().blocks[asked["component_id"]], asked["fn_name"]))
            question, in_bytes = asked["data"], getattr(function, "in_bytes", None)
            answer = in_bytes.known(question) if in_bytes else None
        except Exception as error:
            log.debug("left to Gradio: %s", error)
            return again({"type": "http.request", "body": body, "more_body": more}, receive)
        if answer is None:
            answer = await self._answered(in_bytes.made if in_bytes else function, question)
        about = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": about})
        await send({"type": "http.response.body", "body": answer})
        return None

    async def _answered(self, function: Callable[[object], Any], question: object) -> bytes:
        if inspect.iscoroutinefunction(function):
            return as_json(await function(question))
        return await anyio.to_thread.run_sync(lambda: as_json(function(question)), limiter=self.answering)


def again(first: Message, then: Receive) -> Receive:
    """`then`, but with a message before it."""
    waiting = [first]

    async def receive() -> Message:
        return waiting.pop() if waiting else await then()

    return receive


def as_json(answer: object) -> bytes:
    """What Gradio would send of an answer; bytes are one already."""
    if isinstance(answer, bytes):
        return answer
    try:
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        return orjson.dumps(jsonable_encoder(answer))


def plain(function: Any) -> Callable[[object], Any]:
    """A server function that wants nothing but what the page asks. Raises ValueError for any other."""
    if not getattr(function, "_is_server_fn", False) or len(inspect.signature(function).parameters) != 1:
        raise ValueError("not a server function of one argument")
    return function  # type: ignore[no-any-return]


def on_disk(path: str) -> Path | None:
    """The file that Gradio serves to everybody at an address, if it does; it is Gradio that reads it."""
    if ".." in path:
        return None
    for address, folder in (("/assets/", BUILD_PATH_LIB), ("/static/", STATIC_PATH_LIB)):
        if path.startswith(address):
            return Path(folder) / path.removeprefix(address)
    file = path.removeprefix("/gradio_api/file=")
    return Path(file) if file != path and any(Path(file).is_relative_to(p) for p in _StaticFiles.all_paths) else None


def is_open(app: Any) -> bool:
    """Whether everybody gets the same, because nobody has to log in."""
    return (
        isinstance(app, App) and app.blocks is not None and app.auth is None and app.auth_dependency is None
        and not _has_login(app.blocks)
    )  # fmt: skip


@lru_cache(maxsize=2)
def _has_login(page: Blocks) -> bool:
    """Gradio looks through all components for it, which took a quarter of a millisecond of every request."""
    return bool(page.expects_oauth)


@asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[None]:
    """Has Gradio begin a session without describing each component anew, which takes it 50 ms and 0.6 MB for this page.

    Only Gradio's deep links would read the descriptions, and this page has links of its own.
    """
    app.state_holder.blocks = SimpleNamespace(default_config=app.get_blocks().default_config, blocks={})  # type: ignore
    yield


def options(routes: Sequence[Route] = ()) -> dict[str, Any]:
    """Arguments of `Blocks.launch`, which changes some of them: they are made anew for each."""
    return {
        "app_kwargs": {"middleware": [Middleware(Front)], "lifespan": lifespan, "routes": [*routes]},
        "state_session_capacity": SESSIONS,
        "max_threads": PRESSES if hardware.is_shared() else 40,  # there a run takes a thread to its end
    }
