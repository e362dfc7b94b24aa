"""The guide to methods in words: the map, advice for a project, pros and cons, published runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from itertools import groupby

from .. import units
from ..base.models import find
from ..catalog import FAMILIES
from ..count import count
from ..lectures import facts, published
from ..lectures.facts import Place
from ..lectures.guide import CASES, SIDES, SPECTRUM, Case, Family, weighed
from ..lectures.here import beside
from ..lectures.statements import FAILS
from ..methods import METHODS
from ..resolve import resolve
from ..spec import RunSpec
from . import figures, published_figures
from .marks import bold, explained, heading, how, table
from .races import recorded_how
from .settings import changed, method_name
from .statements import verdict_mark

NUMBERS = ("no", "one", "two", "three", "four", "five")


def map_sentence(on: Sequence[Place]) -> str:
    """How many methods there are, how many ideas, and how far apart they reach."""
    reports = [p.report for p in on if p.report]
    least, most = (f(reports, key=lambda r: r.trainable_parameters) for f in (min, max))
    ideas = [f.idea.lower() for f in SPECTRUM if f.key != FAMILIES[0]]
    few = bold(f"{least.trainable_parameters:,} numbers ({units.percent(least.trainable_percent / 100)})", "trained")
    return (
        f"{bold(f'{len(on)} methods')}, {NUMBERS[len(ideas)]} ideas: {', '.join(ideas[:-1])} or {ideas[-1]}. "
        f"On {bold(least.model_name, 'frozen')} they train from {few} to all "
        f"{bold(f'{most.total_parameters:,}', 'frozen')}."
    )


def spectrum(model: str, chosen: str | None) -> dict[str, str]:
    """What the map holds: its HTML, and the method that is chosen on it."""
    families = "".join(_family(family, facts.places(model), chosen) for family in SPECTRUM)
    return {"method": chosen or "lora", "families": families}


def _family(family: Family, on: Sequence[Place], chosen: str | None) -> str:
    """A family's chips; its reparameterized methods, if it has any, stand under a heading of their own."""
    mine = [p for p in on if METHODS[p.key].about.family == family.key]
    parts = [(deep, list(of)) for deep, of in groupby(sorted(mine, key=_deep), key=_deep)]
    chips = ""
    for deep, of in parts:
        title = "reparameterized: another way to write a change of W" if deep else "modules"
        chips += f"<h4>{title}</h4>" if len(parts) > 1 else ""
        chips += f'<div class="chips">{"".join(_chip(p, chosen) for p in of)}</div>'
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
            f'<button type="button" {pressed} aria-disabled="true" title="{escape(facts.told(place.reason))}">'
            f"<b>{name}</b><span>not for this model</span></button>"
        )
    share = units.percent(place.report.trainable_percent / 100)
    return (
        f'<button type="button" {pressed} title="{place.report.trainable_parameters:,} trained parameters">'
        f'<b>{name}</b><span>{share}</span><i style="width:{100 * place.length:.1f}%"></i></button>'
    )


def chosen_line(spec: RunSpec) -> str:
    """What the chosen method trains with the settings on screen."""
    report = count(resolve(spec))
    return (
        f"<p>{bold(method_name(report))} trains {bold(f'{report.trainable_parameters:,}', 'trained')} of "
        f"{bold(f'{report.total_parameters:,}', 'frozen')} numbers: "
        f"{bold(units.percent(report.trainable_percent / 100), 'trained')}. "
        f"Its file has {units.size(report.adapter_bytes)}. <small>{changed(spec)}</small></p>"
    )


def advice(keys: Iterable[str], model: str) -> str:
    """What to do in the situations ticked: the methods that most of them ask for, then each with its reason."""
    ticked = set(keys)
    cases = [case for key, case in CASES.items() if key in ticked]
    if not cases:
        return '<p class="note">Tick what is true of your project.</p>'
    named = [f"<b>{escape(METHODS[key].name)}</b> in {n} of {len(cases)}" for key, n in weighed(cases)]
    first = "First try without training. " if any(case.group == "none" for case in cases) else ""
    asked = f"Advised: {', '.join(named)}." if named else ""
    return explained(f'<p class="weighed">{first}{asked}</p>' + "".join(_case(case, model) for case in cases))


def _case(case: Case, model: str) -> str:
    of = case.model or model
    uses = "".join(f"<li>{escape(facts.counted(key, of))}</li>" for key in case.methods)
    counts = f"<details><summary>What they train on {escape(find(of).name)}</summary><ul>{uses}</ul></details>"
    said = beside(case, of)
    found = (f"<b>Here:</b> {escape(said)}" if said else "") + (f" {verdict_mark(FAILS)}" if case.differs else "")
    return (
        f'<section class="case"><h4>{escape(case.when)}</h4><p><b>{escape(case.advice)}</b> {escape(case.why)}</p>'
        + (f'<p class="here">{found}</p>' if found else "")
        + (counts if uses else "")
        + f"<small>{escape(case.source)}</small></section>"
    )


@lru_cache(maxsize=64)
def pros_and_cons(model: str, traced: tuple[bool, ...] = ()) -> str:
    """The lectures' pros and cons, each with what is found of it for this model; `traced` as for `tab_table`."""
    rows: list[Sequence[str] | str] = []
    for source, sides in groupby(SIDES, key=lambda s: s.source):
        rows.append(heading(source))
        for s in sides:
            found = [*(facts.of_method(key, model) for key in s.methods), beside(s, model)]
            pros, cons = ("<br>".join(escape(text) for text in side) for side in (s.pros, s.cons))
            rows.append((f"<b>{escape(s.of)}</b>", pros, cons, escape(" ".join(filter(None, found)))))
    return explained(table(("", "pros", "cons", "here"), rows, "prose sides")) + measured()


def measured() -> str:
    """Where the times of a token come from, as HTML; empty before they are recorded."""
    race = facts.timed_race()
    return f'<p class="note">{recorded_how(race)} Times of a token.</p>' if race else ""


@lru_cache
def benchmark(x: str, y: str) -> tuple[dict[str, figures.Chart], str]:
    """The published runs by two metrics: the chart, and its front in words."""
    said = published.front_said(published.metric(x), published.metric(y))
    return figures.themed(published_figures.benchmark, x, y), f"<p>{escape(said)}</p>"


@lru_cache
def all_runs() -> str:
    """The chart's text equivalent."""
    metrics = published.METRICS.values()
    rows = [
        (escape(r.label), *(m.show(m.of(r)) for m in metrics))
        for r in sorted(published.runs(), key=lambda r: -r.accuracy)
    ]
    return table(("run", *(escape(m.title.split(",")[0]) for m in metrics)), rows, "runs")


@lru_cache
def marks() -> str:
    """Which mark is which family, for those who read the chart, and where the runs come from."""
    shapes = {"circle": "●", "square": "■", "diamond": "◆", "star": "★"}
    named = (f'<b class="trained">{shapes[mark]}</b> {name}' for name, mark in published_figures.MARKS.items())
    return (
        f'<p>{", ".join(named)}; grey <span class="other">●</span> a method that this app does not have. '
        f"Source: <a href='{published.URL}'>{escape(published.SOURCE)}</a>. "
        f"{how('measured', 'By its authors, not here. ' + published.SOURCE)}</p>"
    )
