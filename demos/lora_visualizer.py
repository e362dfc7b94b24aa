"""Tab 2, why so little? W, A and B to scale, and where every trained parameter is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import lora_widget, methods, page
from peftlab import RunSpec, count, words
from peftlab.catalog.presets import PRESETS
from peftlab.resolve import with_preset

FIELDS = ("method", "rank", "alpha", "target_modules", "layers")
LESSONS = {
    "Lecture 11.2: Gemma 3 270M, q and v": RunSpec(model="gemma-3-270m", rank=16, target_modules="q_proj,v_proj"),
    "7B, q and v": RunSpec(model="llama-2-7b", rank=8, target_modules="q_proj,v_proj"),
    "70B: thin v": RunSpec(model="llama-2-70b", rank=64, target_modules="q_proj,v_proj"),
    "Past break-even": RunSpec(model="gemma-3-270m", rank=256),
}


def build(spec: gr.State) -> page.View:
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
            with gr.Accordion("The lecture's counts, recomputed", open=False):
                gr.HTML(page.claims_table("lora"))

    def body(spec: RunSpec) -> tuple:
        count(lora_widget.of_family(spec))  # refuses what has nothing to train
        return spec.model, lora_widget.value(spec), page.changed(spec)

    def choose(spec: RunSpec, model: str) -> tuple:
        page.public({"model": model})
        chosen = spec.but(model=model, target_modules=None, layers=None)
        return (chosen, *body(chosen))

    def reported(event: gr.EventData, request: gr.Request, spec: RunSpec) -> tuple:
        """The settings once the reader has paused, unless they are of a model that is no longer on screen."""
        if event.model != spec.model:
            return (gr.skip(),) * 3
        given = event.settings
        return page.changing(page.refusing(settle, 2))(request, spec, [given.get(name) for name in FIELDS])

    def settle(spec: RunSpec, values: list[Any]) -> tuple:
        chosen, _ = methods.edit(lora_widget.of_family(spec), FIELDS, values)
        count(chosen)
        return chosen, page.changed(chosen)

    def use_preset(spec: RunSpec, key: str) -> tuple:
        spec = with_preset(lora_widget.of_family(spec), PRESETS[key]) if key else spec
        return (spec, methods.preset_says(key), *show(spec))

    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    show = page.refusing(body, 3)  # a bare count from another tab has nothing to draw
    shown = [problem, model, picture, note]
    model.input(page.changing(page.refusing(choose, 4)), [spec, model], [problem, spec, model, picture, note], **quiet)
    picture.submit(reported, spec, [problem, spec, note], trigger_mode="multiple", **quiet)
    preset.input(page.changing(use_preset), [spec, preset], [spec, preset, *shown], **quiet)
    for button, lesson in zip(lessons, LESSONS.values(), strict=True):
        button.click(page.changing(lambda lesson=lesson: (lesson, *show(lesson))), None, [spec, *shown], **quiet)
    reset.click(
        page.changing(lambda spec: (plain := RunSpec(model=spec.model, task=spec.task), *show(plain))),
        spec,
        [spec, *shown],
        **quiet,
    )
    return page.View(show, shown)


if __name__ == "__main__":
    page.run_alone("LoRA visualizer", build)
