"""Tab 1, what does it cost? Full fine-tuning beside the chosen method, and which GPUs hold it."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import methods, page
from peftlab import MemoryReport, RunSpec, figures, predict, words
from peftlab.catalog.models import DEFAULT, find
from peftlab.memory import CONVENTIONS, Fit, fits, storage
from peftlab.memory.conventions import EXACT

BY_METHOD = ("rank", "virtual_tokens", "bottleneck", "block_size", "train_norms", "target_modules")
"""Settings that some methods read and counts depend on."""
FIELDS = ("model", "method", *BY_METHOD, "precision", "quantization", "optimizer", "gpu")
LESSONS = {
    "Llama 3.1 8B": (RunSpec(model="llama-3.1-8b"), "12n"),
    "Gemma 3 270M (lecture 11.2)": (RunSpec(model="gemma-3-270m", rank=16), "12n"),
    "70B (lecture 11.2)": (RunSpec(model="llama-3.1-70b", rank=64), "12n"),
    "100B (KIIT tutorial)": (RunSpec(model="100B"), "8n"),
    "QLoRA 70B": (RunSpec(model="llama-3.1-70b", method="qlora", rank=64), EXACT),
}
NOT_INCLUDED = (
    "<b>Not in these bars:</b> activations, logits and the CUDA context. They grow with batch and length, and this page does "
    "not predict them yet. The real peak is higher."
)

LEGEND = "".join(
    f'<span class="legend"><span class="key {colour}"></span>{name}</span> ' for _, colour, name in figures.COMPONENTS
)


def pair(spec: RunSpec, convention: str, share: float) -> tuple[MemoryReport, MemoryReport]:
    """Full fine-tuning and the chosen method; `share` (percent) is trained where the model is only a number."""
    entry = find(spec.model or DEFAULT)
    trainable = None if entry.config else max(1, round(entry.total_parameters * share / 100))
    plain = spec.but(method="full", quantization=None)
    return predict(plain, convention), predict(spec, convention, trainable)


def numbers(full: MemoryReport, chosen: MemoryReport) -> str:
    """The bars in words and numbers, with how each is known."""
    rule = CONVENTIONS.get(chosen.convention)
    tip = (
        f"{rule.name}. {rule.note} Source: {rule.source}."
        if rule
        else "From the run's own precisions and exact counts."
    )
    reports = [full] if chosen.spec.method == "full" else [full, chosen]
    rows = "".join(
        f'<tr><td><span class="key {colour}"></span>{name}</td>'
        + "".join(f"<td>{words.size(getattr(r, field))}</td>" for r in reports)
        + "</tr>"
        for field, colour, name in figures.COMPONENTS
    )
    heads = "".join(f"<th>{escape(words.method_name(r))}</th>" for r in reports)
    sums = "".join(f"<td><b>{words.size(r.states)}</b></td>" for r in reports)
    trained = "".join(f"<td>{r.trainable_parameters:,}</td>" for r in reports)
    return (
        f'<div class="wide"><table class="data"><tr><th>{page.how("exact", tip)}</th>{heads}</tr>{rows}'
        f"<tr><td>sum</td>{sums}</tr><tr><td>trained parameters</td>{trained}</tr></table></div>"
    )


def gpu_grid(full: MemoryReport, chosen: MemoryReport) -> str:
    """Each GPU of the catalogue: how many of it hold the states."""
    if full.states is None or chosen.states is None:
        return ""

    def cell(fit: Fit) -> str:
        mark = "good" if fit.n_gpus == 1 else "bad"
        return f'<td class="{mark}">{"fits" if fit.n_gpus == 1 else f"needs {fit.n_gpus:,}"}</td>'

    rows = "".join(
        f"<tr><td>{escape(words.gpu_name(a))}</td><td>{a.gpu.memory_gb:g} GB</td>{cell(a)}{cell(b)}</tr>"
        for a, b in zip(fits(full.states), fits(chosen.states), strict=True)
    )
    return (
        '<div class="wide"><table class="data"><tr><th>GPU</th><th>memory</th><th>full</th>'
        f"<th>{escape(chosen.method_name)}</th></tr>{rows}</table></div>"
    )


def storage_line(chosen: MemoryReport, tasks: int) -> str:
    disk = storage(chosen, tasks)
    many = f"{tasks} task{'s' if tasks != 1 else ''}"
    if chosen.spec.method == "full":
        return f"On disk, {many}: {words.bold(words.size(disk.full), 'frozen')} as full copies."
    return (
        f"On disk, {many}: {words.bold(words.size(disk.full), 'frozen')} as full copies, "
        f"or one base of {words.size(disk.base)} and "
        f"{words.bold(words.size(disk.adapters), 'trained')} of adapters."
    )


def build(spec: gr.State) -> page.View:
    def picture(spec: RunSpec, convention: str, share: float, tasks: float) -> tuple:
        full, chosen = pair(spec, convention, share)
        holds = fits(chosen.states or 0)
        return (
            words.memory_sentence(full, chosen, holds),
            figures.themed(figures.memory_bars, full, chosen),
            storage_line(chosen, int(tasks)),
            numbers(full, chosen),
            gpu_grid(full, chosen),
            page.changed(spec),
        )

    first = picture(page.OPENING, page.CONVENTION, 0.5, 50)
    sentence = page.sentence(first[0])
    with gr.Row(elem_classes="stage"):
        with page.controls():
            page.drawer_handle()
            model = page.model_choice(page.OPENING.model)
            method = methods.method_choice(page.OPENING.method or "lora", page.OPENING.model or DEFAULT)
            about = page.note(methods.method_card("lora", page.OPENING.model or DEFAULT))
            own = methods.method_settings(page.OPENING, *BY_METHOD)
            share = gr.Slider(
                0.01, 10, 0.5, step=0.01, label="Trained share, %", visible=False,
                info="A bare count has no layers to adapt, so its share is chosen",
            )  # fmt: skip
            convention = gr.Dropdown(
                [(c.name, c.key) for c in CONVENTIONS.values()] + [("exact: the run's own precisions", EXACT)],
                value=page.CONVENTION,
                label="Count as",
                info="Bytes a parameter: each lecture's convention, or what the run allocates",
            )
            tasks = gr.Slider(1, 1000, 50, step=1, label="Tasks to store", info="One adapted model for each")
            with gr.Accordion("Precision and optimizer, for exact", open=False):
                precision = page.choice("precision")
                quantization = page.choice("quantization")
                optimizer = page.choice("optimizer")
                gpu = page.choice("gpu", [("automatic: what is there", ""), *page.choices_of(_gpus())], "")
            note = page.note(first[5])
            reset = gr.Button("Reset to automatic", size="sm")
        with gr.Column(elem_classes="main"):
            problem = page.problem()
            figure = page.plot(first[1], "Stacked bars of memory: full fine-tuning and the chosen method")
            gr.HTML(LEGEND, elem_classes="phone-only")
            page.note(NOT_INCLUDED)
            disk = page.note(first[2])
            with gr.Row(elem_classes="lessons"):
                lessons = [gr.Button(name, size="sm") for name in LESSONS]
            with gr.Accordion("Every number", open=False):
                table = gr.HTML(first[3])
            with gr.Accordion("Which GPUs hold it", open=False):
                grid = gr.HTML(first[4])
            with gr.Accordion("How the method works", open=False):
                panel = gr.HTML(methods.method_panel("lora"))
            with gr.Accordion("The lectures' numbers, recomputed", open=False):
                gr.HTML(page.claims_table("memory"))

    fields = [model, method, *own, precision, quantization, optimizer, gpu]
    view = [convention, share, tasks]
    drawn = [about, panel, sentence, figure, disk, table, grid, note]

    def changes(spec: RunSpec, refill: bool) -> tuple:
        """The method's controls and, for a bare count, its share."""
        bare = find(spec.model or DEFAULT).config is None
        return (
            *methods.method_updates(spec, BY_METHOD, refill),
            gr.update(visible=bare and spec.method != "full"),
        )

    def explained(spec: RunSpec) -> tuple[str, str]:
        method = spec.method or "lora"
        return methods.method_card(method, spec.model or DEFAULT), methods.method_panel(method)

    def update(spec: RunSpec, convention: str, share: float, tasks: float, *values: Any) -> tuple:
        before = spec
        spec, moved = methods.edit(spec, FIELDS, values)
        return (
            spec,
            methods.method_value(spec.method, spec.model) if spec.model != before.model else gr.skip(),
            *changes(spec, refill=moved),
            *explained(spec),
            *picture(spec, convention, share, tasks),
        )

    def body(spec: RunSpec, convention: str = page.CONVENTION, share: float = 0.5, tasks: float = 50) -> tuple:
        """Every control and picture of a spec."""
        *own, share_shown = changes(spec, refill=True)
        return (
            spec.model or DEFAULT,
            methods.method_value(spec.method, spec.model),
            *own,
            *(getattr(spec, name) or "" for name in FIELDS[-4:]),
            share_shown,
            convention,
            *explained(spec),
            *picture(spec, convention, share, tasks),
        )

    show = page.refusing(body, len(FIELDS) + 2 + len(drawn))
    refresh = [problem, spec, method, *own, share, *drawn]
    gr.on(
        [control.input for control in (*fields, *view)],
        page.refusing(update, len(refresh) - 1),
        [spec, *view, *fields],
        refresh,
        trigger_mode="always_last",
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    shown = [problem, *fields, share, convention, *drawn]
    for button, (lesson, rule) in zip(lessons, LESSONS.values(), strict=True):
        button.click(
            lambda tasks, share, lesson=lesson, rule=rule: (lesson, *show(lesson, rule, share, tasks)),
            [tasks, share],
            [spec, *shown],
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
    reset.click(
        lambda spec, c, s, t: (
            plain := RunSpec(model=spec.model, method=spec.method, task=spec.task),
            *show(plain, c, s, t),
        ),
        [spec, *view],
        [spec, *shown],
        show_progress="hidden",
        api_visibility="private",
    )
    return page.View(show, shown, view)


def _gpus() -> Any:
    from peftlab.catalog.gpus import GPUS

    return GPUS


if __name__ == "__main__":
    page.run_alone("Memory calculator", build)
