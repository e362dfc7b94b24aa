"""What every tab shares: the theme, controls built from the settings' own words, charts, and how a demo is launched."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from peftlab import RunSpec, SpecError, figures, hardware, resolve, tasks, words
from peftlab.catalog.claims import CLAIMS
from peftlab.catalog.methods import FAMILIES
from peftlab.catalog.models import DEFAULT, MODELS, find
from peftlab.catalog.papers import PAPERS
from peftlab.catalog.presets import PRESETS
from peftlab.methods import METHODS, why_not
from peftlab.resolve import METHOD_SETTINGS, resolve_here
from peftlab.spec import SETTINGS, closest

ASSETS = Path(__file__).resolve().parent.parent / "assets"
OPENING = RunSpec(model="llama-3.1-8b", method="lora")
"""What the page opens with: large enough that the difference matters."""
NAME_OR_COUNT = re.compile(r"[\w.-]+/[\w.-]+|[\d.]+[KMBTkmbt]")
CONVENTION = "12n"
"""How the page counts at first: lecture 11.2's."""
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


def _about(name: str) -> dict[str, Any]:
    about = SETTINGS[name]
    return {"label": label(name), "info": about.meaning[0].upper() + about.meaning[1:]}


def slider(name: str, low: float, high: float, value: float, step: float = 1) -> gr.Slider:
    return gr.Slider(low, high, value, step=step, **_about(name))


def number(name: str, value: float | None = None) -> gr.Number:
    about = SETTINGS[name]
    return gr.Number(value, placeholder=about.automatic, precision=0 if about.type is int else None, **_about(name))


def text(name: str) -> gr.Textbox:
    return gr.Textbox(placeholder=SETTINGS[name].automatic, max_lines=1, **_about(name))


def choice(name: str, choices: Sequence[Any] | None = None, value: Any = None, **rest: Any) -> gr.Dropdown:
    """Registry choices as given, or the setting's own with `automatic` first."""
    about = SETTINGS[name]
    if choices is None:
        choices = [(f"automatic: {about.automatic}", ""), *about.choices]
        value = value or ""
    return gr.Dropdown(choices, value=value, **(_about(name) | rest))


def model_choice(value: str | None) -> gr.Dropdown:
    """Any model that can be counted; what `public` lets through may be typed in."""
    info = "From the catalogue, a Hub id, or a bare count such as 100B"
    return choice("model", choices_of(MODELS), value, allow_custom_value=True, info=info)


def choices_of(registry: Any) -> list[tuple[str, str]]:
    return [(entry.name, key) for key, entry in registry.items()]


CHOOSER = """
const sync = () => { const box = element.querySelector('select'); if (box && props.value) box.value = props.value.method; };
element.addEventListener('change', (e) => { props.value = {...props.value, method: e.target.value}; trigger('input'); });
watch('value', sync);
sync();
"""


def method_choice(method: str, model: str) -> gr.HTML:
    """The registry by family. A method that does not suit the model is there, disabled; `not_here` says why."""
    return gr.HTML(
        method_value(method, model),
        html_template=f'<label class="chooser"><span>Method</span><small>{_about("method")["info"]}</small>'
        "<select>${value.options}</select></label>",
        js_on_load=CHOOSER,
    )


def method_value(method: str | None, model: str | None) -> dict[str, str]:
    """What the chooser holds. `edit` reads the method from it."""
    return {"method": method or "lora", "options": method_options(model or DEFAULT)}


@lru_cache(maxsize=64)
def method_options(model: str) -> str:
    """The options of the chooser, as HTML, for a model."""
    groups = []
    for family in FAMILIES:
        options = "".join(
            f'<option value="{key}"{" disabled" if why_not(key, model) else ""}>{escape(entry.name)}'
            f"{' (not for this model)' if why_not(key, model) else ''}</option>"
            for key, entry in METHODS.items()
            if entry.about.family == family
        )
        groups.append(f'<optgroup label="{family.capitalize()}">{options}</optgroup>')
    return "".join(groups)


@lru_cache(maxsize=64)
def not_here(model: str) -> str:
    """The disabled methods' reasons."""
    reasons = [why_not(key, model) for key in METHODS]
    return "".join(f"<p>{escape(reason)}.</p>" for reason in reasons if reason)


def method_card(key: str, model: str) -> str:
    """What a method trains, and why some are not offered."""
    reasons = not_here(model)
    fold = f"<details><summary>Methods not for this model</summary>{reasons}</details>" if reasons else ""
    return f"{escape(METHODS[key].about.trains)}{fold}"


def method_panel(key: str) -> str:
    """A method in full: the path of the data, why it should work, when to use it, when not, and where it comes from."""
    about = METHODS[key].about
    family = about.family + (", reparameterized" if about.reparameterized else "")
    sources = "; ".join(f'<a href="{PAPERS[p].url}">{escape(PAPERS[p].citation)}</a>' for p in about.papers)
    mistakes = "".join(f"<li>{escape(m)}</li>" for m in about.mistakes)
    rows = (
        ("Why it should work", about.hypothesis),
        ("When", about.when),
        ("When not", about.when_not),
        ("In use", about.inference),
        ("Merging", about.merging),
    )
    words = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return (
        f'<div class="method"><h3>{escape(about.name)} <small>{family}</small></h3>'
        f"{figures.data_path(METHODS[key].drawing, about.name)}"
        f'<dl>{words}<dt>Common mistakes</dt><dd><ul>{mistakes}</ul></dd></dl><p class="note">{sources}</p></div>'
    )


SLIDERS = {"rank": (1, 256, 8), "virtual_tokens": (1, 100, 20), "bottleneck": (1, 256, 16), "block_size": (2, 64, 16)}
BY_METHOD = (*SLIDERS, "train_norms", "target_modules")
"""Settings whose controls show the method's own default when the method changes; the others are empty when automatic."""


def method_settings(spec: RunSpec, *names: str) -> list[Any]:
    """A control for each of `names`, settings that only some methods read, shown where `spec`'s method reads it."""
    made = []
    for name in names:
        if name in SLIDERS:
            control: Any = slider(name, *SLIDERS[name])
        elif name == "train_norms":
            control = gr.Checkbox(False, **_about(name))
        elif name == "target_modules":
            control = choice(name, TARGETS, "all-linear", allow_custom_value=True)
        else:
            control = number(name)
        control.visible = name in METHODS[spec.method or "lora"].settings
        made.append(control)
    return made


def method_updates(spec: RunSpec, names: Sequence[str], refill: bool) -> list[Any]:
    """Which of the controls `names` the spec's method reads, and their values where they are to be filled again."""
    of, countable = resolve(spec), find(spec.model or DEFAULT).config is not None
    uses = METHODS[of.method or ""].settings if countable else ()
    updates = []
    for name in names:
        values = {"value": _blank(getattr(of if name in BY_METHOD else spec, name), name)} if refill else {}
        updates.append(gr.update(visible=name in uses or name not in METHOD_SETTINGS, **values))
    return updates


def _blank(value: Any, name: str) -> Any:
    """What an empty control shows; a slider has no empty state."""
    if value is None:
        return SLIDERS[name][2] if name in SLIDERS else {"quantization": "", "target_modules": "all-linear"}.get(name)
    return value


TARGETS = (
    ("every linear layer", "all-linear"),
    ("query and value", "query,value"),
    ("attention only", "query,key,value,attention output"),
)


def preset_choice(keys: Sequence[str]) -> gr.Dropdown:
    choices = [("none", ""), *((PRESETS[key].name, key) for key in keys)]
    return gr.Dropdown(choices, value="", label="Preset", info="Published settings, with their source")


def preset_says(key: str) -> Any:
    """The preset chooser, once `key` is chosen: what it sets and who published it."""
    return gr.update(
        info=f"{PRESETS[key].says} {PRESETS[key].source}." if key else "Published settings, with their source"
    )


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
        *(f"{label(n).lower()} {_short(getattr(r, n))}" for n in (*SLIDERS, "alpha") if getattr(r, n)),
        *([f"a base in {r.quantization}"] if r.quantization != "none" else []),
        f"{r.precision} on {hardware.here().device.upper()}",
    ]
    model = MODELS.get(r.model or "")
    terms = f" {escape(model.name)} is under: {escape(model.licence)}." if model else ""
    return f"Runs with {', '.join(parts)}.{terms} {changed(spec)}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def public(values: Mapping[str, Any]) -> RunSpec:
    """A spec from a visitor's settings. Raises SpecError; files of this machine are for its own command line."""
    model, task = values.get("model") or "", values.get("task") or tasks.DEFAULT
    if model and model not in MODELS and (Path(model).exists() or not NAME_OR_COUNT.fullmatch(model)):
        raise SpecError(
            f"model={model}: no such model; {closest(model, MODELS)} A Hub id or a count such as 7B works too"
        )
    if task not in tasks.TASKS:
        raise SpecError(f"task={task}: no such task; {closest(task, tasks.TASKS)}")
    return RunSpec.from_dict(values)


def edit(spec: RunSpec, names: Sequence[str], values: Sequence[Any]) -> tuple[RunSpec, bool]:
    """`spec` with the controls' values, and whether the method is another one. Raises SpecError.

    Empty means automatic. Settings that the method does not read are left out, and a new method starts at its own.
    """
    plain = [v["method"] if isinstance(v, dict) else v for v in values]  # the chooser's value has its options too
    given = {n: v for n, v in zip(names, plain, strict=True) if v not in (None, "")}
    method = given.get("method") or spec.method or "lora"
    moved = method != (spec.method or "lora")
    unread = {n for n in METHOD_SETTINGS if moved or n not in METHODS[method].settings}
    if moved:
        unread |= {"learning_rate", "quantization"}
    wanted = spec.to_dict() | dict.fromkeys(names) | given
    return public({n: v for n, v in wanted.items() if n not in unread}), moved


def how(kind: str, tip: str) -> str:
    """The small mark that answers 'how do you know?': exact, estimated or measured."""
    words = f'aria-label="{kind}: {escape(tip)}"'
    return f'<span class="how" tabindex="0" role="note" {words}>{kind}<span class="tip">{escape(tip)}</span></span>'


def claims_table(tab: str) -> str:
    """What the lectures say beside what is computed here, as HTML."""
    rows = []
    for c in (c for c in CLAIMS if c.tab == tab):
        show = words.size if c.unit == "bytes" else lambda n: f"{n:,.0f}"
        verdict = '<span class="bad">differs</span>' if c.differs else '<span class="good">holds</span>'
        rows.append(
            f"<tr><td>{escape(c.says)}<br><small>{escape(c.source)}</small></td><td>{show(c.claimed)}</td>"
            f"<td>{show(c.computed())}</td><td>{verdict}<br><small>{escape(c.why)}</small></td></tr>"
        )
    head = "<tr><th>The lecture</th><th>says</th><th>exact</th><th></th></tr>"
    return f'<div class="wide"><table class="data claims">{head}{"".join(rows)}</table></div>'


def refusing(work: Callable[..., Any], n_outputs: int) -> Callable[..., Any]:
    """`work` with one output more, first: what was wrong, while everything else stays as it was."""

    def guarded(*args: Any) -> Any:
        try:
            result = work(*args)
        except SpecError as error:
            return (escape(str(error)), *[gr.skip()] * n_outputs)
        return ("", *result)

    return guarded


@dataclass(frozen=True)
class Resume:
    """What a page that comes back does with the run it had: `work(state)` streams the values of `outputs`."""

    work: Callable[..., Any]
    state: gr.BrowserState
    outputs: list[Any]


@dataclass(frozen=True)
class View:
    """A built tab: `show(spec, *inputs)` gives the values of `outputs`, to follow a change made elsewhere."""

    show: Callable[..., tuple]
    outputs: list[Any]
    inputs: Sequence[Any] = ()
    resume: Resume | None = None


def run_alone(title: str, build: Callable[[gr.State], View]) -> None:
    """`python demos/this_one.py`"""
    with gr.Blocks(title=title, fill_width=True) as demo:
        build(gr.State(OPENING))
    demo.launch(**launch_options(), server_port=int(sys.argv[1]) if len(sys.argv) > 1 else None)
