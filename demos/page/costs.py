"""What the Memory tab says below its picture: GPUs, room, time, money, disk, serving, conventions and measurements."""

from __future__ import annotations

from typing import Any

import gradio as gr

from demos.page import choice
from peftlab.memory.measured import measured_utilisation

CHOICES = {
    "tasks": choice.number("tasks", 50, 1, 1000),
    "streams": choice.number("streams", 16, 1, 256),
    "context": choice.number("context", 2048, 256, 32768),
    "price": choice.number("price", 2.5, 0, 1e6, whole=False),
    "utilisation": choice.number("utilisation", round(100 * measured_utilisation(), 1), 0.1, 100, whole=False),
}
"""Tasks to store, answers written at once, tokens each keeps, price of a GPU hour, and utilisation in percent."""


def controls() -> dict[str, Any]:
    """A control of each choice."""
    tasks, streams, context, price, utilisation = (one.usual for one in CHOICES.values())
    with gr.Row(elem_classes="view"):
        made = (
            gr.Slider(1, 1000, tasks, step=1, label="Tasks", info="One adapted model for each"),
            gr.Slider(1, 256, streams, step=1, label="Answers at once", info="Streams that are served together"),
            gr.Slider(256, 32768, context, step=256, label="Tokens each keeps", info="Prompt and answer, in the cache"),
            gr.Number(price, minimum=0, label="Price of a GPU hour", info="In your currency; an assumption, type yours"),
            gr.Number(
                utilisation, minimum=0.1, maximum=100, label="Utilisation, %", info="Of the bf16 peak; measured on an H100"
            ),
        )  # fmt: skip
    return dict(zip(CHOICES, made, strict=True))
