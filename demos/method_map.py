"""The map of methods: how deep each reaches into the model, what it trains, when to use it, and what others measured."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import methods, page
from peftlab import RunSpec, checks, count, evidence, figures, published, published_figures, words
from peftlab.catalog.guide import CASES, GROUPS, SIDES, SPECTRUM, TABLES, Case, Family, weighed
from peftlab.catalog.models import DEFAULT, find
from peftlab.count import why_not
from peftlab.evidence import Place
from peftlab.methods import METHODS

TAB = "methods"
AXES = ("parameters", "accuracy")
"""Of the benchmark, at first: across and up."""
MAP = """
let last = null;
const all = () => [...element.querySelectorAll('button[data-method]')];
const why = (text) => { element.querySelector('.why-not').textContent = text; };
const mark = () => all().forEach((b) => b.setAttribute('aria-pressed', b.dataset.method === props.value.method));
const choose = (method) => { props.value = {...props.value, method}; mark(); trigger('input'); };
element.addEventListener('click', (e) => {
  const chip = e.target.closest('button[data-method]');
  if (!chip) return;
  if (chip.getAttribute('aria-disabled') === 'true') return why(chip.title);
  last = chip.dataset.method;
  why('');
  choose(last);
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
COUNTED = (
    "Parameters are counted from the model's shapes and the registry's terms, each method at its automatic settings."
)
READ = "Our reading: a sentence of the registry, held against the lecture's by a person."


def spectrum(model: str, chosen: str | None) -> dict[str, str]:
    """What the map holds: its HTML, and the method that is chosen on it."""
    on = evidence.places(model)
    families = "".join(_family(family, on, chosen) for family in SPECTRUM)
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


def map_widget(value: dict[str, str]) -> gr.HTML:
    return gr.HTML(
        value,
        html_template='<div class="spectrum"><p class="ends"><span>touches nothing inside</span>'
        "<span>changes the computation</span></p>"
        '<div class="families" role="group" aria-label="Methods, by how deep they reach">${value.families}</div>'
        f'<p class="note">Bars: the share that is trained, on a log scale from {evidence.LEAST:.4f}% to 100%. '
        f'{page.how("exact", COUNTED)}</p><p class="why-not" aria-live="polite"></p></div>',
        js_on_load=MAP,
        elem_classes="drawn-map",
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
    return f'<p class="weighed">{first}{asked}</p>' + "".join(_case(case, model) for case in cases)


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


def pros_and_cons(model: str) -> str:
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
    return f'<div class="wide"><table class="data prose sides">{head}{"".join(rows)}</table></div>{measured()}'


def measured() -> str:
    """Where the times of a token come from; nothing while there are none."""
    source = evidence.race_source()
    return f'<p class="note">{page.how("measured", source)} Times of a token.</p>' if source else ""


@lru_cache
def tables() -> tuple[int, int, str]:
    """The lectures' tables, statement by statement: how many hold, how many differ, and all of them as HTML."""
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
    return (
        sum(held),
        len(held) - sum(held),
        f'<div class="wide"><table class="data prose checks">{"".join(html)}</table></div>{measured()}',
    )


def benchmark(x: str, y: str) -> tuple[dict[str, Any], str]:
    """The published runs by two metrics: the chart, and its front in words."""
    said = published.front_said(published.metric(x), published.metric(y))
    return figures.themed(published_figures.benchmark, x, y), f"<p>{escape(said)}</p>"


def all_runs() -> str:
    """The chart's text equivalent."""
    metrics = published.METRICS.values()
    head = "".join(f"<th>{escape(m.title.split(',')[0])}</th>" for m in metrics)
    rows = "".join(
        f"<tr><td>{escape(r.label)}</td>{''.join(f'<td>{m.show(m.of(r))}</td>' for m in metrics)}</tr>"
        for r in sorted(published.runs(), key=lambda r: -r.accuracy)
    )
    return f'<div class="wide"><table class="data runs"><tr><th>run</th>{head}</tr>{rows}</table></div>'


def _marks() -> str:
    """Which mark is which family, for those who read the chart."""
    shapes = {"circle": "●", "square": "■", "diamond": "◆", "star": "★"}
    named = (f'<b class="trained">{shapes[mark]}</b> {name}' for name, mark in published_figures.MARKS.items())
    return f'{", ".join(named)}; grey <span class="other">●</span> a method that this app does not have.'


def build(spec: gr.State) -> page.View:
    changing = partial(page.changing, TAB)
    model_key, opening = page.OPENING.model or DEFAULT, page.OPENING.method
    sentence = page.sentence(evidence.map_sentence(evidence.places(model_key)))
    with gr.Row(elem_classes="stage"):
        with page.controls():
            page.drawer_handle()
            model = page.model_choice(model_key)
            reasons = page.note(unsuited(model_key))
        with gr.Column(elem_classes="main"):
            problem = page.problem()
            chart = map_widget(spectrum(model_key, opening))
            line = gr.HTML(chosen_line(page.OPENING), elem_classes="chosen-line")
            panel = gr.HTML(methods.method_panel(opening or "lora"))
    gr.HTML("<h2>Which one, and whether any</h2>", js_on_load=None, elem_classes="part")
    with gr.Row(elem_classes="panes"):
        with gr.Column(min_width=320):
            ticks = [
                gr.CheckboxGroup(
                    [(case.when, key) for key, case in CASES.items() if case.group == group],
                    value=[key for key, case in CASES.items() if case.group == group and case.ticked],
                    label=title,
                )
                for group, title in GROUPS.items()
            ]
        with gr.Column(min_width=320):
            advised = gr.HTML(advice((key for key, case in CASES.items() if case.ticked), model_key))
    gr.HTML("<h2>What others measured</h2>", js_on_load=None, elem_classes="part")
    page.note(f"<p>{escape(published.not_memory())}</p>")
    with gr.Row(elem_classes="axes"):
        choices = [(m.title.split(",")[0].capitalize(), key) for key, m in published.METRICS.items()]
        x, y = (
            gr.Dropdown(choices, value=axis, label=label, scale=0, min_width=240)
            for axis, label in zip(AXES, ("Across", "Up"), strict=True)
        )
    drawn, front = benchmark(*AXES)
    runs = page.plot(drawn, "The published runs by two metrics; the sentence below names the best")
    page.note(
        f"<p>{_marks()} Source: <a href='{published.URL}'>{escape(published.SOURCE)}</a>. "
        f"{page.how('measured', 'By its authors, not here. ' + published.SOURCE)}</p>"
    )
    words_of_front = page.note(front)
    with gr.Accordion(f"All {len(published.runs())} runs as a table", open=False):
        gr.HTML(all_runs())
    with gr.Accordion("Pros and cons, as the lectures have them", open=False):
        sides = gr.HTML(pros_and_cons(model_key))
    holds, differ, checked = tables()
    with gr.Accordion(f"The lectures' tables, checked: {holds} statements hold, {differ} differ", open=False):
        gr.HTML(checked)
        gr.HTML(f"<h3>Their numbers, recomputed</h3>{page.claims_table('lora')}")
    about = gr.State(model_key)  # the advice follows the model and the ticks, which `show` does not have

    def body(spec: RunSpec) -> tuple:
        key = spec.model or DEFAULT
        on = evidence.places(key)
        return (
            key,
            evidence.map_sentence(on),
            spectrum(key, spec.method or "lora"),
            unsuited(key),
            *chosen(spec),
            pros_and_cons(key),
            key,
        )

    def chosen(spec: RunSpec) -> tuple[str, str]:
        return chosen_line(spec), methods.method_panel(spec.method or "lora")

    def choose(spec: RunSpec, value: dict[str, str]) -> tuple:
        new, _ = methods.edit(spec, ["method"], [value])
        return (new, *chosen(new))

    def choose_model(spec: RunSpec, model: str) -> tuple:
        page.public({"model": model})
        method = spec.method or "lora"
        new = spec.but(model=model, target_modules=None, layers=None)
        new = RunSpec(model=model, task=spec.task) if why_not(method, model) else new
        return (new, *body(new))

    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    show = page.refusing(body, 8)  # a bare count from another tab has nothing to count by
    shown = [problem, model, sentence, chart, reasons, line, panel, sides, about]
    chart.input(changing(page.refusing(choose, 3)), [spec, chart], [problem, spec, line, panel], **quiet)
    model.input(changing(page.refusing(choose_model, 9)), [spec, model], [problem, spec, *shown[1:]], **quiet)
    gr.on(
        [about.change, *(t.input for t in ticks)],
        lambda model, *ticked: advice((key for keys in ticked for key in keys), model),
        [about, *ticks],
        advised,
        **quiet,
    )
    gr.on([x.input, y.input], benchmark, [x, y], [runs, words_of_front], **quiet)
    return page.View(TAB, show, shown)


def unsuited(model: str) -> str:
    """Which methods are not for a model, and why."""
    reasons = methods.not_here(model)
    return f"<details><summary>Methods not for this model</summary>{reasons}</details>" if reasons else ""


if __name__ == "__main__":
    page.run_alone("Methods", build)
