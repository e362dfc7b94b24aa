"""Tab 1, what does it cost? Full fine-tuning beside the chosen method: memory, and the GPUs, time and disk it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import costs, memory_bars, methods, page
from peftlab import MemoryReport, RunSpec, SpecError, figures, predict, resolve, words
from peftlab.catalog.gpus import GPUS
from peftlab.catalog.models import DEFAULT, MODELS, find
from peftlab.memory import CONVENTIONS, ClosedForm, Overtaken, closed_form, exact
from peftlab.memory.conventions import EXACT

TAB = "memory"
BY_METHOD = ("rank", "virtual_tokens", "bottleneck", "block_size", "train_norms", "target_modules")
"""Settings that some methods read and counts depend on."""
SIZES = ("batch_size", "sequence_length", "gradient_checkpointing")
FOLDED = (
    "precision", "adapter_precision", "quantization", "optimizer", "optimizer_precision", "accumulation", "attention",
    "gpu", "n_gpus", "sharding", "offload",
)  # fmt: skip
FIELDS = ("model", "method", *BY_METHOD, *SIZES, *FOLDED)
ON = "h100-80gb"
"""The GPU a run is predicted for unless another one is chosen: the one whose steps were measured."""
LESSONS = {
    "Llama 3.1 8B": (RunSpec(model="llama-3.1-8b"), EXACT),
    "LoRA takes more than full": (
        RunSpec(model="smollm2-135m", method="lora", rank=16, precision="bf16", batch_size=4, sequence_length=512), EXACT,
    ),
    "A vocabulary of 262,144": (RunSpec(model="gemma-3-270m", batch_size=4, sequence_length=512), EXACT),
    "QLoRA 70B": (RunSpec(model="llama-3.1-70b", method="qlora", rank=64, gradient_checkpointing=True), EXACT),
    "Gemma 3 270M (lecture 11.2)": (RunSpec(model="gemma-3-270m", rank=16), "12n"),
    "70B (lecture 11.2)": (RunSpec(model="llama-3.1-70b", rank=64), "12n"),
    "100B (KIIT tutorial)": (RunSpec(model="100B"), "8n"),
}  # fmt: skip


def both(spec: RunSpec) -> tuple[RunSpec, RunSpec]:
    """Full fine-tuning, and the chosen method, on a GPU."""
    spec = spec.but(gpu=spec.gpu or ON)
    return spec.but(method="full", quantization=None), spec


def closed(
    spec: RunSpec, convention: str, share: float
) -> tuple[tuple[MemoryReport, MemoryReport], tuple[ClosedForm | None, ClosedForm | None]]:
    """What can be said at once; `share` (percent) is trained where the model is only a number."""
    entry = find(spec.model or DEFAULT)
    trainable = None if entry.config else max(1, round(entry.total_parameters * share / 100))
    if convention == EXACT and entry.is_causal and entry.config:
        forms = tuple(closed_form(s) for s in both(spec))
        return tuple(f.report() for f in forms), forms
    full, chosen = both(spec)
    return (predict(full, convention), predict(chosen, convention, trainable)), (None, None)


def at(spec: RunSpec) -> tuple[int, int, int]:
    of = resolve(spec)
    return of.batch_size or 1, of.sequence_length or 1, of.rank or methods.SLIDERS["rank"][2]


def numbers(full: MemoryReport, chosen: MemoryReport, form: ClosedForm | None) -> str:
    """Every component in bytes; and how each comes about, in symbols and in this run's numbers."""
    reports = [full] if chosen.spec.method == "full" else [full, chosen]
    parts = [(r.peak.bytes if r.peak else vars(r)) for r in reports]
    rows = "".join(
        f'<tr><td><span class="key {colour}"></span>{name}</td>'
        + "".join(f"<td>{words.size(part.get(kind, 0))}</td>" for part in parts)
        + "</tr>"
        for kind, colour, name in figures.COMPONENTS
        if any(part.get(kind) for part in parts)
    )
    sums = [
        ("allocated at the peak", "allocated"),
        ("reserved by PyTorch", "reserved"),
        ("what nvidia-smi shows", "process"),
    ]
    if full.peak is None:
        sums = [("sum", "states")]
    rows += "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td><b>{words.size(getattr(r, key))}</b></td>" for r in reports) + "</tr>"
        for name, key in sums
    )
    rows += (
        "<tr><td>trained parameters</td>" + "".join(f"<td>{r.trainable_parameters:,}</td>" for r in reports) + "</tr>"
    )
    heads = "".join(f"<th>{escape(words.method_name(r))}</th>" for r in reports)
    table = f'<div class="wide"><table class="data"><tr><th></th>{heads}</tr>{rows}</table></div>'
    return table + (costs.derivation(form) if form else "")


def picture(
    spec: RunSpec,
    convention: str,
    view: tuple[float, ...],
    reports: tuple[MemoryReport, MemoryReport],
    forms: tuple[ClosedForm | None, ClosedForm | None],
) -> tuple:
    """Everything that is drawn of two reports; `view` is tasks, streams, context, price and utilisation."""
    full, chosen = reports
    surprises = words.memory_surprises(full, chosen)
    return (
        memory_bars.bars_value(reports, forms, at(chosen.spec)),
        "".join(f"<p>{text}</p>" for text in surprises[:2]),
        figures.themed(figures.memory_timeline, chosen) if chosen.moments else gr.skip(),
        numbers(full, chosen, forms[1]),
        costs.gpus(full, chosen),
        costs.room(forms[1]) if forms[1] else "",
        costs.compute_and_disk(chosen, *view),
        costs.conventions(spec, reports),
        costs.measured(),
        page.changed(spec),
    )


def build(spec: gr.State) -> page.View:
    changing = partial(page.changing, TAB)
    start = costs.VIEW
    first = picture(page.OPENING, EXACT, start, *closed(page.OPENING, EXACT, 0.5))
    sentence = words.memory_sentence(*closed(page.OPENING, EXACT, 0.5)[0])
    batch, length, _ = at(page.OPENING)
    with gr.Row(elem_classes="stage"):
        with page.controls():
            page.drawer_handle()
            model = page.model_choice(page.OPENING.model)
            sizes = [
                page.slider("batch_size", 1, 64, batch),
                page.slider("sequence_length", 16, 16384, length, step=16),
                gr.Checkbox(False, **page.described("gradient_checkpointing")),
            ]
            method = methods.method_choice(page.OPENING.method or "lora", page.OPENING.model or DEFAULT)
            about = page.note(methods.method_card("lora", page.OPENING.model or DEFAULT))
            own = methods.method_settings(page.OPENING, *BY_METHOD)
            share = gr.Slider(
                0.01, 10, 0.5, step=0.01, label="Trained share, %", visible=False,
                info="A bare count has no layers to adapt, so its share is chosen",
            )  # fmt: skip
            with gr.Accordion("Precision, optimizer and GPUs", open=False):
                folded = [_control(name) for name in FOLDED]
            with gr.Accordion("Your own config.json", open=False):
                text = gr.Textbox(lines=4, max_lines=8, label="Paste it", info="Any decoder that transformers knows")
                with gr.Row():
                    use = gr.Button("Use it", size="sm", min_width=80)
                    upload = gr.UploadButton("Upload one", file_types=[".json"], size="sm", min_width=80)
            with gr.Accordion("Count as a lecture does", open=False):
                convention = gr.Dropdown(
                    [("what the run allocates", EXACT), *((c.name, c.key) for c in CONVENTIONS.values())],
                    value=EXACT,
                    label="Count as",
                    info="Bytes a parameter, in each lecture's convention",
                )
            note = page.note(first[9])
            reset = gr.Button("Reset to automatic", size="sm")
        with gr.Column(elem_classes="main"):
            problem = page.problem()
            bars = memory_bars.bars(first[0], sentence)
            surprises = gr.HTML(first[1], html_template='<div class="surprises">${value}</div>', js_on_load=None)
            with gr.Row(elem_classes="lessons"):
                lessons = [gr.Button(name, size="sm") for name in LESSONS]
            timeline = page.plot(first[2], "Allocated memory through one training step, by kind")
            with gr.Accordion("Every number, and how it comes about", open=False):
                table = gr.HTML(first[3])
            with gr.Accordion("Which GPUs hold it", open=False):
                grid = gr.HTML(first[4])
            with gr.Accordion("What would fit", open=False):
                room = gr.HTML(first[5])
            with gr.Accordion("Time, money, disk and serving", open=False):
                view = costs.controls()
                spent = gr.HTML(first[6])
            with gr.Accordion("The lectures' conventions and numbers, recomputed", open=False):
                rules = gr.HTML(first[7])
                gr.HTML(page.claims_table("memory"))
            with gr.Accordion("Measured beside predicted", open=False):
                beside = gr.HTML(costs.measured())
            with gr.Accordion("How the method works", open=False):
                panel = gr.HTML(methods.method_panel("lora"))

    rank = own[0]
    fields = [model, method, *own, *sizes, *folded]
    looks = [convention, share, *view]
    drawn = [bars, surprises, timeline, table, grid, room, spent, rules, beside, note]
    shown_with_method = [about, panel]

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

    def update(spec: RunSpec, convention: str, share: float, *rest: Any) -> tuple:
        """After a control: what the closed form says."""
        before, view, values = spec, rest[: len(costs.VIEW)], rest[len(costs.VIEW) :]
        spec, moved = methods.edit(spec, FIELDS, values)
        spec = _without_automatic(spec)
        return (
            spec,
            methods.method_value(spec.method, spec.model) if spec.model != before.model else gr.skip(),
            *changes(spec, refill=moved),
            *explained(spec),
            *picture(spec, convention, view, *closed(spec, convention, share)),
        )

    def rested(spec: RunSpec, moved: Mapping[str, int]) -> tuple:
        return (_without_automatic(methods.edit(spec, tuple(moved), tuple(moved.values()))[0]),)

    def traced(spec: RunSpec, overtaken: Callable[[], bool], convention: str, share: float, *view: Any) -> tuple:
        """What the trace says."""
        _, forms = closed(spec, convention, share)
        if forms[1] is None:  # counted by a convention since
            raise Overtaken
        return picture(spec, convention, view, tuple(exact(s, overtaken) for s in both(spec)), forms)

    def rest(request: gr.Request, event: gr.EventData, spec: RunSpec) -> tuple:
        """The sliders rest, and had told the server nothing: the settings that they `moved`."""
        return changing(page.refusing(rested, 1))(request, spec, event.moved) if event.moved else (gr.skip(), gr.skip())

    def trace(request: gr.Request, refusal: str, spec: RunSpec, *looks: Any) -> tuple:
        """Once the sliders rest: the exact figures of the settings, unless those on screen were refused."""
        who = page.visitor(request)
        try:
            if refusal:
                raise Overtaken
            overtaken = who.trace(spec)
            answer = page.refusing(traced, len(drawn))(spec, overtaken, *looks)
            who.sent(TAB)
            if overtaken():
                raise Overtaken
            return answer
        except Overtaken:
            who.arrived(TAB)
            return page.skipped([problem, *drawn])

    def arrived(request: gr.Request) -> None:
        page.visitor(request).arrived(TAB)

    def body(spec: RunSpec, convention: str = EXACT, share: float = 0.5, *view: float) -> tuple:
        """Every control and picture of a spec."""
        *own, share_shown = changes(spec, refill=True)
        batch, length, _ = at(spec)
        return (
            _shown_model(spec),
            methods.method_value(spec.method, spec.model),
            *own,
            batch,
            length,
            bool(spec.gradient_checkpointing),
            *(_blank(name, getattr(spec, name)) for name in FOLDED),
            share_shown,
            *explained(spec),
            *picture(spec, convention, view or costs.VIEW, *closed(spec, convention, share)),
        )

    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    show = page.refusing(body, len(FIELDS) + 1 + len(shown_with_method) + len(drawn))
    refresh = [problem, spec, method, *own, share, *shown_with_method, *drawn]
    sliding = [sizes[0], sizes[1], rank]
    gr.on([s.input for s in sliding], None, sliding, None, js=memory_bars.MOVED, **quiet)
    gr.on(
        [control.input for control in (*fields, *looks) if control not in sliding],
        changing(page.refusing(update, len(refresh) - 1)),
        [spec, *looks, *fields],
        refresh,
        trigger_mode="always_last",
        **quiet,
    )
    bars.submit(rest, spec, [problem, spec], trigger_mode="multiple", **quiet).then(
        trace, [problem, spec, *looks], [problem, *drawn], trigger_mode="multiple", **quiet
    ).then(arrived, trigger_mode="multiple", **quiet)
    shown = [problem, *fields, share, *shown_with_method, *drawn]
    for button, (lesson, rule) in zip(lessons, LESSONS.values(), strict=True):
        button.click(
            changing(lambda share, *view, lesson=lesson, rule=rule: (lesson, rule, *show(lesson, rule, share, *view))),
            [share, *view],
            [spec, convention, *shown],
            **quiet,
        )
    reset.click(
        changing(
            lambda spec, *looks: (
                plain := RunSpec(model=spec.model, method=spec.method, task=spec.task),
                *show(plain, *looks),
            )
        ),
        [spec, *looks],
        [spec, *shown],
        **quiet,
    )

    def own_config(spec: RunSpec, text: str, *looks: Any) -> tuple:
        from peftlab.catalog.models import from_config

        try:
            changed = spec.but(model=from_config(text).key)
        except SpecError as error:
            return page.Refused((gr.skip(), escape(str(error)), *[gr.skip()] * (len(shown) - 1)))
        return changed, *show(changed, *looks)

    gr.on([use.click, text.submit], changing(own_config), [spec, text, *looks], [spec, *shown], **quiet)
    upload.upload(
        changing(lambda spec, file, *looks: own_config(spec, Path(file).read_text(errors="replace"), *looks)),
        [spec, upload, *looks],
        [spec, *shown],
        **quiet,
    )
    return page.View(TAB, show, shown, looks)


def _control(name: str) -> Any:
    if name == "gpu":
        return page.choice("gpu", [("automatic: an H100", ""), *page.choices_of(GPUS)], "")
    return page.text(name) if name in ("accumulation", "n_gpus") else page.choice(name)


def _blank(name: str, value: Any) -> Any:
    return value if value is not None or name in ("accumulation", "n_gpus") else ""


def _without_automatic(spec: RunSpec) -> RunSpec:
    """Sliders and boxes have no empty state: where they show what is automatic, nothing was set."""
    usual = resolve(spec.but(**dict.fromkeys(SIZES)))
    return spec.but(**{n: None for n in SIZES if getattr(spec, n) == getattr(usual, n)})


def _shown_model(spec: RunSpec) -> Any:
    key = spec.model or DEFAULT
    if key.startswith("config:"):
        return gr.update(value=key, choices=[*page.choices_of(MODELS), (find(key).name, key)])
    return key


if __name__ == "__main__":
    page.run_alone("Memory calculator", build)
