"""Tab 2, why so little? W, A and B to scale, and where every trained parameter is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import lora_widget, methods, page, proving, real_weights
from demos.adapter_choice import bundled, choices
from peftlab import RunSpec, SpecError, architecture, count, figures, resolve, scratch, words
from peftlab.catalog.presets import PRESETS
from peftlab.methods import METHODS
from peftlab.resolve import with_preset

TAB = "lora"
LESSONS = {
    "Lecture 11.2: Gemma 3 270M, q and v": RunSpec(model="gemma-3-270m", rank=16, target_modules="q_proj,v_proj"),
    "7B, q and v": RunSpec(model="llama-2-7b", rank=8, target_modules="q_proj,v_proj"),
    "70B: thin v": RunSpec(model="llama-2-70b", rank=64, target_modules="q_proj,v_proj"),
    "Past break-even": RunSpec(model="gemma-3-270m", rank=256),
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


def build(spec: gr.State, mine: gr.BrowserState) -> page.View:
    changing = partial(page.changing, TAB)
    with gr.Row(elem_classes="stage"):
        with page.controls():
            page.drawer_handle()
            model = page.model_choice(page.OPENING.model)
            lora_widget.knobs(page.OPENING)
            preset = methods.preset_choice([key for key in PRESETS if key.startswith("alpha")])
            note = page.note(page.changed(page.OPENING))
            reset = gr.Button("Reset to automatic", size="sm")
        with gr.Column(elem_classes="main"):
            problem = page.problem()
            picture = lora_widget.picture(
                lora_widget.value(page.OPENING), words.lora_sentence(count(lora_widget.of_family(page.OPENING)))
            )
            with gr.Row(elem_classes="lessons"):
                lessons = [gr.Button(name, size="sm") for name in LESSONS]
            lora_widget.rest()
            with gr.Accordion("Four ways to change the forward pass", open=False):
                paths = gr.HTML(flows(page.OPENING.model or ""))
            with gr.Accordion("Percent against model size", open=False):
                sizes = page.plot(by_size(page.OPENING), "LoRA's trained percent by the size of the model")
            first = next(iter(bundled()))
            with gr.Accordion("The mathematics, on real weights", open=False):
                another = real_weights.build(first)
            with gr.Accordion("Proofs by doing", open=False):
                proved = proving.build(list(bundled())[-1])
            with gr.Accordion("From scratch: the layer in plain torch", open=False), gr.Row(elem_classes="panes"):
                with gr.Column():
                    script = _code(code(page.OPENING), "Runs as it is; its output equals peft's")
                with gr.Column():
                    _code(scratch.LECTURE, "Lecture 11.2's own, which raises when it merges")
            with gr.Accordion("Why the lecture's merge_weights raises", open=False):
                gr.Markdown(scratch.WHY)
            with gr.Accordion("The lectures' tables, recomputed", open=False):
                gr.HTML(page.claims_table("lora") + notes())

    def body(spec: RunSpec) -> tuple:
        count(lora_widget.of_family(spec))  # refuses what has nothing to train
        return spec.model, lora_widget.value(spec), flows(spec.model or ""), *beside(spec)

    def beside(spec: RunSpec) -> tuple:
        """What follows the settings outside the picture."""
        return page.changed(spec), by_size(spec), code(spec)

    def choose(spec: RunSpec, model: str) -> tuple:
        page.public({"model": model})
        chosen = spec.but(model=model, target_modules=None, layers=None)
        return (chosen, *body(chosen))

    def reported(event: gr.EventData, request: gr.Request, spec: RunSpec) -> tuple:
        """The settings once the reader has paused, unless they are of a model that is no longer on screen."""
        if event.model != spec.model:
            return (gr.skip(),) * 5
        return changing(page.refusing(settle, 4))(request, spec, event.settings)

    def settle(spec: RunSpec, settings: Mapping[str, Any]) -> tuple:
        chosen = lora_widget.settled(spec, settings)
        count(chosen)
        return chosen, *beside(chosen)

    def use_preset(spec: RunSpec, key: str) -> tuple:
        spec = with_preset(lora_widget.of_family(spec), PRESETS[key]) if key else spec
        return (spec, methods.preset_says(key), *show(spec))

    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    show = page.refusing(body, 6)  # a bare count from another tab has nothing to draw
    followers = [note, sizes, script]
    shown = [problem, model, picture, paths, *followers]
    model.input(changing(page.refusing(choose, 7)), [spec, model], [problem, spec, *shown[1:]], **quiet)
    picture.submit(reported, spec, [problem, spec, *followers], trigger_mode="multiple", **quiet)
    preset.input(changing(use_preset), [spec, preset], [spec, preset, *shown], **quiet)
    for button, lesson in zip(lessons, LESSONS.values(), strict=True):
        button.click(changing(lambda lesson=lesson: (lesson, *show(lesson))), None, [spec, *shown], **quiet)
    reset.click(
        changing(lambda spec: (plain := RunSpec(model=spec.model, task=spec.task), *show(plain))),
        spec,
        [spec, *shown],
        **quiet,
    )

    def known(mine: list[str]) -> tuple:
        return (gr.update(choices=choices(mine)),) * 2

    return page.View(TAB, show, shown, opened=page.Event(known, [mine], [another, proved]))


def _code(text: str, label: str) -> gr.Code:
    return gr.Code(text, language="python", label=label, wrap_lines=True, interactive=False)


if __name__ == "__main__":
    page.run_alone("LoRA visualizer", lambda spec: build(spec, gr.BrowserState([])))
