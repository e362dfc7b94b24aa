"""Tab 2, why so little? W, A and B to scale, and where every trained parameter is."""

import json
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import proving, real_weights
from demos.page import address, controls, look, store
from demos.page.tab import Asked, Slow, Tab, Values
from peftlab import RunSpec, SpecError, count, resolve
from peftlab.base.models import MODELS, find
from peftlab.catalog import PRESETS
from peftlab.methods import METHODS
from peftlab.room import quota
from peftlab.show import lora, settings, shapes, statements
from peftlab.show.methods import PUBLISHED, preset_says

LESSONS = {
    "Lecture 11.2: Gemma 3 270M, q and v": RunSpec(model="gemma-3-270m", rank=16, target_modules="q_proj,v_proj"),
    "7B, q and v": RunSpec(model="llama-2-7b", rank=8, target_modules="q_proj,v_proj"),
    "70B: thin v": RunSpec(model="llama-2-70b", rank=64, target_modules="q_proj,v_proj"),
    "Past break-even": RunSpec(model="gemma-3-270m", rank=512),
}
ALPHA = {key: preset for key, preset in PRESETS.items() if key.startswith("alpha")}  # published rules for alpha
CONSTANTS = {
    "WORDS": shapes.WORDS,
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


class Lora(Tab):
    """The LoRA visualizer."""

    key, title = "lora", "LoRA"
    choices = {**real_weights.CHOICES, **proving.CHOICES}

    def settings(self) -> None:
        self.control("model", controls.model_choice(address.MODEL))
        knobs()
        self.panel("changed", controls.note())
        controls.reset("model", "task")

    def pictures(self) -> None:
        self.panel("problem", controls.problem())
        self.panel("picture", gr.HTML(html_template=TOP, js_on_load=SCRIPT, elem_classes="drawn"))
        controls.lessons({name: address.link(spec) for name, spec in LESSONS.items()})
        gr.HTML(BELOW, js_on_load=None, elem_classes="drawn")
        self.fold_of("Four ways to change the forward pass", "flows")
        with self.fold("Percent against model size"):
            self.panel("by_size", controls.plot(None, "LoRA's trained percent by the size of the model"))
        with self.fold("The mathematics, on real weights"):
            real_weights.build(self)
        with self.fold("Proofs by doing"):
            proving.build(self)
        with self.fold("From scratch: the layer in plain torch"), gr.Row(elem_classes="panes"):
            with gr.Column():
                self.panel("code", _code("", "Runs as it is; its output equals peft's"))
            with gr.Column():
                _code(lora.LECTURE, "Lecture 11.2's own, which raises when it merges")
        with self.fold("Why the lecture's merge_weights raises"):
            gr.Markdown(lora.WHY)
        self.fold_of("The lectures' tables, recomputed", "tables")

    def check(self, asked: Asked) -> None:
        entry, shown = find(asked.run.model), MODELS[address.MODEL].name
        if entry.config is None:
            raise SpecError(
                f"model={entry.key}: a bare count has no matrices to draw; {shown} is shown, or choose a model"
            )
        count(resolve(shapes.of_family(asked.spec)))
        real_weights.check(asked)

    def fill(self, asked: Asked) -> dict[str, object]:
        return {**super().fill(asked), "proof_prompt": proving.prompt(asked), **real_weights.fill(asked)}

    def draw(self, asked: Asked) -> Values:
        spec = asked.spec
        return {
            "picture": lambda: shapes.value(spec, asked.refused),
            "changed": lambda: settings.changed(spec),
            "flows": lambda: lora.flows(asked.run.model),
            "by_size": lambda: lora.by_size(spec),
            **real_weights.draw(asked),
            **proving.draw(asked),
            "code": lambda: lora.code(spec),
            "tables": lambda: statements.tab_table("lora").html + lora.notes(),
        }

    def costs(self, asked: Asked) -> dict[str, quota.Asks]:
        return proving.costs(asked)

    def slow(self, asked: Asked) -> list[Slow]:
        return real_weights.slow(asked)


def knobs() -> gr.HTML:
    """The controls that the page's script reads: method, rank, alpha and the published rules for alpha."""
    return gr.HTML(
        _chooser("method", "Method", "Of those that have a rank", {key: METHODS[key].name for key in shapes.FAMILY})
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


def _code(text: str, label: str) -> gr.Code:
    return gr.Code(text, language="python", label=label, wrap_lines=True, interactive=False)


if __name__ == "__main__":
    store.run_alone(Lora())
