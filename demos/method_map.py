"""The map of methods: how deep each reaches into the model, what it trains, when to use it, what others measured."""

import sys
from html import escape
from pathlib import Path

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos.page import address, choice, controls, store
from demos.page.tab import Asked, Slow, Tab, Values
from peftlab import count
from peftlab.base.models import find
from peftlab.count import why_not
from peftlab.lectures import facts, published
from peftlab.lectures.guide import CASES, GROUPS
from peftlab.memory import exact
from peftlab.room import worker
from peftlab.show import guide, marks, statements
from peftlab.show.methods import method_panel, unsuited
from peftlab.spec import Resolved

AXES = {"across": "parameters", "up": "accuracy"}  # the benchmark's axes, and their metrics at first
MAP = """
let last = null;
const all = () => [...element.querySelectorAll('button[data-method]')];
const why = (text) => { element.querySelector('.why-not').textContent = text; };
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
  all().forEach((b) => b.setAttribute('aria-pressed', b.dataset.method === props.value.method));
  const lost = document.activeElement === document.body && all().find((b) => b.dataset.method === last);
  if (lost) lost.focus();
});
"""
"""Each method is a button, and arrow keys walk through them. One that does not suit the model says why when pressed."""
SITUATIONS = {f"when_{group}": {key: case for key, case in CASES.items() if case.group == group} for group in GROUPS}
"""The situations of each group, by the choice that holds which of them are ticked."""
COUNTED = (
    "Parameters are counted from the model's shapes and the registry's terms, each method at its automatic settings."
)
SPECTRUM = (
    '<div class="spectrum"><p class="ends"><span>touches nothing inside</span><span>changes the computation</span></p>'
    '<div class="families" role="group" aria-label="Methods, by how deep they reach">${value.families}</div>'
    f'<p class="note">Bars: the share that is trained, on a log scale from {facts.LEAST:.4f}% to 100%. '
    f'{marks.how("exact", COUNTED)}</p><p class="why-not" aria-live="polite"></p></div>'
)


def traced(model: str) -> tuple[bool, ...]:
    """Which of the memory figures that the tab states are traced by now: the texts change with them."""
    pairs = (facts.automatic(of, "lora", "qlora") for of in (address.MODEL, model))
    return tuple(all(worker.known(exact, spec) for spec in pair) for pair in (facts.small(), *pairs))


class Methods(Tab):
    """The map of methods, and which one to choose."""

    key, title = "methods", "Methods"
    choices = {
        **{name: choice.one_of(name, metric, published.METRICS) for name, metric in AXES.items()},
        **{
            name: choice.several(name, tuple(key for key, case in cases.items() if case.ticked), cases)
            for name, cases in SITUATIONS.items()
        },
    }

    def build(self) -> None:
        self.panel("sentence", controls.sentence())
        super().build()
        gr.HTML("<h2>Which one, and whether any</h2>", js_on_load=None, elem_classes="part")
        with gr.Row(elem_classes="panes"):
            with gr.Column(min_width=320):
                for label, (name, cases) in zip(GROUPS.values(), SITUATIONS.items(), strict=True):
                    offered, usual = [(case.when, key) for key, case in cases.items()], list(self.choices[name].usual)
                    self.control(name, gr.CheckboxGroup(offered, value=usual, label=label))
            with gr.Column(min_width=320):
                self.panel("advice", gr.HTML(min_height=400))
        gr.HTML("<h2>What others measured</h2>", js_on_load=None, elem_classes="part")
        self.panel("not_memory", controls.note())
        metrics = [(m.title.split(",")[0].capitalize(), key) for key, m in published.METRICS.items()]
        with gr.Row(elem_classes="axes"):
            for name, metric in AXES.items():
                made = gr.Dropdown(metrics, value=metric, label=name.capitalize(), scale=0, min_width=240)
                self.control(name, made)
        self.panel("runs", controls.plot(None, "The published runs by two metrics; the sentence below names the best"))
        self.panel("marks", controls.note())
        self.panel("front", controls.note())
        self.fold_of(f"All {len(published.runs())} runs as a table", "all_runs")
        self.fold_of("Pros and cons, as the lectures have them", "sides")
        self.fold_of("The lectures' tables, checked", "checked")
        self.panel("counted", self.folds["methods.checked"])

    def settings(self) -> None:
        self.control("model", controls.model_choice(address.MODEL))
        self.panel("reasons", controls.note())

    def pictures(self) -> None:
        self.panel("problem", controls.problem())
        first = {"method": "lora", "families": ""}
        drawn = gr.HTML(first, html_template=SPECTRUM, js_on_load=MAP, elem_classes="drawn-map", min_height=420)
        self.panel("method", drawn)  # drawn whether or not its method is refused: the others are the model's
        self.panel("chosen", gr.HTML(elem_classes="chosen-line", min_height=64))
        self.panel("card", gr.HTML(min_height=400))

    def check(self, asked: Asked) -> None:
        facts.places(asked.run.model)  # refuses a bare count, which has no layers to count in
        count(asked.run)

    def draw(self, asked: Asked) -> Values:
        model, method = asked.run.model, asked.run.method
        checked = statements.tab_table("methods", traced(model))
        chart, front = guide.benchmark(asked["across"], asked["up"])
        return {
            "sentence": lambda: guide.map_sentence(facts.places(model)),
            "reasons": lambda: unsuited(model),
            "method": lambda: guide.spectrum(model, method),
            "chosen": lambda: guide.chosen_line(asked.spec),
            "card": lambda: method_panel(method),
            "advice": lambda: guide.advice(situations(asked), model),
            "not_memory": lambda: f"<p>{escape(published.not_memory())}</p>",
            "runs": chart,
            "marks": guide.marks,
            "front": lambda: marks.explained(front),
            "all_runs": guide.all_runs,
            "sides": lambda: guide.pros_and_cons(model, traced(model)),
            "counted": lambda: gr.update(label=f"The lectures' tables, checked: {checked.counted}"),
            "checked": lambda: checked.html + guide.measured(),
        }

    def slow(self, asked: Asked) -> list[Slow]:
        """The traces of the memory that the advice states, so that it states what the Memory tab does."""
        specs: dict[Resolved, None] = {}
        for case in map(CASES.__getitem__, situations(asked)):
            model = case.model or asked.run.model
            entry = find(model)
            if case.here == "small_memory":
                specs |= dict.fromkeys(facts.small())
            is_traced = entry.is_causal and entry.config and not any(why_not(key, model) for key in ("lora", "qlora"))
            if case.here == "quantized" and is_traced:
                specs |= dict.fromkeys(facts.automatic(model, "lora", "qlora"))
        return [Slow(exact, (spec,)) for spec in specs]


def situations(asked: Asked) -> list[str]:
    """The keys of the situations that are ticked."""
    return [key for name in SITUATIONS for key in asked[name]]


if __name__ == "__main__":
    store.run_alone(Methods())
