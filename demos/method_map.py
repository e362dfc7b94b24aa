"""The map of methods: how deep each reaches into the model, what it trains, when to use it, and what others measured."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from peftlab import resolve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos.page import address, choice, controls, store
from demos.page.tab import Asked, Draw, Slow, Tab
from peftlab import count
from peftlab.base.models import DEFAULT, find
from peftlab.count import why_not
from peftlab.lectures import evidence, published
from peftlab.lectures.guide import CASES, GROUPS
from peftlab.memory import exact
from peftlab.room import worker
from peftlab.show import guide
from peftlab.show.claims import claims_table
from peftlab.show.marks import explained, how
from peftlab.show.methods import method_panel, unsuited
from peftlab.spec import Resolved

AXES = ("parameters", "accuracy")
"""Of the benchmark, at first: across and up."""
MAP = """
let last = null;
const all = () => [...element.querySelectorAll('button[data-method]')];
const why = (text) => { element.querySelector('.why-not').textContent = text; };
const mark = () => all().forEach((b) => b.setAttribute('aria-pressed', b.dataset.method === props.value.method));
element.addEventListener('click', (e) => {
  const chip = e.target.closest('button[data-method]');
  if (!chip) return;
  if (chip.getAttribute('aria-disabled') === 'true') return why(chip.title);
  last = chip.dataset.method;
  why('');
  peftlab.heard('methods.method', last);
});
element.addEventListener('keydown', (e) => {
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[e.key], at = all().indexOf(e.target);
  if (!step || at < 0) return;
  e.preventDefault();
  all()[(at + step + all().length) % all().length].focus();
});
watch('value', () => {
  mark();
  const lost = document.activeElement === document.body && all().find((b) => b.dataset.method === last);
  if (lost) lost.focus();
});
"""
"""A chip is a button, and arrows walk from one to the next. One that does not suit the model says why, and chooses nothing."""
TICKS = {group: f"when_{group}" for group in GROUPS}
"""The choice that holds which of a group's situations are ticked."""
COUNTED = (
    "Parameters are counted from the model's shapes and the registry's terms, each method at its automatic settings."
)


def in_group(group: str) -> list[str]:
    """The situations of a group."""
    return [key for key, case in CASES.items() if case.group == group]


def ticked(group: str) -> tuple[str, ...]:
    """Those that are ticked at first."""
    return tuple(key for key in in_group(group) if CASES[key].ticked)


def map_widget() -> gr.HTML:
    return gr.HTML(
        {"method": "lora", "families": ""},
        html_template='<div class="spectrum"><p class="ends"><span>touches nothing inside</span>'
        "<span>changes the computation</span></p>"
        '<div class="families" role="group" aria-label="Methods, by how deep they reach">${value.families}</div>'
        f'<p class="note">Bars: the share that is trained, on a log scale from {evidence.LEAST:.4f}% to 100%. '
        f'{how("exact", COUNTED)}</p><p class="why-not" aria-live="polite"></p></div>',
        js_on_load=MAP,
        elem_classes="drawn-map",
        min_height=420,
    )


def traced(model: str) -> tuple[bool, ...]:
    """Which of the memory that the tab states is traced: what is said changes with it."""
    pairs = (evidence.automatic(of, "lora", "qlora") for of in (address.OPENING.model or DEFAULT, model))
    return tuple(all(worker.known(exact, spec) for spec in pair) for pair in (evidence.small(), *pairs))


class Methods(Tab):
    """The map of methods, and which one to choose."""

    key, title = "methods", "Methods"
    choices = {
        "across": choice.one_of("across", AXES[0], published.METRICS),
        "up": choice.one_of("up", AXES[1], published.METRICS),
        **{name: choice.several(name, ticked(group), in_group(group)) for group, name in TICKS.items()},
    }

    def build(self) -> None:
        self.panel("sentence", controls.sentence(""))
        controls.stage(self._settings, self._map)
        self._advice()
        self._published()
        with self.fold("Pros and cons, as the lectures have them"):
            self.panel("sides", gr.HTML())
        with self.fold("The lectures' tables, checked") as accordion:
            self.panel("checked", gr.HTML())
            self.panel("claims", gr.HTML())
        self.panel("counted", accordion)

    def _settings(self) -> None:
        self.control("model", controls.model_choice(address.OPENING.model))
        self.panel("reasons", controls.note())

    def _map(self) -> None:
        self.panel("problem", controls.problem())
        self.panel("method", map_widget())  # drawn whether or not its method is refused: the others are the model's
        self.panel("chosen", gr.HTML(elem_classes="chosen-line", min_height=64))
        self.panel("card", gr.HTML(min_height=400))

    def _advice(self) -> None:
        gr.HTML("<h2>Which one, and whether any</h2>", js_on_load=None, elem_classes="part")
        with gr.Row(elem_classes="panes"):
            with gr.Column(min_width=320):
                for group, name in TICKS.items():
                    cases = [(CASES[key].when, key) for key in in_group(group)]
                    self.control(name, gr.CheckboxGroup(cases, value=list(ticked(group)), label=GROUPS[group]))
            with gr.Column(min_width=320):
                self.panel("advice", gr.HTML(min_height=400))

    def _published(self) -> None:
        gr.HTML("<h2>What others measured</h2>", js_on_load=None, elem_classes="part")
        self.panel("not_memory", controls.note())
        metrics = [(m.title.split(",")[0].capitalize(), key) for key, m in published.METRICS.items()]
        with gr.Row(elem_classes="axes"):
            for name, axis in zip(("across", "up"), AXES, strict=True):
                made = gr.Dropdown(metrics, value=axis, label=name.capitalize(), scale=0, min_width=240)
                self.control(name, made)
        label = "The published runs by two metrics; the sentence below names the best"
        self.panel("runs", controls.plot(None, label))
        self.panel("marks", controls.note())
        self.panel("front", controls.note())
        with self.fold(f"All {len(published.runs())} runs as a table"):
            self.panel("all_runs", gr.HTML())

    def check(self, asked: Asked) -> None:
        guide.places(asked.spec.model or DEFAULT)  # a bare count has nothing to count by
        count(resolve(asked.spec))

    def fill(self, asked: Asked) -> dict[str, Any]:
        own = {name: list(asked[name]) for name in TICKS.values()}
        return {"model": controls.shown_model(asked.spec), "across": asked["across"], "up": asked["up"], **own}

    def draw(self, asked: Asked) -> dict[str, Draw]:
        spec, model = asked.spec, asked.spec.model or DEFAULT
        checked = guide.tables(traced(model))
        chart, front = guide.benchmark(asked["across"], asked["up"])
        return {
            "sentence": lambda: guide.map_sentence(guide.places(model)),
            "reasons": lambda: unsuited(model),
            "method": lambda: guide.spectrum(model, spec.method or "lora"),
            "chosen": lambda: guide.chosen_line(spec),
            "card": lambda: method_panel(spec.method or "lora"),
            "advice": lambda: guide.advice(situations(asked), model),
            "not_memory": lambda: f"<p>{escape(published.not_memory())}</p>",
            "runs": lambda: chart,
            "marks": guide.marks,
            "front": lambda: explained(front),
            "all_runs": guide.all_runs,
            "sides": lambda: guide.pros_and_cons(model, traced(model)),
            "counted": lambda: gr.update(
                label=f"The lectures' tables, checked: {checked.holds} statements hold, {checked.differ} differ"
            ),
            "checked": lambda: checked.html,
            "claims": lambda: f"<h3>Their numbers, recomputed</h3>{claims_table('lora')}",
        }

    def slow(self, asked: Asked) -> list[Slow]:
        """Memory that the advice states, so that it is what the Memory tab says."""
        specs: dict[Resolved, None] = {}
        for case in map(CASES.__getitem__, situations(asked)):
            model = case.model or asked.spec.model or DEFAULT
            if case.here == "small-memory":
                specs |= dict.fromkeys(evidence.small())
            if case.here == "quantized" and is_traced(model):
                specs |= dict.fromkeys(evidence.automatic(model, "lora", "qlora"))
        return [Slow(exact, (spec,)) for spec in specs]


def situations(asked: Asked) -> list[str]:
    """Those that are ticked."""
    return [key for name in TICKS.values() for key in asked[name]]


def is_traced(model: str) -> bool:
    """Whether a training step of LoRA and QLoRA can be traced."""
    entry = find(model)
    return bool(entry.is_causal and entry.config) and not any(why_not(key, model) for key in ("lora", "qlora"))


if __name__ == "__main__":
    store.run_alone(Methods())
