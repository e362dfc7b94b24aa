"""The Memory tab's sentence and bars: drawn by the page from polynomials, so that a slider asks the server nothing."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from demos.page import look

SLIDERS = ("batch_size", "sequence_length", "rank")
DRAW = f"const SLIDERS = {json.dumps(SLIDERS)};\n" + look.script("words.js", "memory_bars.js")


def bars(value: dict[str, Any], sentence: str) -> gr.HTML:
    """The sentence and the bars, which follow the sliders while these move."""
    return gr.HTML(
        value,
        html_template=f'<h2 class="sentence estimated" aria-live="polite">{sentence}</h2><div class="bars"></div>'
        '<div class="legends"></div><div class="note source"></div>',
        js_on_load=DRAW,
    )
