"""Tab 2, why so little? W, A and B to scale, and where every trained parameter is."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import lora_widget, page, proving, real_weights
from demos.tab import Asked, Draw, Slow, Tab
from peftlab import RunSpec, SpecError, architecture, count, figures, resolve, scratch, words
from peftlab.catalog.models import DEFAULT, find
from peftlab.methods import METHODS

LESSONS = {
    "Lecture 11.2: Gemma 3 270M, q and v": RunSpec(model="gemma-3-270m", rank=16, target_modules="q_proj,v_proj"),
    "7B, q and v": RunSpec(model="llama-2-7b", rank=8, target_modules="q_proj,v_proj"),
    "70B: thin v": RunSpec(model="llama-2-70b", rank=64, target_modules="q_proj,v_proj"),
    "Past break-even": RunSpec(model="gemma-3-270m", rank=512),
}
FLOWS = {
    "lora": "In parallel: the update is added to what W computes.",
    "houlsby": "In series: a small network after each sub-layer, which the data must pass.",
    "ia3": "Scaling: one learned number multiplies each feature.",
    "prompt": "Virtual tokens: learned vectors before the text, at the input alone.",
    "prefix": "Virtual tokens in every layer: learned keys and values before the text's own.",
}
"""Where a method touches the data."""

NOTES = (
    (
        "It calls B (d × r) the down-projection and A (r × k) the up-projection. It is the other way round: A projects down to "
        "r numbers, B projects up again.",
        "lecture-11-2, The Low-Rank Adaptation Hypothesis",
    ),
    (
        "It says that the percentage stays constant across model scales. At a fixed rank it falls as a model widens, as "
        "r(d + k) / dk; only the lecture's own extrapolation is constant.",
        "lecture-11-2, LoRA Parameter Counts",
    ),
    (
        "What it calls the reduction factor, r(d + k) / dk, is the share that remains, not how many times fewer.",
        "lecture-11-2, LoRA: Parameter Count",
    ),
    (
        "2 · d · r for a weight is right for a square matrix only. In general it is r(d + k), and Llama 3.1 8B's v is "
        "1,024 × 4,096.",
        "vanderbilt-slides, LoRA flavors",
    ),
)
"""What the lectures say of LoRA without a number, and how it is."""


def notes() -> str:
    said = "".join(f"<li>{escape(text)} <small>{escape(source)}</small></li>" for text, source in NOTES)
    return f'<ul class="notes">{said}</ul>'


def flows(model: str) -> str:
    """Each way to change the forward pass, drawn, with what it trains on this model."""

    def card(key: str, says: str) -> str:
        try:
            report = count(RunSpec(model=model, method=key))
            trains = f"{report.trainable_parameters:,} parameters: {words.percent(report.trainable_percent / 100)}"
        except SpecError as error:
            trains = escape(str(error))
        name = METHODS[key].name
        return f"<section><h3>{name}</h3>{figures.data_path(METHODS[key].drawing, name)}<p>{says} <b>{trains}</b></p></section>"

    return f'<div class="flows">{"".join(card(key, says) for key, says in FLOWS.items())}</div>'


def code(spec: RunSpec) -> str:
    """A LoRA layer from scratch with the settings on screen, for the first matrix that they adapt."""
    of = resolve(lora_widget.of_family(spec))
    module = architecture.of(of.model or "").targets(of.target_modules or "all-linear")[0]
    rank = min(of.rank or 1, module.d_in, module.d_out)
    return scratch.lora_layer(module.d_in, module.d_out, rank, of.alpha or 2.0 * rank)


def by_size(spec: RunSpec) -> dict[str, Any]:
    of = resolve(lora_widget.of_family(spec))
    return figures.themed(figures.percent_by_size, of.rank, of.target_modules, of.model)


class Lora(Tab):
    """The LoRA visualizer."""

    key, title = "lora", "LoRA"
    choices = {**real_weights.CHOICES, **proving.CHOICES}

    def build(self) -> None:
        with gr.Row(elem_classes="stage"):
            with page.controls():
                page.drawer_handle()
                self.control("model", page.model_choice(page.OPENING.model))
                lora_widget.knobs()
                self.panel("changed", page.note())
                page.reset("model", "task")
            with gr.Column(elem_classes="main"):
                self._pictures()

    def _pictures(self) -> None:
        self.panel("problem", page.problem())
        self.panel("picture", lora_widget.picture())
        page.lessons({name: page.link(spec) for name, spec in LESSONS.items()})
        lora_widget.rest()
        with self.fold("Four ways to change the forward pass"):
            self.panel("flows", gr.HTML())
        with self.fold("Percent against model size"):
            self.panel("by_size", page.plot(None, "LoRA's trained percent by the size of the model"))
        with self.fold("The mathematics, on real weights"):
            real_weights.build(self)
        with self.fold("Proofs by doing"):
            proving.build(self)
        with self.fold("From scratch: the layer in plain torch"), gr.Row(elem_classes="panes"):
            with gr.Column():
                self.panel("code", _code("", "Runs as it is; its output equals peft's"))
            with gr.Column():
                _code(scratch.LECTURE, "Lecture 11.2's own, which raises when it merges")
        with self.fold("Why the lecture's merge_weights raises"):
            gr.Markdown(scratch.WHY)
        with self.fold("The lectures' tables, recomputed"):
            self.panel("tables", gr.HTML())

    def check(self, asked: Asked) -> None:
        entry = find(asked.spec.model or DEFAULT)
        if entry.config is None:
            shown = find(page.OPENING.model or DEFAULT).name
            raise SpecError(
                f"model={entry.key}: a bare count has no matrices to draw; {shown} is shown, or choose a model"
            )
        count(lora_widget.of_family(asked.spec))
        real_weights.check(asked)

    def fill(self, asked: Asked) -> dict[str, Any]:
        return {"model": page.shown_model(asked.spec), **real_weights.fill(asked), **proving.fill(asked)}

    def draw(self, asked: Asked) -> dict[str, Draw]:
        spec = asked.spec
        return {
            "picture": lambda: lora_widget.value(spec, asked.refused),
            "changed": lambda: page.changed(spec),
            "flows": lambda: flows(spec.model or DEFAULT),
            "by_size": lambda: by_size(spec),
            **real_weights.draw(asked),
            **proving.draw(asked),
            "code": lambda: code(spec),
            "tables": lambda: page.claims_table("lora") + notes(),
        }

    def slow(self, asked: Asked) -> list[Slow]:
        return real_weights.slow(asked)


def _code(text: str, label: str) -> gr.Code:
    return gr.Code(text, language="python", label=label, wrap_lines=True, interactive=False)


if __name__ == "__main__":
    page.run_alone(Lora())
