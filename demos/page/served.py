"""What the page fetches beside Gradio's own: the picture of a run as it changes, and a visitor's own adapter."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

from anyio import to_thread
from gradio.data_classes import FileData
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from demos.page.controls import as_update
from demos.page.tab import Values
from peftlab import adapters, units
from peftlab.room import rooms
from peftlab.room.jobs import Job
from peftlab.show.marks import remarks

AGAIN = 5.0  # seconds after which a run that waits is drawn anew, since the wait gets shorter
API = "/gradio_api/peftlab"  # beside Gradio's own: what lies elsewhere is no address where a page is rendered on the server
LOOK = 0.25  # seconds between two looks at a run that somebody follows
ALIVE = 5.0  # seconds after which a page hears that the stream lives, when nothing happens
Picture: TypeAlias = dict[str, str]  # what each component shows, as JSON


class Followed:
    """A run that pages follow: its picture is made once for all of them, in one thread, when something has happened."""

    def __init__(self, job: Job, draw: Callable[[Job], Values], tab: str) -> None:
        self.job, self.draw, self.tab = job, draw, tab
        self.seen: object = None
        self.picture: Picture = {}
        self.drawing = asyncio.Lock()
        self.watchers = 0

    async def now(self) -> Picture:
        """The newest picture."""
        async with self.drawing:
            turn = 0 if self.job.begun else time.monotonic() // AGAIN
            seen = len(self.job.events), self.job.over, rooms.here().ahead(self.job), turn
            if seen != self.seen:
                self.picture, self.seen = await to_thread.run_sync(self._drawn), seen
            return self.picture

    def _drawn(self) -> Picture:
        shown = {name: value() if callable(value) else value for name, value in self.draw(self.job).items()}
        return {f"{self.tab}.{name}": json.dumps(as_update(value)) for name, value in shown.items()}


_followed: dict[tuple[str, str], Followed] = {}
"""By tab and job."""


async def follow(job: Job, draw: Callable[[Job], Values], tab: str) -> AsyncIterator[str]:
    """Server-sent events: what has changed in the picture, until the run is over. A slow reader skips pictures."""
    key = tab, job.id
    one = _followed.setdefault(key, Followed(job, draw, tab))
    one.watchers += 1
    sent: Picture = {}
    quiet = 0.0
    try:
        while True:
            over = job.over  # before it is drawn, so that the last picture is of all events
            picture = await one.now()
            news = {name: text for name, text in picture.items() if sent.get(name) != text}
            if news or quiet >= ALIVE:
                sent, quiet = picture, 0.0
                yield "data: {" + ", ".join(f'"{name}": {text}' for name, text in news.items()) + "}\n\n"
            if over:
                yield "event: over\ndata: {}\n\n"
                return
            await asyncio.sleep(LOOK)
            quiet += LOOK
    finally:
        one.watchers -= 1
        if not one.watchers:
            del _followed[key]


def follow_route(tab: str, kind: str, draw: Callable[[Job], Values]) -> Route:
    """`follow/<tab>/<id>` of a job of the `kind` that a tab shows, which whoever has its id may watch."""

    async def followed(request: Request) -> Response:
        job = await to_thread.run_sync(rooms.here().find, request.path_params["job"])
        if not job or job.kind != kind or not job.readable:
            return PlainTextResponse("no such job", 404)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(follow(job, draw, tab), media_type="text/event-stream", headers=headers)

    return Route(f"{API}/follow/{tab}/{{job}}", followed)


def adapters_route() -> Route:
    """`adapter/<name>` by a name from `download`."""

    def adapter(request: Request) -> Response:
        job = rooms.here().find(rooms.here().signer.opened(request.path_params["name"]))
        if not job or not (job.folder / "adapter").exists():
            return PlainTextResponse("this link is no longer good; reload the page it came from", 404)
        name = f"{job.spec.task}-{job.spec.method}-{job.id[-6:]}.zip"
        return FileResponse(adapters.pack(job.folder / "adapter"), filename=name, headers={"Cache-Control": "no-store"})

    return Route(f"{API}/adapter/{{name}}", adapter)


def gone(what: str) -> str:
    """What is said of a run that somebody had here, and why it is not here, where that is known."""
    since = units.seconds(time.monotonic() - rooms.here().began)
    why = (
        f" This server began {since} ago, and forgets runs when it sleeps or restarts." if rooms.here().forgets else ""
    )
    return remarks(f"{what} is not here any more.{why}")


def download(job: Job) -> FileData | None:
    """The adapter of a run that is over, as a file that its owner's page can fetch for a day; None where there is none."""
    if not job.over or not (job.folder / "adapter").exists():
        return None
    return FileData(path=f"{job.id}.zip", url=f"{API[1:]}/adapter/{rooms.here().signer.opens(job.id)}")
