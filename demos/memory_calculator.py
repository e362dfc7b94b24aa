"""Tab 1, what does it cost? Full fine-tuning beside the chosen method: memory, and the GPUs, time and disk it takes."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, cast

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos.page import address, choice, controls, look, methods, store
from demos.page.tab import QUIET, Asked, Slow, Tab
from peftlab import MemoryReport, PeftlabError, RunSpec, predict, resolve
from peftlab.base.models import MODELS, find, from_config
from peftlab.catalog.gpus import GPUS, PRICE
from peftlab.memory import CONVENTIONS, ClosedForm, closed_form, exact
from peftlab.memory.closed_form import EXACT
from peftlab.methods import METHODS
from peftlab.show import costs, figures, marks, memory_figures, settings, statements
from peftlab.show.methods import method_card, method_panel, method_value
from peftlab.spec import Resolved

FOLDED = (
    "precision", "adapter_precision", "quantization", "optimizer", "optimizer_precision", "accumulation", "attention",
    "gpu", "n_gpus", "sharding", "offload",
)  # fmt: skip
ON = "h100-80gb"  # a run is predicted for this GPU unless another one is chosen: its steps were measured
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
COSTS = {
    "tasks": choice.number("tasks", 50, 1, 1000),
    "streams": choice.number("streams", 16, 1, 256),
    "context": choice.number("context", 2048, 256, 32768),
    "price": choice.number("price", PRICE, 0, 1e6, whole=False),
}
"""Assumptions about use: how many tasks and streams, at what price."""
SLIDERS = ("batch_size", "sequence_length", "rank")
DRAW = f"const SLIDERS = {json.dumps(SLIDERS)};\n" + look.script("words.js", "memory_bars.js")
"""Draws the sentence and the bars from polynomials, so that a slider that moves asks the server nothing."""
Reports = tuple[MemoryReport, MemoryReport]
Forms = tuple[ClosedForm | None, ClosedForm | None]  # of full fine-tuning and of the chosen method
closed = lru_cache(maxsize=128)(closed_form)
"""Kept, because full fine-tuning stays the same while its neighbour's rank is tried, and so do the runs of the lessons."""


def both(spec: RunSpec) -> tuple[Resolved, Resolved]:
    """Full fine-tuning, and the chosen method, on a GPU."""
    spec = spec.but(gpu=spec.gpu or ON)
    return resolve(spec.but(method="full", quantization=None)), resolve(spec)


def runs(asked: Asked) -> tuple[Resolved, Resolved]:
    return both(asked.spec)


def traces(asked: Asked) -> list[Slow]:
    return [Slow(exact, (spec,)) for spec in asked.once(runs)]


def has_step(asked: Asked) -> bool:
    """True where a whole training step is predicted, false where a convention counts the states alone."""
    entry = find(asked.run.model)
    return bool(asked["convention"] == EXACT and entry.is_causal and entry.config)


def seen(asked: Asked) -> tuple[Reports, Forms]:
    """Full fine-tuning and the chosen method: traced where both traces are known, else by the closed form.

    Where the closed form does not know one of the two, it is the states of both, which can be compared.
    """
    full, chosen = asked.once(runs)
    if has_step(asked):
        forms = closed(full), closed(chosen)
        traced = [cast(MemoryReport | None, asked.known(slow)) for slow in traces(asked)]
        reports = (traced[0], traced[1]) if traced[0] and traced[1] else (forms[0].report(), forms[1].report())
        if unknown := next((form.states.unknown for form in forms if form.states.unknown), ""):
            reports = reports if reports[0].source == "trace" else (forms[0].states, forms[1].states)
            return (replace(reports[0], unknown=unknown), replace(reports[1], unknown=unknown)), (None, None)
        return reports, forms
    entry, rule = find(asked.run.model), asked["convention"]
    trainable = None if entry.config else max(1, round(entry.total_parameters * asked["share"] / 100))
    return (predict(full, rule), predict(chosen, rule, trainable)), (None, None)


def at(spec: Resolved) -> tuple[int, int, int]:
    """Batch, length and rank: where the polynomials of a run are evaluated."""
    return spec.batch_size, spec.sequence_length, spec.rank or methods.SLIDERS["rank"][2]


class Memory(Tab):
    """The memory calculator."""

    key, title = "memory", "Memory"
    quick, lasting, changing = True, True, ("claims", "measured")  # which show what others have traced and trained
    choices = {
        "convention": choice.one_of("convention", EXACT, [EXACT, *CONVENTIONS]),
        "share": choice.number("share", 0.5, 0.01, 10, whole=False),
        **COSTS,
    }

    def settings(self) -> None:
        model, (batch, length, _) = address.MODEL, at(resolve(address.OPENING))
        self.control("model", controls.model_choice(model))
        self.control("batch_size", gr.Slider(1, 64, batch, step=1, **controls.described("batch_size")))
        self.control("sequence_length", gr.Slider(16, 16384, length, step=16, **controls.described("sequence_length")))
        self.control("gradient_checkpointing", controls.setting("gradient_checkpointing"))
        self.control("method", methods.method_choice("memory", model))
        self.panel("about", controls.note(method_card(address.METHOD, model)))
        self.control_all(methods.method_settings(methods.BY_METHOD))
        info = "A bare count has no layers to adapt, so its share is chosen"
        self.slider("share", "Trained share, %", info, step=0.01, visible=False)
        gpus = [("automatic: an H100", ""), *controls.choices_of(GPUS)]
        with self.fold("Precision, optimizer and GPUs"):
            for name in FOLDED:
                self.control(name, controls.choice("gpu", gpus, "") if name == "gpu" else controls.setting(name))
        with self.fold("Your own config.json"):
            text = gr.Textbox(lines=4, max_lines=8, label="Paste it", info="Any decoder that transformers knows")
            refused = self.panel("config_problem", controls.problem())
            with gr.Row():
                use = gr.Button("Use it", size="sm", min_width=80)
                upload = gr.UploadButton("Upload one", file_types=[".json"], size="sm", min_width=80)
            key = gr.Textbox(visible=False)
        pasted = gr.on([use.click, text.submit], own_config, text, [refused, key], **QUIET)
        uploaded = upload.upload(
            lambda file: own_config(Path(file).read_text(errors="replace")), upload, [refused, key], **QUIET
        )
        for event in (pasted, uploaded):
            event.then(None, key, None, js="(model) => { if (model) peftlab.write({model}); }", **QUIET)
        with self.fold("Count as a lecture does"):
            rules = [("what the run allocates", EXACT), *controls.choices_of(CONVENTIONS)]
            info = "Bytes a parameter, in each lecture's convention"
            self.control("convention", gr.Dropdown(rules, value=EXACT, label="Count as", info=info))
        self.panel("changed", controls.note(settings.changed(address.OPENING)))
        controls.reset("model", "method", "task")

    def pictures(self) -> None:
        asked = Asked(address.OPENING, {name: one.usual for name, one in self.choices.items()}, {})
        first = self.draw(asked)
        self.panel("problem", controls.problem())
        sentence = memory_figures.memory_sentence(*seen(asked)[0])
        template = (
            f'<h2 class="sentence estimated" aria-live="polite">{sentence}</h2><div class="bars"></div>'
            '<div class="legends"></div><div class="note source"></div>'
        )
        self.panel("bars", gr.HTML(first["bars"], html_template=template, js_on_load=DRAW))
        template = '<div class="surprises">${value}</div>'
        self.panel("surprises", gr.HTML(first["surprises"], html_template=template, js_on_load=None))
        controls.lessons({name: address.link(spec, convention=rule) for name, (spec, rule) in LESSONS.items()})
        about = "Allocated memory through one training step, by kind"
        self.panel("timeline", controls.plot(first["timeline"]["value"], about))
        self.fold_of("Every number, and how it comes about", "numbers")
        self.fold_of("Which GPUs hold it", "gpus")
        self.fold_of("What would fit", "room")
        with self.fold("Time, money, disk and serving"):
            price = "In your currency; an assumption, type yours"
            with gr.Row(elem_classes="view"):
                self.slider("tasks", "Tasks", "One adapted model for each")
                self.slider("streams", "Answers at once", "Streams that are served together")
                self.slider("context", "Tokens each keeps", "Prompt and answer, in the cache", step=256)
                self.control("price", gr.Number(PRICE, minimum=0, label="Price of a GPU hour", info=price))
            self.panel("spent", gr.HTML())
        self.fold_of("The lectures' conventions and numbers, recomputed", "conventions", "claims")
        self.fold_of("Measured beside predicted", "measured")
        self.fold_of("How the method works", "how")

    def check(self, asked: Asked) -> None:
        asked.once(seen)

    def fill(self, asked: Asked) -> dict[str, object]:
        run = asked.run
        bare = find(run.model).config is None
        return {
            **super().fill(asked),
            "method": method_value(run.method, run.model),
            **methods.method_updates(asked.spec, methods.BY_METHOD, run),
            "batch_size": controls.slid(run.batch_size, 64),
            "sequence_length": controls.slid(run.sequence_length, 16384),
            "gradient_checkpointing": run.gradient_checkpointing,
            "share": gr.update(visible=bare and run.method != "full", value=asked["share"]),
        }

    def draw(self, asked: Asked) -> dict[str, Any]:
        run, (reports, forms) = asked.run, asked.once(seen)
        full, chosen = reports
        share = None if find(run.model).config else asked["share"]
        said = [escape(find(run.model).note), *memory_figures.memory_surprises(full, chosen)[:2]]
        surprises = "".join(f"<p>{sentence}</p>" for sentence in said if sentence)
        timeline = figures.themed(memory_figures.memory_timeline, chosen) if chosen.moments else None
        return {
            "bars": memory_figures.bars_value(reports, forms, at(chosen.spec), share),
            "surprises": marks.explained(surprises),
            "timeline": controls.seen(timeline),
            "about": lambda: method_card(run.method, run.model, memory_figures.left(chosen)),
            "config_problem": "",
            "changed": lambda: settings.changed(asked.spec),
            "numbers": lambda: costs.numbers(full, chosen, forms[1]),
            "gpus": lambda: costs.gpus(full, chosen),
            "room": lambda: costs.room(forms[1]) if forms[1] else costs.waiting(chosen),
            "spent": lambda: costs.compute_and_disk(chosen, *(asked[name] for name in COSTS)),
            "conventions": lambda: costs.conventions(reports),
            "claims": lambda: statements.tab_table("memory").html,
            "measured": costs.measured,
            "how": lambda: method_panel(run.method),
        }

    def beforehand(self) -> Iterator[None]:
        """What is worked out once for a model: which methods suit it, and the polynomials of each."""
        for model, entry in MODELS.items():
            if entry.is_causal and entry.config:
                method_value(None, model)
                yield
                for method in METHODS:
                    with suppress(PeftlabError):
                        closed_form(resolve(RunSpec(model=model, method=method, gpu=ON)))
                    yield

    def slow(self, asked: Asked) -> list[Slow]:
        return asked.once(traces) if has_step(asked) else []


def own_config(text: str) -> tuple[str, str]:
    """What is wrong with a pasted config.json, and its key as a model; one of them is empty."""
    try:
        return "", from_config(text).key
    except PeftlabError as error:
        return escape(str(error)), ""


if __name__ == "__main__":
    store.run_alone(Memory())
