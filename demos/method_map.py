"""The map of methods: how deep each reaches into the model, what it trains, when to use it, and what others measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import choice, methods, page
from demos.tab import Asked, Draw, Slow, Tab
from peftlab import RunSpec, checks, count, evidence, figures, published, published_figures, words, worker
from peftlab.catalog.guide import CASES, GROUPS, SIDES, SPECTRUM, TABLES, Case, Family, weighed
from peftlab.catalog.models import DEFAULT, find
from peftlab.count import why_not
from peftlab.evidence import Place
from peftlab.memory import exact
from peftlab.methods import METHODS

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
READ = "Our reading: a sentence of the registry, held against the lecture's by a person."


def in_group(group: str) -> list[str]:
    """The situations of a group."""
    return [key for key, case in CASES.items() if case.group == group]


def ticked(group: str) -> tuple[str, ...]:
    """Those that are ticked at first."""
    return tuple(key for key in in_group(group) if CASES[key].ticked)


@lru_cache(maxsize=64)
def places(model: str) -> list[Place]:
    """Every method on the map. Raises SpecError where the model has no shapes to count by."""
    return evidence.places(model)


def spectrum(model: str, chosen: str | None) -> dict[str, str]:
    """What the map holds: its HTML, and the method that is chosen on it."""
    families = "".join(_family(family, places(model), chosen) for family in SPECTRUM)
    return {"method": chosen or "lora", "families": families}


def _family(family: Family, on: Sequence[Place], chosen: str | None) -> str:
    """A family's chips; of those with reparameterized methods, these under a heading of their own."""
    mine = [p for p in on if METHODS[p.key].about.family == family.key]
    parts = [(deep, list(of)) for deep, of in groupby(sorted(mine, key=_deep), key=_deep)]
    chips = "".join(
        (
            f"<h4>{'reparameterized: another way to write a change of W' if deep else 'modules'}</h4>"
            if len(parts) > 1
            else ""
        )
        + f'<div class="chips">{"".join(_chip(p, chosen) for p in of)}</div>'
        for deep, of in parts
    )
    return (
        f'<section class="family {family.key}"><h3>{family.idea} <small>{family.key}</small></h3>'
        f"<p>{escape(family.says)}</p>{chips}</section>"
    )


def _deep(place: Place) -> bool:
    return METHODS[place.key].about.reparameterized


def _chip(place: Place, chosen: str | None) -> str:
    name = escape(METHODS[place.key].name)
    pressed = f'data-method="{place.key}" aria-pressed="{str(place.key == chosen).lower()}"'
    if place.report is None:
        return (
            f'<button type="button" {pressed} aria-disabled="true" title="{escape(evidence.told(place.reason))}">'
            f"<b>{name}</b><span>not for this model</span></button>"
        )
    share = words.percent(place.report.trainable_percent / 100)
    return (
        f'<button type="button" {pressed} title="{place.report.trainable_parameters:,} trained parameters">'
        f'<b>{name}</b><span>{share}</span><i style="width:{100 * place.length:.1f}%"></i></button>'
    )


def map_widget() -> gr.HTML:
    return gr.HTML(
        {"method": "lora", "families": ""},
        html_template='<div class="spectrum"><p class="ends"><span>touches nothing inside</span>'
        "<span>changes the computation</span></p>"
        '<div class="families" role="group" aria-label="Methods, by how deep they reach">${value.families}</div>'
        f'<p class="note">Bars: the share that is trained, on a log scale from {evidence.LEAST:.4f}% to 100%. '
        f'{page.how("exact", COUNTED)}</p><p class="why-not" aria-live="polite"></p></div>',
        js_on_load=MAP,
        elem_classes="drawn-map",
        min_height=420,
    )


def chosen_line(spec: RunSpec) -> str:
    return f"<p>{evidence.chosen_said(count(spec))} <small>{page.changed(spec)}</small></p>"


def advice(keys: Iterable[str], model: str) -> str:
    """What to do in the situations ticked: the methods that most of them ask for, then each with its reason."""
    ticked = set(keys)
    cases = [case for key, case in CASES.items() if key in ticked]
    if not cases:
        return '<p class="note">Tick what is true of your project.</p>'
    named = [f"<b>{escape(METHODS[key].name)}</b> in {n} of {len(cases)}" for key, n in weighed(cases)]
    first = "First try without training. " if any(case.group == "none" for case in cases) else ""
    asked = f"Advised: {', '.join(named)}." if named else ""
    return page.explained(f'<p class="weighed">{first}{asked}</p>' + "".join(_case(case, model) for case in cases))


def _case(case: Case, model: str) -> str:
    of = case.model or model
    uses = "".join(f"<li>{escape(evidence.counted(key, of))}</li>" for key in case.methods)
    counts = f"<details><summary>What they train on {escape(find(of).name)}</summary><ul>{uses}</ul></details>"
    here = evidence.here(case.here, of)
    mark = ' <span class="bad">differs</span>' if case.differs else ""
    return (
        f'<section class="case"><h4>{escape(case.when)}</h4><p><b>{escape(case.advice)}</b> {escape(case.why)}</p>'
        + (
            f'<p class="here"><b>Here:</b> {escape(here)}{mark}</p>'
            if here
            else f'<p class="here">{mark}</p>'
            if mark
            else ""
        )
        + (counts if uses else "")
        + f"<small>{escape(case.source)}</small></section>"
    )


def traced(model: str) -> tuple[bool, ...]:
    """Which of the memory that the tab states is traced: what is said changes with it."""
    pairs = (evidence.automatic(of, "lora", "qlora") for of in (page.OPENING.model or DEFAULT, model))
    return tuple(all(worker.known(exact, spec) for spec in pair) for pair in (evidence.small(), *pairs))


@lru_cache(maxsize=64)
def pros_and_cons(model: str, traced: tuple[bool, ...] = ()) -> str:
    """The lectures' pros and cons, each with what is found of it for this model."""
    rows = []
    for source, sides in groupby(SIDES, key=lambda s: s.source):
        rows.append(f'<tr><th colspan="4" class="source">{escape(source)}</th></tr>')
        for s in sides:
            found = [*(evidence.of_method(key, model) for key in s.methods), evidence.here(s.here, model)]
            pros, cons = ("<br>".join(escape(text) for text in side) for side in (s.pros, s.cons))
            rows.append(
                f"<tr><td><b>{escape(s.of)}</b></td><td>{pros}</td><td>{cons}</td>"
                f"<td>{escape(' '.join(filter(None, found)))}</td></tr>"
            )
    head = "<tr><th></th><th>pros</th><th>cons</th><th>here</th></tr>"
    table = f'<div class="wide"><table class="data prose sides">{head}{"".join(rows)}</table></div>'
    return page.explained(table) + measured()


def measured() -> str:
    """Where the times of a token come from; nothing while there are none."""
    source = evidence.race_source()
    return f'<p class="note">{page.how("measured", source)} Times of a token.</p>' if source else ""


@dataclass(frozen=True)
class Checked:
    """The lectures' tables, statement by statement."""

    holds: int
    differ: int
    html: str


@lru_cache(maxsize=8)
def tables(traced: tuple[bool, ...] = ()) -> Checked:
    """How many statements hold, how many differ, and all of them."""
    html, held = [], []
    for table in TABLES:
        rows = []
        for cell in table.cells:
            found = checks.found(cell)
            held.append(bool(found.holds))
            verdict = '<span class="good">holds</span>' if found.holds else '<span class="bad">differs</span>'
            reading = f" {page.how('read', READ)}" if found.read else ""
            why = f"<br><small>{escape(cell.why)}</small>" if cell.why else ""
            rows.append(
                f"<tr><td>{escape(cell.of)}</td><td>{escape(cell.says)}</td><td>{escape(found.text)}{why}</td>"
                f"<td>{verdict}{reading}</td></tr>"
            )
        head = f'<tr><th colspan="4" class="source">{escape(table.source)}</th></tr>'
        html.append(head + "<tr><th></th><th>the lecture</th><th>here</th><th></th></tr>" + "".join(rows))
    table = page.explained(f'<div class="wide"><table class="data prose checks">{"".join(html)}</table></div>')
    return Checked(sum(held), len(held) - sum(held), table + measured())


@lru_cache
def benchmark(x: str, y: str) -> tuple[dict[str, Any], str]:
    """The published runs by two metrics: the chart, and its front in words."""
    said = published.front_said(published.metric(x), published.metric(y))
    return figures.themed(published_figures.benchmark, x, y), f"<p>{escape(said)}</p>"


@lru_cache
def all_runs() -> str:
    """The chart's text equivalent."""
    metrics = published.METRICS.values()
    head = "".join(f"<th>{escape(m.title.split(',')[0])}</th>" for m in metrics)
    rows = "".join(
        f"<tr><td>{escape(r.label)}</td>{''.join(f'<td>{m.show(m.of(r))}</td>' for m in metrics)}</tr>"
        for r in sorted(published.runs(), key=lambda r: -r.accuracy)
    )
    return f'<div class="wide"><table class="data runs"><tr><th>run</th>{head}</tr>{rows}</table></div>'


@lru_cache
def marks() -> str:
    """Which mark is which family, for those who read the chart, and where the runs come from."""
    shapes = {"circle": "●", "square": "■", "diamond": "◆", "star": "★"}
    named = (f'<b class="trained">{shapes[mark]}</b> {name}' for name, mark in published_figures.MARKS.items())
    return (
        f'<p>{", ".join(named)}; grey <span class="other">●</span> a method that this app does not have. '
        f"Source: <a href='{published.URL}'>{escape(published.SOURCE)}</a>. "
        f"{page.how('measured', 'By its authors, not here. ' + published.SOURCE)}</p>"
    )


class Methods(Tab):
    """The map of methods, and which one to choose."""

    key, title = "methods", "Methods"
    choices = {
        "across": choice.one_of("across", AXES[0], published.METRICS),
        "up": choice.one_of("up", AXES[1], published.METRICS),
        **{name: choice.several(name, ticked(group), in_group(group)) for group, name in TICKS.items()},
    }

    def build(self) -> None:
        self.panel("sentence", page.sentence(""))
        with gr.Row(elem_classes="stage"):
            with page.controls():
                page.drawer_handle()
                self.control("model", page.model_choice(page.OPENING.model))
                self.panel("reasons", page.note())
            with gr.Column(elem_classes="main"):
                self.panel("problem", page.problem())
                self.panel(
                    "method", map_widget()
                )  # drawn whether or not its method is refused: the others are the model's
                self.panel("chosen", gr.HTML(elem_classes="chosen-line", min_height=64))
                self.panel("card", gr.HTML(min_height=400))
        self._advice()
        self._published()
        with self.fold("Pros and cons, as the lectures have them"):
            self.panel("sides", gr.HTML())
        with self.fold("The lectures' tables, checked") as accordion:
            self.panel("checked", gr.HTML())
            self.panel("claims", gr.HTML())
        self.panel("counted", accordion)

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
        self.panel("not_memory", page.note())
        metrics = [(m.title.split(",")[0].capitalize(), key) for key, m in published.METRICS.items()]
        with gr.Row(elem_classes="axes"):
            for name, axis in zip(("across", "up"), AXES, strict=True):
                made = gr.Dropdown(metrics, value=axis, label=name.capitalize(), scale=0, min_width=240)
                self.control(name, made)
        label = "The published runs by two metrics; the sentence below names the best"
        self.panel("runs", page.plot(None, label))
        self.panel("marks", page.note())
        self.panel("front", page.note())
        with self.fold(f"All {len(published.runs())} runs as a table"):
            self.panel("all_runs", gr.HTML())

    def check(self, asked: Asked) -> None:
        places(asked.spec.model or DEFAULT)  # a bare count has nothing to count by
        count(asked.spec)

    def fill(self, asked: Asked) -> dict[str, Any]:
        model = asked.spec.model or DEFAULT
        own = {name: list(asked[name]) for name in TICKS.values()}
        return {"model": model, "across": asked["across"], "up": asked["up"], **own}

    def draw(self, asked: Asked) -> dict[str, Draw]:
        spec, model = asked.spec, asked.spec.model or DEFAULT
        checked = tables(traced(model))
        chart, front = benchmark(asked["across"], asked["up"])
        return {
            "sentence": lambda: evidence.map_sentence(places(model)),
            "reasons": lambda: unsuited(model),
            "method": lambda: spectrum(model, spec.method or "lora"),
            "chosen": lambda: chosen_line(spec),
            "card": lambda: methods.method_panel(spec.method or "lora"),
            "advice": lambda: advice(situations(asked), model),
            "not_memory": lambda: f"<p>{escape(published.not_memory())}</p>",
            "runs": lambda: chart,
            "marks": marks,
            "front": lambda: page.explained(front),
            "all_runs": all_runs,
            "sides": lambda: pros_and_cons(model, traced(model)),
            "counted": lambda: gr.update(
                label=f"The lectures' tables, checked: {checked.holds} statements hold, {checked.differ} differ"
            ),
            "checked": lambda: checked.html,
            "claims": lambda: f"<h3>Their numbers, recomputed</h3>{page.claims_table('lora')}",
        }

    def slow(self, asked: Asked) -> list[Slow]:
        """Memory that the advice states, so that it is what the Memory tab says."""
        specs: dict[RunSpec, None] = {}
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


def unsuited(model: str) -> str:
    """Which methods are not for a model, and why."""
    reasons = methods.not_here(model)
    return f"<details><summary>Methods not for this model</summary>{reasons}</details>" if reasons else ""


if __name__ == "__main__":
    page.run_alone(Methods())
