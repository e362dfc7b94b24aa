"""The Memory tab's assumptions about use: how many tasks and streams, at what price and speed."""

from __future__ import annotations

import gradio as gr
from gradio.components import Component

from demos.page import choice
from demos.page.controls import slider_of
from peftlab.catalog import PRICE as ASSUMED_PRICE
from peftlab.memory.measured import measured_utilisation

TASKS = choice.number("tasks", 50, 1, 1000)
STREAMS = choice.number("streams", 16, 1, 256)
CONTEXT = choice.number("context", 2048, 256, 32768)
PRICE = choice.number("price", ASSUMED_PRICE, 0, 1e6, whole=False)
UTILISATION = choice.number("utilisation", round(100 * measured_utilisation(), 1), 0.1, 100, whole=False)
CHOICES = {"tasks": TASKS, "streams": STREAMS, "context": CONTEXT, "price": PRICE, "utilisation": UTILISATION}


def controls() -> dict[str, Component]:
    """A control of each choice."""
    price, peak = "In your currency; an assumption, type yours", "Of the bf16 peak; measured on an H100"
    with gr.Row(elem_classes="view"):
        return {
            "tasks": slider_of(TASKS, "Tasks", "One adapted model for each"),
            "streams": slider_of(STREAMS, "Answers at once", "Streams that are served together"),
            "context": slider_of(CONTEXT, "Tokens each keeps", "Prompt and answer, in the cache", step=256),
            "price": gr.Number(PRICE.usual, minimum=0, label="Price of a GPU hour", info=price),
            "utilisation": gr.Number(UTILISATION.usual, minimum=0.1, maximum=100, label="Utilisation, %", info=peak),
        }
