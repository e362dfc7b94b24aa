"""Tab 2, why so little? W, A and B to scale, and where every trained parameter is."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import methods, page
from peftlab import ParameterReport, RunSpec, SpecError, architecture, count, figures, words
from peftlab.catalog.presets import PRESETS
from peftlab.resolve import with_preset

FIELDS = ("model", "rank", "alpha", "target_modules", "layers")
LESSONS = {
    "Lecture 11.2: Gemma 3 270M, q and v": RunSpec(model="gemma-3-270m", rank=16, target_modules="q_proj,v_proj"),
    "7B, q and v": RunSpec(model="llama-2-7b", rank=8, target_modules="q_proj,v_proj"),
    "70B: thin v": RunSpec(model="llama-2-70b", rank=64, target_modules="q_proj,v_proj"),
    "Past break-even": RunSpec(model="gemma-3-270m", rank=256),
}


def module_table(report: ParameterReport) -> str:
    """Every linear map: its shape, the count for one, and for all layers."""
    rank = report.spec.rank or 0
    rows = "".join(
        f"<tr><td>{escape(m.name.split('.*.')[-1])}<br><small>{escape(m.role)}</small></td><td>{m.d_out:,} × {m.d_in:,}</td>"
        + (
            f"<td>{rank} × ({m.d_in:,} + {m.d_out:,}) = {rank * ((m.d_in or 0) + (m.d_out or 0)):,}</td>"
            f'<td>× {m.adapted_layers}</td><td><b class="trained">{m.trainable:,}</b></td></tr>'
            if m.trainable
            else "<td>frozen</td><td></td><td>0</td></tr>"
        )
        for m in report.modules
        if m.d_in is not None
    )
    tip = (
        "Shapes from transformers' own code on the meta device; the count is rank × (inputs + outputs) for each matrix."
    )
    return (
        f'<div class="wide"><table class="data"><tr><th>matrix {page.how("exact", tip)}</th><th>outputs × inputs</th>'
        f"<th>one adapter</th><th>layers</th><th>trained</th></tr>{rows}"
        f"<tr><td><b>together</b></td><td></td><td></td><td></td><td><b>{report.trainable_parameters:,}</b></td></tr></table></div>"
    )


def finding(report: ParameterReport, shown: Any) -> str:
    """What the rank means for the matrix on screen."""
    rank, even = report.spec.rank or 0, shown.d_in * shown.d_out / (shown.d_in + shown.d_out)
    alpha = report.spec.alpha or 0
    scale = f"ΔW is scaled by alpha / rank = {alpha:g} / {rank} = {words.significant(alpha / rank)}."
    if rank >= even:
        return f"Rank {rank} is past break-even, {even:.0f}: this adapter is larger than the matrix itself. {scale}"
    times = words.significant(even / rank)
    return f"This matrix breaks even at rank {even:.0f} = dk / (d + k), {times} times rank {rank}. {scale}"


def build(spec: gr.State) -> page.View:
    def picture(spec: RunSpec, matrix: str) -> tuple:
        report = count(spec.but(method="lora"))
        linear = [m for m in report.modules if m.d_in is not None and m.trainable]
        shown = next((m for m in linear if m.name == matrix), linear[0])
        names = [(m.name.split(".*.")[-1], m.name) for m in linear]
        return (
            gr.update(choices=names, value=shown.name),
            words.lora_sentence(report),
            figures.matrices(shown, report.spec.rank or 0),
            finding(report, shown),
            figures.themed(figures.rank_curve, shown, report.spec.rank or 0),
            module_table(report),
            page.changed(spec),
        )

    first = picture(page.OPENING, "")
    sentence = page.sentence(first[1])
    with gr.Row(elem_classes="stage"):
        with page.controls():
            page.drawer_handle()
            model = page.model_choice(page.OPENING.model)
            rank = page.slider("rank", 1, 256, page.OPENING.rank or 8)
            alpha = page.text("alpha")
            preset = methods.preset_choice([key for key in PRESETS if key.startswith("alpha")])
            names = architecture.of(page.OPENING.model or "").target_names()
            targets = gr.CheckboxGroup(
                names, value=names, label="Target modules", info="Linear maps that get an A and a B"
            )
            matrix = gr.Dropdown(first[0]["choices"], value=first[0]["value"], label="Matrix on screen")
            with gr.Accordion("Which layers", open=False):
                layers = page.text("layers")
            note = page.note(first[6])
            reset = gr.Button("Reset to automatic", size="sm")
        with gr.Column(elem_classes="main"):
            problem = page.problem()
            drawing = gr.HTML(first[2], elem_classes="figure-to-scale")
            said = page.note(first[3])
            with gr.Row(elem_classes="lessons"):
                lessons = [gr.Button(name, size="sm") for name in LESSONS]
            curve = page.plot(first[4], "Parameters of one adapter by rank, with the break-even rank")
            with gr.Accordion("Where the parameters are", open=False):
                table = gr.HTML(first[5])
            with gr.Accordion("The lecture's counts, recomputed", open=False):
                gr.HTML(page.claims_table("lora"))

    drawn = [matrix, sentence, drawing, said, curve, table, note]

    def values(spec: RunSpec) -> tuple:
        """The controls of a spec; a fused or unknown choice shows as its own modules."""
        known = architecture.of(spec.model or "")
        names = known.target_names()
        chosen = known.targets(spec.target_modules or "all-linear")
        ticked = [n for n, m in zip(names, known.linear(), strict=True) if m in chosen]
        return spec.model, spec.rank or 8, spec.alpha, gr.update(choices=names, value=ticked), spec.layers or ""

    def update(
        spec: RunSpec, matrix: str, model: str, rank: int, alpha: float, ticked: list[str], layers: str
    ) -> tuple:
        if not ticked:
            raise SpecError("no target module is ticked: nothing would be trained; tick at least one")
        page.public({"model": model})
        names, boxes = architecture.of(model).target_names(), gr.skip()  # boxes come back only when they must change
        if model != spec.model:
            spec = spec.but(model=model, target_modules=None, layers=None)
            ticked, layers, boxes = names, "", gr.update(choices=names, value=names)
        wanted = "all-linear" if len(ticked) == len(names) else ",".join(n for n in names if n in ticked)
        spec, _ = methods.edit(spec.but(method="lora"), FIELDS, (model, rank, alpha, wanted, layers))
        return (spec, boxes, *picture(spec, matrix))

    show = page.refusing(  # a bare count from another tab has nothing to draw
        lambda spec, matrix="": (*values(spec), *picture(spec, matrix)), len(FIELDS) + len(drawn)
    )
    fields = [model, rank, alpha, targets, layers]
    refresh = [problem, spec, targets, *drawn]
    gr.on(
        [control.input for control in (*fields, matrix)],
        page.changing(page.refusing(update, len(refresh) - 1)),
        [spec, matrix, *fields],
        refresh,
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    shown = [problem, *fields, *drawn]

    def use_preset(spec: RunSpec, key: str) -> tuple:
        spec = with_preset(spec, PRESETS[key]) if key else spec
        return (spec, methods.preset_says(key), *show(spec))

    preset.input(
        page.changing(use_preset),
        [spec, preset],
        [spec, preset, *shown],
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    for button, lesson in zip(lessons, LESSONS.values(), strict=True):
        button.click(
            page.changing(lambda lesson=lesson: (lesson, *show(lesson))),
            None,
            [spec, *shown],
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
    reset.click(
        page.changing(lambda spec: (plain := RunSpec(model=spec.model, method="lora", task=spec.task), *show(plain))),
        spec,
        [spec, *shown],
        show_progress="hidden",
        api_visibility="private",
    )
    return page.View(show, shown, [matrix])


if __name__ == "__main__":
    page.run_alone("LoRA visualizer", build)
