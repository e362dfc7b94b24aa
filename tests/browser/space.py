"""A Space on this machine: the user, the folders and the address that Hugging Face gives an app.

`unshare` makes them without any rights: in a user namespace the app is user 1000 and may write to its home and to /tmp alone.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import urlencode

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

HOME = Path("/home/user")
AS_USER = ["unshare", "--user", "--map-user=1000", "--map-group=1000", "--keep-caps", "--mount"]
NO_RIGHTS = ["setpriv", "--ambient-caps=-all", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
ENVIRONMENT = {
    "HOME": str(HOME), "SYSTEM": "spaces", "SPACE_ID": "ann/peftlab", "SPACE_AUTHOR_NAME": "ann",
    "SPACE_REPO_NAME": "peftlab", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ALLOW_FLAGGING": "never", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1",
}  # fmt: skip
"""What a Space has in its environment, and nothing from outside of this machine."""


def can_be_made() -> bool:
    """Whether this machine lets anybody make a user namespace."""
    return not subprocess.run([*AS_USER, "mount", "--make-rprivate", "/"], capture_output=True).returncode


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def apart(command: Sequence[str], seen: Mapping[Path, Path], at: Path, writable: Sequence[Path] = (HOME,)) -> list[str]:
    """The command as user 1000 in the folder `at`, where the whole disk can only be read.

    Of `seen` each folder lies at its key, to be read too. /tmp and the folders of `writable` are new and empty.
    """
    steps = ["set -e", "mount --make-rprivate /", "mount -t tmpfs tmpfs /mnt"]
    for number, source in enumerate(seen.values()):  # before anything is mounted over it
        steps += [f"mkdir /mnt/{number}", f"mount --bind '{source}' /mnt/{number}"]
    steps += ["mount -t tmpfs tmpfs /home", "mount -t tmpfs tmpfs /tmp"]
    for folder in writable:
        steps += [f"mkdir -p {folder}", f"mount -t tmpfs tmpfs {folder}"]
    for number, target in enumerate(seen):
        steps += [f"mkdir -p {target}", f"mount --bind /mnt/{number} {target}", f"mount -o remount,bind,ro {target}"]
    steps += ["mount -o remount,ro /home", "mount -o remount,bind,ro /", f"cd {at}", 'exec "$@"']
    return [*AS_USER, "bash", "-c", "\n".join(steps), "bash", *NO_RIGHTS, *command]


class Space:
    """A running app: its address, and the log of what it says."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], port: int = 7860) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}/", log
        with socket.socket() as one, contextlib.suppress(ConnectionRefusedError):
            one.connect(("127.0.0.1", port))
            raise OSError(f"port {port} is in use by another app, which would answer in this one's place")
        path = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        with log.open("w") as said:
            self.process = subprocess.Popen(
                command, env=path | ENVIRONMENT | environment, stdout=said, stderr=said, start_new_session=True
            )

    def answers(self, path: str = "gradio_api/peftlab/healthz", patience: float = 120) -> bytes:
        """What it answers, once it does."""
        begun = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                    if "Running on" in self.log.read_text():  # it may answer a little before it has begun
                        return bytes(answer.read())
            except OSError:
                assert self.process.poll() is None and time.monotonic() - begun < patience, self.log.read_text()
                time.sleep(0.1)

    def end(self) -> int:
        """Tells it to end, as a host does, which kills after ten seconds what is left. Its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(10)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


class Around:
    """A proxy that has an app under a prefix of its address, and on another site a page that has any in a frame."""

    PREFIX = "/lab"

    def __init__(self, app: str) -> None:
        self.app, self.port = app, free_port()
        self.prefixed = f"http://127.0.0.1:{self.port}{self.PREFIX}/"
        routes = [
            Route("/", self._outside),
            Route("/favicon.ico", lambda _: Response(status_code=204)),
            Route(f"{self.PREFIX}/{{path:path}}", self._inside, methods=["GET", "POST", "HEAD"]),
        ]
        self.server = uvicorn.Server(
            uvicorn.Config(
                Starlette(routes=routes), host="127.0.0.1", port=self.port, log_level="error", lifespan="off"
            )
        )
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        asyncio.run(self.server.serve())

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)

    def framed(self, inside: str) -> str:
        """The address of a page on another site that has `inside` in a frame."""
        return f"http://localhost:{self.port}/?{urlencode({'inside': inside})}"

    def _outside(self, request: Request) -> Response:
        return HTMLResponse(
            "<!doctype html><title>Around</title><script>const told = [];"
            "addEventListener('message', ({data}) => told.push(data));</script>"
            f'<iframe src="{escape(request.query_params["inside"])}" allow="clipboard-write" '
            'style="width: 100%; height: 95vh; border: 0"></iframe>'
        )

    async def _inside(self, request: Request) -> Response:
        """Streams both ways, and tells the app where it is reached, as proxies do."""
        own = {"host", "content-length", "connection"}
        headers = {name: value for name, value in request.headers.items() if name not in own}
        headers |= {"x-forwarded-host": request.headers["host"], "x-forwarded-proto": "http"}
        client = httpx.AsyncClient(timeout=None)
        url = (
            self.app
            + request.url.path.removeprefix(f"{self.PREFIX}/")
            + (f"?{request.url.query}" if request.url.query else "")
        )
        asked = client.build_request(request.method, url, headers=headers, content=await request.body())
        answer = await client.send(asked, stream=True)

        async def parts():
            try:
                async for part in answer.aiter_raw():
                    yield part
            finally:
                await answer.aclose()
                await client.aclose()

        hop = {"transfer-encoding", "connection", "keep-alive"}
        given = {name: value for name, value in answer.headers.items() if name not in hop}
        return StreamingResponse(parts(), answer.status_code, given)
