"""peftlab: assembles the tabs and launches. `python app.py`, or the entry point of a Hugging Face Space."""

import os
import signal
import sys
import threading
import time

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  it must claim the shared GPU before anything touches CUDA

from html import escape
from io import TextIOWrapper

import gradio as gr
import psutil
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from demos.live_finetune import Live
from demos.lora_visualizer import Lora
from demos.memory_calculator import Memory
from demos.method_map import Methods
from demos.method_race import Race
from demos.page import logs, look, served
from demos.page.store import blocks
from demos.side_by_side import Compare
from peftlab import hardware, seam, units
from peftlab.base import fetching
from peftlab.base.models import DEFAULT, MODELS
from peftlab.errors import PeftlabError, SpecError
from peftlab.room import host, rooms, worker
from peftlab.room.preparing import Preparation
from peftlab.show.marks import how

BEGUN = psutil.Process().create_time()
"""When this process began, in seconds since 1970."""
LEAVING = 9.0
"""Seconds in which a server that is told to end does so, with a run under way kept; many a host kills it after ten."""
WAKING = 0.5
"""Seconds after which the main thread wakes: a signal that another thread gets, as with a GPU, is handled only then."""
FOLLOW = """
const look = async (method) => {
  const told = await fetch('gradio_api/peftlab/base', {method}).then((answer) => answer.json()).catch(() => ({again: true}));
  if (told.chip) props.value = told.chip;
  if (told.again) setTimeout(look, 1000, 'GET');
};
element.addEventListener('click', ({target}) => { if (target.closest('button')) look('POST'); });
look('GET');
"""
"""Shows how far the base model is, until it is ready or has failed: one small request, where a timer of Gradio's takes two."""

FORGETS = " · Runs and adapters are forgotten when this server sleeps or restarts: download what you want to keep."

preparation = Preparation(DEFAULT, lambda: rooms.here().busy() or worker.busy())


def chip() -> str:
    """The state of the base model, in a line."""
    name, p = MODELS[DEFAULT].name, preparation.progress
    if preparation.ready_at is not None:
        source = fetching.source_of(MODELS[DEFAULT])
        took = f"ready {units.seconds(preparation.ready_at - BEGUN)} after the server began"
        tip = f"{source.where}; {source.precision}; sha256 {source.sha256[:16]}; {took}" if source else took
        return f"{escape(name)} is ready {how('verified', tip)}{FORGETS if rooms.here().forgets else ''}"
    if preparation.error:
        again = '<button type="button" class="small-button">Try again</button>'
        return f'<span class="bad">{escape(preparation.error)}</span> {again}'
    amount = f": {units.size(p.done)} of {units.size(p.total)}" if p.total and p.stage == "downloading" else ""
    since = units.seconds(time.time() - BEGUN)
    return f"{escape(name)}: {p.stage} {escape(p.detail)}{amount}, {since} after the server began"


def told(request: Request) -> Response:
    """The chip, and whether it will change; a POST has the model made ready once more, after a failure."""
    if request.method == "POST":
        preparation.begin()
    again = not (
        preparation.ready or preparation.error
    )  # before it is said: what ends meanwhile is asked for once more
    return JSONResponse({"chip": chip(), "again": again})


def healthy(_: Request) -> Response:
    """For whoever watches the server: that it answers, how far the base model is, and whether somebody has a run."""
    model = "ready" if preparation.ready else "failed" if preparation.error else preparation.progress.stage
    return JSONResponse({"status": "ok", "model": model, "busy": rooms.here().busy()})


def head() -> None:
    about = "<h1>peftlab</h1><p>Fine-tune a fraction of a model, and check every number.</p>"
    gr.HTML(f'<header class="brand">{about}</header>', js_on_load=None)


def foot() -> None:
    gr.HTML(chip(), html_template='<div class="chip">${value}</div>', js_on_load=FOLLOW)


demo = blocks(Memory(), Lora(), Live(), Compare(), Methods(), Race(), head=head, foot=foot)
demo.routes.append(Route(f"{served.API}/base", told, methods=["GET", "POST"]))
demo.routes += [Route(path, healthy) for path in ("/healthz", f"{served.API}/healthz")]


def end_by_signal(ended: threading.Event) -> None:
    """Has Ctrl-C and a host's SIGTERM set the event: an exception could come where it is lost."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())


def main() -> None:
    """Serves until it is told to end. Raises PeftlabError where it cannot begin."""
    seam.quiet()
    hardware.hold_little()
    logs.to_stderr(host.settings().log)  # a setting that cannot be is said before anything is served
    rooms.here()
    ended = threading.Event()
    end_by_signal(ended)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log shows the address at once
    demo.queue(default_concurrency_limit=8, max_size=256)
    # Where it renders on the server behind a prefix, Gradio 6.31 asks itself without end.
    rendering = False if os.environ.get("GRADIO_ROOT_PATH") else None
    demo.launch(**look.launch_options(demo.routes), prevent_thread_lock=True, ssr_mode=rendering)
    end_by_signal(ended)  # once more, because Gradio sets its own where a page is rendered on the server
    preparation.begin()  # only now, because loading a model library would hold up the page's first answer
    threading.Thread(target=demo.store.prepare, daemon=True, name="beforehand").start()
    while not ended.wait(WAKING):
        pass
    begun = time.monotonic()
    preparation.stop()
    rooms.here().leave(LEAVING - (time.monotonic() - begun))
    sys.stdout.flush()
    if node := getattr(demo, "node_process", None):  # it renders pages on the server, and would go on alone
        node.kill()
    os._exit(0)  # whatever is still under way


if __name__ == "__main__":
    try:
        main()
    except PeftlabError as error:
        print(f"peftlab: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, SpecError) else 1)
