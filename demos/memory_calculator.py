"""Tab 1, what does it cost? Full fine-tuning beside the chosen method: memory, and the GPUs, time and disk it takes."""

from __future__ import annotations

import sys
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos.page import address, choice, controls, costs, memory_bars, methods, store
from demos.page.tab import QUIET, Asked, Draw, Slow, Tab
from peftlab import MemoryReport, PeftlabError, RunSpec, predict, resolve
from peftlab.base.models import DEFAULT, find
from peftlab.catalog.gpus import GPUS
from peftlab.memory import CONVENTIONS, ClosedForm, closed_form, exact
from peftlab.memory.conventions import EXACT
from peftlab.room import worker
from peftlab.show import costs as tables
from peftlab.show import figures, sentences
from peftlab.show.bars import bars_value
from peftlab.show.claims import claims_table
from peftlab.show.marks import explained
from peftlab.show.methods import method_card, method_panel, method_value
from peftlab.show.settings import changed
from peftlab.spec import Resolved

FOLDED = (
    "precision", "adapter_precision", "quantization", "optimizer", "optimizer_precision", "accumulation", "attention",
    "gpu", "n_gpus", "sharding", "offload",
)  # fmt: skip
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


def both(spec: RunSpec) -> tuple[Resolved, Resolved]:
    """Full fine-tuning, and the chosen method, on a GPU."""
    spec = spec.but(gpu=spec.gpu or ON)
    return resolve(spec.but(method="full", quantization=None)), resolve(spec)


Reports = tuple[MemoryReport, MemoryReport]
Forms = tuple[ClosedForm | None, ClosedForm | None]


def has_step(asked: Asked) -> bool:
    """Whether a whole training step is predicted, not only states as a convention counts them."""
    entry = find(asked.spec.model or DEFAULT)
    return bool(asked["convention"] == EXACT and entry.is_causal and entry.config)


closed = lru_cache(maxsize=128)(closed_form)
"""A question is checked and then drawn, of the same two forms."""


def seen(asked: Asked) -> tuple[Reports, Forms]:
    """Full fine-tuning and the chosen method: traced where both traces are known, else by the closed form."""
    full, chosen = both(asked.spec)
    if has_step(asked):
        forms = closed(full), closed(chosen)
        traces = worker.known(exact, full), worker.known(exact, chosen)
        return (traces if all(traces) else (forms[0].report(), forms[1].report())), forms
    entry, rule = find(asked.spec.model or DEFAULT), asked["convention"]
    trainable = None if entry.config else max(1, round(entry.total_parameters * asked["share"] / 100))
    return (predict(full, rule), predict(chosen, rule, trainable)), (None, None)


def at(spec: Resolved) -> tuple[int, int, int]:
    """Where the polynomials of a run are evaluated: batch, length and rank."""
    return spec.batch_size, spec.sequence_length, spec.rank or methods.SLIDERS["rank"][2]


class Memory(Tab):
    """The memory calculator."""

    key, title = "memory", "Memory"
    choices = {
        "convention": choice.one_of("convention", EXACT, [EXACT, *CONVENTIONS]),
        "share": choice.number("share", 0.5, 0.01, 10, whole=False),
        **costs.CHOICES,
    }

    def build(self) -> None:
        controls.stage(self._settings, self._pictures)

    def _settings(self) -> None:
        opening = address.OPENING
        batch, length, _ = at(resolve(opening))
        self.control("model", controls.model_choice(opening.model))
        self.control("batch_size", controls.slider("batch_size", 1, 64, batch))
        self.control("sequence_length", controls.slider("sequence_length", 16, 16384, length, step=16))
        self.control("gradient_checkpointing", gr.Checkbox(False, **controls.described("gradient_checkpointing")))
        self.control("method", methods.method_choice("memory", opening.method or "lora", opening.model or DEFAULT))
        self.panel("about", controls.note(method_card("lora", opening.model or DEFAULT)))
        self.control_all(methods.method_settings(opening, *methods.BY_METHOD))
        share = gr.Slider(
            0.01, 10, 0.5, step=0.01, label="Trained share, %", visible=False,
            info="A bare count has no layers to adapt, so its share is chosen",
        )  # fmt: skip
        self.control("share", share)
        with self.fold("Precision, optimizer and GPUs"):
            self.control_all({name: _control(name) for name in FOLDED})
        with self.fold("Your own config.json"):
            self._own_config()
        with self.fold("Count as a lecture does"):
            rules = [("what the run allocates", EXACT), *((c.name, c.key) for c in CONVENTIONS.values())]
            info = "Bytes a parameter, in each lecture's convention"
            self.control("convention", gr.Dropdown(rules, value=EXACT, label="Count as", info=info))
        self.panel("changed", controls.note(changed(opening)))
        controls.reset("model", "method", "task")

    def _own_config(self) -> None:
        text = gr.Textbox(lines=4, max_lines=8, label="Paste it", info="Any decoder that transformers knows")
        refused = self.panel("config_problem", controls.problem())
        with gr.Row():
            use = gr.Button("Use it", size="sm", min_width=80)
            upload = gr.UploadButton("Upload one", file_types=[".json"], size="sm", min_width=80)
        key = gr.Textbox(visible=False)
        read = (
            gr.on([use.click, text.submit], own_config, text, [refused, key], **QUIET),
            upload.upload(
                lambda file: own_config(Path(file).read_text(errors="replace")), upload, [refused, key], **QUIET
            ),
        )
        for event in read:
            event.then(None, key, None, js="(model) => { if (model) peftlab.write({model}); }", **QUIET)

    def _pictures(self) -> None:
        asked = address.opening(self)
        first = {name: draw() for name, draw in self.draw(asked).items() if name in ("bars", "surprises", "timeline")}
        self.panel("problem", controls.problem())
        sentence = sentences.memory_sentence(*seen(asked)[0])
        self.panel("bars", memory_bars.bars(first["bars"], sentence))
        surprises = gr.HTML(first["surprises"], html_template='<div class="surprises">${value}</div>', js_on_load=None)
        self.panel("surprises", surprises)
        controls.lessons({name: address.link(spec, convention=rule) for name, (spec, rule) in LESSONS.items()})
        about = "Allocated memory through one training step, by kind"
        self.panel("timeline", controls.plot(first["timeline"]["value"], about))
        with self.fold("Every number, and how it comes about"):
            self.panel("numbers", gr.HTML())
        with self.fold("Which GPUs hold it"):
            self.panel("gpus", gr.HTML())
        with self.fold("What would fit"):
            self.panel("room", gr.HTML())
        with self.fold("Time, money, disk and serving"):
            self.control_all(costs.controls())
            self.panel("spent", gr.HTML())
        with self.fold("The lectures' conventions and numbers, recomputed"):
            self.panel("conventions", gr.HTML())
            self.panel("claims", gr.HTML())
        with self.fold("Measured beside predicted"):
            self.panel("measured", gr.HTML())
        with self.fold("How the method works"):
            self.panel("how", gr.HTML())

    def check(self, asked: Asked) -> None:
        seen(asked)

    def fill(self, asked: Asked) -> dict[str, Any]:
        spec = asked.spec
        batch, length, _ = at(resolve(spec))
        bare = find(spec.model or DEFAULT).config is None
        return {
            "model": controls.shown_model(spec),
            "method": method_value(spec.method, spec.model),
            **methods.method_updates(spec, methods.BY_METHOD),
            "batch_size": controls.slid(batch, 64),
            "sequence_length": controls.slid(length, 16384),
            "gradient_checkpointing": bool(spec.gradient_checkpointing),
            **{name: controls.blank(getattr(spec, name)) for name in FOLDED},
            "share": gr.update(visible=bare and spec.method != "full", value=asked["share"]),
            "convention": asked["convention"],
            **{name: asked[name] for name in costs.CHOICES},
        }

    def draw(self, asked: Asked) -> dict[str, Draw]:
        spec, model = asked.spec, asked.spec.model or DEFAULT
        reports, forms = seen(asked)
        full, chosen = reports
        entry = find(model)
        timeline = controls.seen(figures.themed(figures.memory_timeline, chosen) if chosen.moments else None)
        return {
            "bars": lambda: bars_value(reports, forms, at(chosen.spec), None if entry.config else asked["share"]),
            "surprises": lambda: explained(
                "".join(f"<p>{t}</p>" for t in sentences.memory_surprises(full, chosen)[:2])
            ),
            "timeline": lambda: timeline,
            "about": lambda: method_card(spec.method or "lora", model),
            "config_problem": lambda: "",
            "changed": lambda: changed(spec),
            "numbers": lambda: tables.numbers(full, chosen, forms[1]),
            "gpus": lambda: tables.gpus(full, chosen),
            "room": lambda: tables.room(forms[1]) if forms[1] else "",
            "spent": lambda: tables.compute_and_disk(chosen, *(asked[name] for name in costs.CHOICES)),
            "conventions": lambda: tables.conventions(spec, reports),
            "claims": lambda: claims_table("memory"),
            "measured": tables.measured,
            "how": lambda: method_panel(spec.method or "lora"),
        }

    def slow(self, asked: Asked) -> list[Slow]:
        return [Slow(exact, (spec,)) for spec in both(asked.spec)] if has_step(asked) else []


def own_config(text: str) -> tuple[str, str]:
    """What is wrong with a pasted config.json, or its key as a model."""
    from peftlab.base.models import from_config

    try:
        return "", from_config(text).key
    except PeftlabError as error:
        return escape(str(error)), ""


def _control(name: str) -> Any:
    if name == "gpu":
        return controls.choice("gpu", [("automatic: an H100", ""), *controls.choices_of(GPUS)], "")
    return controls.text(name) if name in ("accumulation", "n_gpus") else controls.choice(name)


if __name__ == "__main__":
    store.run_alone(Memory())
