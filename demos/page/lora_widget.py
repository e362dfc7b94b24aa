"""The LoRA tab's picture and knobs, which the page counts and draws from shapes and terms that Python sends once."""

import json
from collections.abc import Mapping
from html import escape

import gradio as gr

from demos.page import address, controls, look
from peftlab.catalog import PRESETS
from peftlab.methods import METHODS
from peftlab.show.methods import PUBLISHED, preset_says
from peftlab.show.shapes import FAMILY, WORDS

ALPHA = {key: preset for key, preset in PRESETS.items() if key.startswith("alpha")}  # published rules for alpha
CONSTANTS = {
    "WORDS": WORDS,
    "OPENING": {"method": address.METHOD},
    "PRESETS": {
        key: {**preset.settings, "over_rank": preset.alpha_over_rank, "says": escape(preset_says(key))}
        for key, preset in ALPHA.items()
    },
    "PUBLISHED": PUBLISHED,
}
SCRIPT = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in CONSTANTS.items()) + look.script(
    "words.js", "lora_count.js", "lora_toy.js", "lora_picture.js", "lora_widget.js"
)
"""Draws TOP, BELOW and the knobs, and writes what the reader sets in them."""


def knobs() -> gr.HTML:
    """The controls that the page's script reads: method, rank, alpha and the published rules for alpha."""
    return gr.HTML(
        _chooser("method", "Method", "Of those that have a rank", {key: METHODS[key].name for key in FAMILY})
        + _slider("rank", "Rank", controls.described("rank")["info"], 'min="1"')
        + '<div class="alpha-knob">'
        + _slider("alpha", "Alpha", controls.described("alpha")["info"], 'min="0" step="any"')
        + '<button type="button" class="small-button" data-knob="automatic">Automatic alpha</button>'
        + _chooser("preset", "Preset", PUBLISHED, {"": "none", **{key: preset.name for key, preset in ALPHA.items()}})
        + "</div>",
        js_on_load=None,
        elem_classes="knobs",
    )


def _chooser(name: str, label: str, info: str, options: Mapping[str, str]) -> str:
    choices = "".join(f'<option value="{key}">{escape(said)}</option>' for key, said in options.items())
    return (
        f'<label class="chooser"><span>{label}</span><small>{escape(info)}</small>'
        f'<select data-knob="{name}">{choices}</select></label>'
    )


def _slider(name: str, label: str, info: str, of_number: str) -> str:
    """A slider, a box for the same number, and the place where the page refuses it, until the server does."""
    return (
        f'<div class="knob" id="lora-{name}"><span>{label}</span><small>{escape(info)}</small><div>'
        f'<input type="range" data-knob="{name}" aria-label="{label}" min="0" max="64">'
        f'<input type="number" data-knob="{name}" aria-label="number input for {label}" {of_number}></div>'
        f'<p class="problem here" data-of="{name}" role="alert"></p></div>'
    )


TOP = """
<h2 class="sentence" aria-live="polite"></h2>
<div class="problem here" data-of="" role="alert"></div>
<div class="lora-top"><div class="matrices" style="contain: content" role="img"></div></div>
<div class="lora-pair"><p class="note finding"></p><p class="note scale"></p></div>
"""
BELOW = """
<div class="lora-pair">
  <div><h3>Parameters of one adapter, by rank</h3><div class="rank-axis" style="contain: content"></div></div>
  <section aria-label="A small example">
    <div class="toy-ranks" role="group" aria-label="Rank of the small example">A 5 × 5 update, rank
      <button type="button" value="1">1</button><button type="button" value="2">2</button>
      <button type="button" value="3">3</button></div>
    <div class="toy"></div><p class="note toy-said" aria-live="polite"></p></section>
</div>
<h3>Where the parameters are: the whole model, its areas to scale</h3>
<p class="note">Tick a module to give it an A and a B in every chosen layer. Deeper colour: more numbers for each of W's.</p>
<div class="map"></div>
<div class="map-row layer-row"><span class="layers-said" aria-live="polite"></span>
  <div class="layers" role="group" aria-label="Layers, from the first"></div>
  <span class="layer-buttons"><button type="button" class="small-button" data-layers="all">all</button>
  <button type="button" class="small-button" data-layers="first">first half</button>
  <button type="button" class="small-button" data-layers="last">last half</button></span></div>
<dl class="totals" style="contain: content"></dl>
"""
