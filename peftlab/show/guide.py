"""The guide to methods: the map, advice for a project, pros and cons, published runs in a chart and a table."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape
from itertools import groupby
from math import log10

import plotly.graph_objects as go

from .. import units
from ..base.models import find
from ..catalog import FAMILIES
from ..count import count
from ..lectures import facts, published
from ..lectures.guide import CASES, SIDES, SPECTRUM, Case, Family, beside
from ..lectures.statements import FAILS
from ..methods import METHODS
from ..resolve import resolve
from ..spec import RunSpec
from .figures import PALETTE, Chart, blank, decades, themed
from .marks import bold, explained, heading, how, table
from .races import recorded_how
from .settings import changed, method_name
from .statements import verdict_mark

MARKS = {"full": "star", "additive": "circle", "selective": "square", "prompt-based": "diamond"}
"""The shape of each family's points. Colour says only whether the app has the method."""
DEEP, LINE = 380, 20
"""The approximate height of the plot area and the height of a name, in pixels."""
NUMBERS = ("no", "one", "two", "three", "four", "five")


def map_sentence(on: Sequence[facts.Place]) -> str:
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


def _family(family: Family, on: Sequence[facts.Place], chosen: str | None) -> str:
    """A family's chips; its reparameterized methods, if it has any, stand under a heading of their own."""
    mine = [p for p in on if METHODS[p.key].about.family == family.key]
    chips = ""
    for deep, title in enumerate(("modules", "reparameterized: another way to write a change of W")):
        if of := [p for p in mine if METHODS[p.key].about.reparameterized == bool(deep)]:
            chips += f"<h4>{title}</h4>" if len(of) < len(mine) else ""
            chips += f'<div class="chips">{"".join(_chip(p, chosen) for p in of)}</div>'
    return (
        f'<section class="family {family.key}"><h3>{family.idea} <small>{family.key}</small></h3>'
        f"<p>{escape(family.says)}</p>{chips}</section>"
    )


def _chip(place: facts.Place, chosen: str | None) -> str:
    if report := place.report:
        state, title = "", f"{report.trainable_parameters:,} trained parameters"
        share = units.percent(report.trainable_percent / 100)
        said = f'<span>{share}</span><i style="width:{100 * place.length:.1f}%"></i>'
    else:
        state, title = ' aria-disabled="true"', escape(facts.told(place.reason))
        said = "<span>not for this model</span>"
    pressed = f'data-method="{place.key}" aria-pressed="{str(place.key == chosen).lower()}"'
    name = escape(METHODS[place.key].name)
    return f'<button type="button" {pressed}{state} title="{title}"><b>{name}</b>{said}</button>'


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
    advised = Counter(key for case in cases for key in case.methods)
    named = [f"<b>{escape(METHODS[key].name)}</b> in {n} of {len(cases)}" for key, n in advised.most_common()]
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
def benchmark(x: str, y: str) -> tuple[dict[str, Chart], str]:
    """The published runs by two metrics: the chart, and its front in words."""
    said = published.front_said(published.metric(x), published.metric(y))
    return themed(benchmark_chart, x, y), f"<p>{escape(said)}</p>"


@lru_cache
def all_runs() -> str:
    """The chart's text equivalent."""
    metrics = published.METRICS.values()
    ranked = sorted(published.runs(), key=lambda r: -r.accuracy)
    rows = [(escape(r.label), *(m.show(m.of(r)) for m in metrics)) for r in ranked]
    return table(("run", *(escape(m.title.split(",")[0]) for m in metrics)), rows, "runs")


@lru_cache
def marks() -> str:
    """Which mark is which family, for those who read the chart, and where the runs come from."""
    shapes = {"circle": "●", "square": "■", "diamond": "◆", "star": "★"}
    named = (f'<b class="trained">{shapes[mark]}</b> {name}' for name, mark in MARKS.items())
    return (
        f'<p>{", ".join(named)}; grey <span class="other">●</span> a method that this app does not have. '
        f"Source: <a href='{published.URL}'>{escape(published.SOURCE)}</a>. "
        f"{how('measured', 'By its authors, not here. ' + published.SOURCE)}</p>"
    )


def benchmark_chart(x_key: str, y_key: str, theme: str) -> go.Figure:
    """Every run by two metrics. Raises SpecError for an unknown metric."""
    c, x, y = PALETTE[theme], published.metric(x_key), published.metric(y_key)
    scales = ", ".join(name for name, m in (("across", x), ("up", y)) if m.log)
    title = f"{y.title[0].upper()}{y.title[1:]}, by {x.title}{f' (log scale {scales})' if scales else ''}"
    chart = blank(theme, 460, title={"text": title})
    line = published.front(x, y)
    chart.add_scatter(
        x=_values(line, x), y=_values(line, y), mode="lines", hoverinfo="skip", name="front",
        line={"color": c["text"], "width": 2, "dash": "dot"},
    )  # fmt: skip
    for family, mark in ((None, "circle"), *MARKS.items()):
        of = [r for r in published.runs() if r.family == family]
        chart.add_scatter(
            x=_values(of, x), y=_values(of, y), mode="markers", name=family or "other",
            marker={
                "symbol": mark, "size": 18 if mark == "star" else 11, "color": c["trained" if family else "overhead"],
                "opacity": 1 if family else 0.65, "line": {"color": c["surface"], "width": 1},
            },
            customdata=[_all_of(r) for r in of], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    _names(chart, x, y, c)
    for update, m in ((chart.update_xaxes, x), (chart.update_yaxes, y)):
        low, high = _range(m)
        update(**decades(10**low, 10**high) if m.log else {"range": [low, high], "zeroline": True})
    return chart.update_xaxes(title_text=x.title)


def _values(of: Sequence[published.Run], m: published.Metric) -> list[float]:
    """The runs' values in the unit of the axis."""
    return [m.of(r) / m.scale for r in of]


def _all_of(run: published.Run) -> str:
    """What hovering over a run's point tells: all its figures."""
    figures = "<br>".join(f"{m.title.split(',')[0]} {m.show(m.of(run))}" for m in published.METRICS.values())
    return f"<b>{escape(run.label)}</b><br>{figures}<br>{escape(run.date)}"


def _names(chart: go.Figure, x: published.Metric, y: published.Metric, c: dict[str, str]) -> None:
    """Writes names above their points, one under another where they would overlap on a narrow screen."""
    (left, right), (low, high) = _range(x), _range(y)
    named = sorted(published.notable(), key=lambda pair: -y.of(pair[1]))
    line = -float(LINE)
    for text, run in named:
        at = [log10(value) if m.log else value for m in (x, y) for value in _values([run], m)]
        point = DEEP * (high - at[1]) / (high - low)  # pixels from the top
        line = max(point - 1.5 * LINE, line + LINE)
        ends = at[0] > (left + right) / 2
        chart.add_annotation(
            x=at[0], y=at[1], text=f"<b>{escape(text)}</b>", showarrow=True, arrowhead=0, arrowwidth=1.5,
            arrowcolor=c["text"], ax=-20 if ends else 20, ay=line - point, xanchor="right" if ends else "left",
            font={"size": 15},
        )  # fmt: skip


def _range(m: published.Metric) -> tuple[float, float]:
    """The ends of an axis with some room around the runs; powers of ten on a logarithmic one."""
    values = _values(published.runs(), m)
    low, high = min(values), max(values)
    if m.log:
        low, high = log10(low), log10(high)
    elif low < high / 2:  # else more than half of the axis would be empty
        low = 0.0
    room = 0.06 * (high - low)
    return low - room, high + 2 * room
