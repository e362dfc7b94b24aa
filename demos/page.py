"""What every tab shares: the theme, controls built from the settings' own words, charts, and how a demo is launched."""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from peftlab import RunSpec, SpecError, hardware, resolve, tasks, words
from peftlab.catalog.claims import CLAIMS
from peftlab.catalog.models import MODELS
from peftlab.memory.conventions import EXACT
from peftlab.places import ASSETS
from peftlab.resolve import resolve_here
from peftlab.spec import SETTINGS, closest

OPENING = RunSpec(model="llama-3.1-8b", method="lora")
"""What the page opens with: large enough that the difference matters."""
NAMED = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}|\d{1,20}(\.\d{1,20})?[KMBTkmbt]|config:[A-Za-z0-9_-]{1,8192}")
"""What a visitor may name besides the catalogue: a Hub id, a count, or a config that the link itself carries."""
CONVENTION = EXACT
"""How the page counts at first: what the run allocates."""
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
DRAW = """
const draw = () => {
  const figure = props.value && props.value[document.body.classList.contains('dark') ? 'dark' : 'light'];
  const place = element.querySelector('.plot');
  if (!figure || !window.Plotly || !place) return;
  const {title, ...layout} = figure.layout;
  element.querySelector('h3').textContent = title.text;
  place.style.minHeight = layout.height + 'px';
  window.Plotly.react(place, figure.data, layout, {displayModeBar: false, responsive: true});
};
const wait = () => window.Plotly ? draw() : setTimeout(wait, 50);
wait();
watch('value', draw);
new MutationObserver(draw).observe(document.body, {attributes: true, attributeFilter: ['class']});
new ResizeObserver(() => {
  const place = element.querySelector('.plot');
  if (window.Plotly && place && place.layout && place.offsetWidth) window.Plotly.Plots.resize(place);
}).observe(element);
"""
"""The title moves into the page, where it can wrap. Plotly.react keeps zoom and does not flicker, and the reader's own
theme picks the template; gr.Plot does neither."""
UNDER_WAY = 10.0
"""Seconds after which an answer that the page has not acknowledged is taken to have reached it."""
DRAWER = "element.querySelector('button').onclick = () => element.closest('.controls').classList.toggle('open')"


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.gray,
        text_size=gr.themes.sizes.text_lg,
        radius_size=gr.themes.sizes.radius_sm,
        font=FONT,
        font_mono=MONO,
    ).set(
        body_background_fill="#FBFBFA",
        body_background_fill_dark="#101215",
        body_text_color="#1A1D21",
        body_text_color_dark="#ECEEF1",
        body_text_color_subdued="#565D66",
        body_text_color_subdued_dark="#A6ADB7",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_info_text_color="#565D66",
        block_info_text_color_dark="#A6ADB7",
        block_label_text_color="#1A1D21",
        block_label_text_color_dark="#ECEEF1",
        block_title_text_color="#1A1D21",
        block_title_text_color_dark="#ECEEF1",
        block_title_text_weight="600",
        border_color_primary="#D9DCE0",
        border_color_primary_dark="#3A3F47",
        input_background_fill="#FFFFFF",
        input_background_fill_dark="#16181C",
        input_border_width="1px",
        input_border_color="#B9BEC5",
        input_border_color_dark="#555C66",
        button_primary_background_fill="#B34E00",
        button_primary_background_fill_hover="#8F3E00",
        button_primary_background_fill_dark="#FF8F4A",
        button_primary_background_fill_hover_dark="#FFA56E",
        button_primary_text_color="#FFFFFF",
        button_primary_text_color_dark="#16181C",
        button_primary_border_color="transparent",
        button_primary_border_color_dark="transparent",
        checkbox_background_color_selected="#0072B2",
        checkbox_background_color_selected_dark="#0072B2",
        checkbox_border_color_selected="#0072B2",
        checkbox_border_color_selected_dark="#0072B2",
        button_secondary_background_fill="#FFFFFF",
        button_secondary_background_fill_dark="#1D2025",
        button_secondary_border_color="#B9BEC5",
        button_secondary_border_color_dark="#555C66",
        slider_color="#0072B2",
        slider_color_dark="#56B4E9",
        panel_background_fill="transparent",
        panel_background_fill_dark="transparent",
    )


def plotly_script() -> str:
    """The copy of plotly.js that the plotly package ships, so that nothing is fetched from elsewhere."""
    import plotly

    folder = Path(plotly.__file__).parent / "package_data"
    gr.set_static_paths([folder])
    return f'<script defer src="gradio_api/file={folder / "plotly.min.js"}"></script>'


def launch_options() -> dict[str, Any]:
    """For `Blocks.launch`: the look, and limits on what visitors can send."""
    return {
        "theme": theme(),
        "css_paths": [ASSETS / "style.css"],
        "head": plotly_script() + '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "max_file_size": "5mb",
        "footer_links": ["settings"],
    }


def plot(value: dict[str, Any] | None, label: str) -> gr.HTML:
    """A plotly figure made by `figures.themed`; `label` is read to those who cannot see it."""
    layout = value["light"]["layout"] if value else {}
    height, title = layout.get("height", 300), layout.get("title", {}).get("text", "")
    return gr.HTML(
        value,
        html_template=f"<h3>{escape(title)}</h3>"
        f'<div class="plot" role="img" aria-label="{escape(label)}" style="min-height:{height}px"></div>',
        js_on_load=DRAW,
        elem_classes="figure",
    )


def sentence(text: str) -> gr.HTML:
    return gr.HTML(text, html_template='<h2 class="sentence" aria-live="polite">${value}</h2>', js_on_load=None)


def note(text: str = "") -> gr.HTML:
    return gr.HTML(text, html_template='<div class="note">${value}</div>', js_on_load=None)


def problem() -> gr.HTML:
    """Where a refusal appears: beside the controls that caused it, and away again when it is cured."""
    return gr.HTML("", html_template='<div class="problem" role="alert">${value}</div>', js_on_load=None)


def controls() -> gr.Column:
    """The column of settings: at the left on a desktop, a drawer at the foot of a phone's screen."""
    return gr.Column(elem_classes="controls", scale=0, min_width=320)


def drawer_handle() -> gr.HTML:
    return gr.HTML('<button type="button" class="handle">Settings</button>', js_on_load=DRAWER, elem_classes="drawer")


def label(name: str) -> str:
    return name.replace("_", " ").capitalize().replace("gpu", "GPU").replace("Gpu", "GPU")


def described(name: str) -> dict[str, Any]:
    about = SETTINGS[name]
    return {"label": label(name), "info": about.meaning[0].upper() + about.meaning[1:]}


def slider(name: str, low: float, high: float, value: float, step: float = 1) -> gr.Slider:
    return gr.Slider(low, high, value, step=step, **described(name))


def text(name: str) -> gr.Textbox:
    """For a name or a number; empty means automatic, which gr.Number on a hidden tab would send as 0."""
    return gr.Textbox(placeholder=SETTINGS[name].automatic, max_lines=1, **described(name))


def choice(name: str, choices: Sequence[Any] | None = None, value: Any = None, **rest: Any) -> gr.Dropdown:
    """Registry choices as given, or the setting's own with `automatic` first."""
    about = SETTINGS[name]
    if choices is None:
        choices = [(f"automatic: {about.automatic}", ""), *about.choices]
        value = value or ""
    return gr.Dropdown(choices, value=value, **(described(name) | rest))


def model_choice(value: str | None) -> gr.Dropdown:
    """Any model that can be counted; what `public` lets through may be typed in."""
    info = "From the catalogue, a Hub id, or a bare count such as 100B"
    return choice("model", choices_of(MODELS), value, allow_custom_value=True, info=info)


def choices_of(registry: Any) -> list[tuple[str, str]]:
    return [(entry.name, key) for key, entry in registry.items()]


def changed(spec: RunSpec) -> str:
    """Which settings differ from automatic, in a line."""
    try:
        usual = resolve(RunSpec(model=spec.model, method=spec.method, task=spec.task))
    except SpecError:
        return ""
    marks = [
        f"{escape(label(name))} <b>{escape(_short(value))}</b>"
        for name, value in spec.to_dict().items()
        if name not in ("model", "method", "task") and value != getattr(usual, name)
    ]
    return "Changed: " + ", ".join(marks) if marks else "Every setting is automatic."


def settings_line(spec: RunSpec) -> str:
    """What a run with these settings uses, automatic values included."""
    r = resolve_here(spec)
    parts = [
        f"learning rate {r.learning_rate:g}",
        f"{r.steps} steps of {r.batch_size} examples",
        *(
            f"{label(n).lower()} {_short(getattr(r, n))}"
            for n in ("rank", "alpha", "virtual_tokens", "bottleneck", "block_size")
            if getattr(r, n)
        ),
        *([f"a base in {r.quantization}"] if r.quantization != "none" else []),
        f"{r.precision} on {hardware.here().device.upper()}",
    ]
    return f"Runs with {', '.join(parts)}.{escape(terms(r.model or ''))} {changed(spec)}"


def terms(model: str) -> str:
    """A model's licence, as a sentence after others; empty for one that is not in the catalogue."""
    return f" {MODELS[model].name} is under: {MODELS[model].licence}." if model in MODELS else ""


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def public(values: Mapping[str, Any]) -> RunSpec:
    """A spec from a visitor's settings. Raises SpecError; files of this machine are for its own command line."""
    model, task = str(values.get("model") or ""), values.get("task") or tasks.DEFAULT
    if model and model not in MODELS and (not NAMED.fullmatch(model) or ("/" in model and Path(model).exists())):
        raise SpecError(
            f"model={model}: no such model; {closest(model, MODELS)} A Hub id or a count such as 7B works too"
        )
    if task not in tasks.TASKS:
        raise SpecError(f"task={task}: no such task; {closest(task, tasks.TASKS)}")
    return RunSpec.from_dict(values)


def how(kind: str, tip: str) -> str:
    """The small mark that answers 'how do you know?': exact, estimated or measured."""
    words = f'aria-label="{kind}: {escape(tip)}"'
    return f'<span class="how" tabindex="0" role="note" {words}>{kind}<span class="tip">{escape(tip)}</span></span>'


def claims_table(tab: str) -> str:
    """What the lectures say beside what is computed here, table by table, as HTML."""
    rows = []
    for source, claims in groupby((c for c in CLAIMS if c.tab == tab), key=lambda c: c.source):
        rows.append(f'<tr><th colspan="4" class="source">{escape(source)}</th></tr>')
        for c in claims:
            show = {"bytes": words.size, "percent": lambda n: words.percent(n / 100)}.get(c.unit, lambda n: f"{n:,.0f}")
            begin = "" if c.least is None else f"{show(c.least)} to " if c.least else "under "
            verdict = '<span class="bad">differs</span>' if c.differs else '<span class="good">holds</span>'
            rows.append(
                f"<tr><td>{escape(c.says)}</td><td>{begin}{show(c.claimed)}</td>"
                f"<td>{show(c.computed())}</td><td>{verdict}<br><small>{escape(c.why)}</small></td></tr>"
            )
    head = "<tr><th></th><th>claimed</th><th>exact</th><th></th></tr>"
    return f'<div class="wide"><table class="data claims">{head}{"".join(rows)}</table></div>'


class Refused(tuple):
    """An answer that says what was wrong and changes nothing."""


def refusing(work: Callable[..., Any], n_outputs: int) -> Callable[..., Any]:
    """`work` with one output more, first: what was wrong, while everything else stays as it was."""

    def guarded(*args: Any) -> Any:
        try:
            result = work(*args)
        except SpecError as error:
            return Refused((escape(str(error)), *[gr.skip()] * n_outputs))
        return ("", *result)

    return guarded


class Visitor:
    """What one visitor's settings are, and what of them each tab shows.

    Events leave a page with the settings of their moment, and their answers may come in any order. So each answer asks
    here whether it is still wanted, and the page looks again after every change. One that was wanted when it left may still
    reach the page after a later one: what a change draws while another answer to its tab is under way is drawn again.
    """

    landed = False
    """Whether the link that brought them has been read."""

    def __init__(self) -> None:
        self._spec: RunSpec | None = None
        self._asked = self._made = self._traces = 0
        self._looked = 0.0
        self._sent: dict[str, float] = {}
        self._drawn: defaultdict[str, tuple[Any, ...]] = defaultdict(lambda: (OPENING, None))

    def made(self, spec: RunSpec, tabs: Sequence[str]) -> None:
        """The settings are `spec` from now on, and the answer that says so to the page draws `tabs`."""
        self._spec = spec
        self._made += 1
        late = time.monotonic() - UNDER_WAY
        self._drawn.update({tab: (None if self._sent.get(tab, late) > late else spec, None) for tab in tabs})

    def sent(self, tab: str) -> None:
        """From now on an answer that draws `tab` is under way, unless it is found unwanted yet."""
        self._sent[tab] = time.monotonic()

    def arrived(self, tab: str) -> None:
        """It has reached the page, or never left."""
        self._sent.pop(tab, None)

    def since(self, spec: RunSpec) -> Callable[[], bool]:
        """Whether the settings are others than `spec`, or were made again since now."""
        made = self._made
        return lambda: self._made != made or self._spec not in (None, spec)

    def change(self) -> Callable[[], bool]:
        """A change is asked for. Returns whether another one was since."""
        self._asked += 1
        asked = self._asked
        return lambda: self._asked != asked

    def trace(self, spec: RunSpec) -> Callable[[], bool]:
        """The exact figures of `spec` are asked for. Returns whether they are not wanted any more."""
        self._traces += 1
        trace, changed = self._traces, self.since(spec)
        return lambda: self._traces != trace or changed()

    def looks(self, moment: float) -> Callable[[], bool]:
        """The page looks, at a `moment` of its own clock. Returns whether it was heard to look again later."""
        self._looked = max(self._looked, moment)
        return lambda: self._looked > moment

    def look(self, view: View, overtaken: Callable[[], bool], spec: RunSpec, inputs: tuple[Any, ...] = ()) -> tuple:
        """What `view`, which is on screen, must draw anew to show `spec`: nothing, if it does already."""
        changed = self.since(spec)
        if changed() or self._drawn[view.tab] in ((spec, None), (spec, inputs)):
            return skipped(view.outputs)
        answer = view.show(spec, *inputs)
        self.sent(view.tab)  # before it is asked whether it is wanted: a change since then knows of it
        if changed() or overtaken():  # then the page has looked again, or will
            self.arrived(view.tab)
            return skipped(view.outputs)
        self._drawn[view.tab] = (spec, inputs)
        return answer


_visitors: defaultdict[str | None, Visitor] = defaultdict(Visitor)


def visitor(request: gr.Request) -> Visitor:
    return _visitors[request.session_hash]


def changing(tab: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, a change of the settings on `tab`, which are among what it answers: nothing of it is shown if another one
    was asked for meanwhile."""

    def change(request: gr.Request, *args: Any) -> Any:
        who = visitor(request)
        overtaken = who.change()
        answer = work(*args)
        if overtaken():
            return skipped(answer)
        if not isinstance(answer, Refused):
            who.made(next(part for part in answer if isinstance(part, RunSpec)), [tab])
        return answer

    return change


def skipped(answer: Any) -> Any:
    """As many outputs, each left as it is."""
    return tuple(gr.skip() for _ in answer)


@dataclass(frozen=True)
class Event:
    """`work(*inputs)` gives or streams the values of `outputs`."""

    work: Callable[..., Any]
    inputs: Sequence[Any]
    outputs: Sequence[Any]


@dataclass(frozen=True)
class View:
    """A built `tab`: `show(spec, *inputs)` gives the values of `outputs`, to follow a change made elsewhere.

    It may also have something to do each time the tab is opened, when a page comes back to the run it had, and when a link
    carries more than settings: then the first input is what it carries, as a query.
    """

    tab: str
    show: Callable[..., tuple]
    outputs: Sequence[Any]
    inputs: Sequence[Any] = ()
    opened: Event | None = None
    resumed: Event | None = None
    linked: Event | None = None


def run_alone(title: str, build: Callable[[gr.State], View]) -> None:
    """`python demos/this_one.py`"""
    with gr.Blocks(title=title, fill_width=True) as demo:
        build(gr.State(OPENING))
    demo.launch(**launch_options(), server_port=int(sys.argv[1]) if len(sys.argv) > 1 else None)
