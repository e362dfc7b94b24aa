"""peftlab: assembles the tabs and launches. `python app.py`, or the entry point of a Hugging Face Space."""

import os
import signal
import sys

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  it must claim the shared GPU before anything touches CUDA

from html import escape
from io import TextIOWrapper

import gradio as gr

from demos.live_finetune import Live
from demos.lora_visualizer import Lora
from demos.memory_calculator import Memory
from demos.method_map import Methods
from demos.method_race import Race
from demos.page import look
from demos.page.store import blocks
from demos.page.tab import QUIET
from demos.side_by_side import Compare
from peftlab import seam, units
from peftlab.base import fetching, weights
from peftlab.base.models import DEFAULT, MODELS
from peftlab.room import rooms
from peftlab.room.preparing import Preparation
from peftlab.show.marks import how

preparation = Preparation(DEFAULT, lambda: rooms.here().busy())


def chip() -> str:
    """The state of the base model, in a line."""
    name, p = MODELS[DEFAULT].name, preparation.progress
    if preparation.ready:
        source = fetching.source_of(MODELS[DEFAULT])
        tip = f"{source.where}; {source.precision}; sha256 {source.sha256[:16]}" if source else ""
        return f"{escape(name)} is ready {how('verified', tip)}"
    if preparation.error:
        return f'<span class="bad">{escape(preparation.error)}</span>'
    amount = f": {units.size(p.done)} of {units.size(p.total)}" if p.total and p.stage == "downloading" else ""
    return f"{escape(name)}: {p.stage} {escape(p.detail)}{amount}"


def watch() -> tuple[str, gr.Timer, gr.Button]:
    """The chip; a timer, which ticks until the model is ready; and the button for a second try, after a failure."""
    failed = preparation.error is not None
    return chip(), gr.Timer(active=not (preparation.ready or failed)), gr.Button(visible=failed)


def try_again() -> tuple[str, gr.Timer, gr.Button]:
    preparation.begin()
    return watch()


def head() -> None:
    about = "<h1>peftlab</h1><p>Fine-tune a fraction of a model, and check every number.</p>"
    gr.HTML(f'<header class="brand">{about}</header>', js_on_load=None)


def foot() -> None:
    with gr.Row(elem_classes="foot"):
        state = gr.HTML(chip(), html_template='<div class="chip">${value}</div>', js_on_load=None)
        again = gr.Button("Try again", visible=False, size="sm", scale=0)
    tick = gr.Timer(1.0)
    tick.tick(watch, None, [state, tick, again], **QUIET)
    again.click(try_again, None, [state, tick, again], **QUIET)


demo = blocks(Memory(), Lora(), Live(), Compare(), Methods(), Race(), head=head, foot=foot)


def main() -> None:
    seam.quiet()
    rooms.here()  # a setting that cannot be is said before anything is served
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a host ends the page as Ctrl-C does
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a log shows the address at once
    if os.environ.get("SPACES_ZERO_GPU"):
        weights.load(preparation.spec)  # at module scope, where a shared GPU wants the weights
    demo.queue(default_concurrency_limit=8, max_size=256)
    try:
        demo.launch(**look.launch_options(demo.routes), prevent_thread_lock=True)
        preparation.begin()  # only now, because loading a model library would hold up the page's first answer
        demo.block_thread()
    except KeyboardInterrupt:  # before it blocks; from there on Gradio closes by itself
        demo.close()
    preparation.stop()
    sys.stdout.flush()
    os._exit(0)  # ends a run that is under way, too: whoever ends the server does not wait for it


if __name__ == "__main__":
    main()
