"""What every tab shares: the theme, controls built from the settings' own words, charts, and how a demo is launched."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr

from demos.tab import Asked, Tab
from peftlab import RunSpec, SpecError, hardware, resolve, tasks, words
from peftlab.catalog.claims import CLAIMS
from peftlab.catalog.models import DEFAULT, MODELS, find
from peftlab.memory.conventions import EXACT
from peftlab.places import ASSETS
from peftlab.resolve import resolve_here
from peftlab.spec import SETTINGS, closest

log = logging.getLogger(__name__)
OPENING = RunSpec(model="llama-3.1-8b", method="lora")
"""What the page opens with: large enough that the difference matters."""
NAMED = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}|\d{1,20}(\.\d{1,20})?\s?[KMBTkmbt]|config:[A-Za-z0-9_-]{1,8192}")
"""What a visitor may name besides the catalogue: a Hub id, a count, or a config that the link itself carries."""
CONVENTION = EXACT
"""How the page counts at first: what the run allocates."""
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
PLOT = "const begin = () => window.peftlab ? peftlab.plot(element, props, watch) : setTimeout(begin, 20); begin();"
DRAWER = "element.querySelector('button').onclick = () => element.closest('.controls').classList.toggle('open')"


def script(*names: str) -> str:
    """Files of this folder as a browser gets them: without comments of whole lines and without indentation."""
    lines = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names).splitlines()
    return "\n".join(line for line in map(str.strip, lines) if line and not line.startswith(("//", "/**", "* ")))


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
        js_on_load=PLOT,
        elem_classes="figure",
    )


def sentence(text: str) -> gr.HTML:
    return gr.HTML(text, html_template='<h2 class="sentence" aria-live="polite">${value}</h2>', js_on_load=None)


def note(text: str = "") -> gr.HTML:
    return gr.HTML(text, html_template='<div class="note">${value}</div>', js_on_load=None)


def problem() -> gr.HTML:
    """Where a refusal appears: beside the controls that caused it, and away again when it is cured."""
    return gr.HTML("", html_template='<div class="problem" role="alert">${value}</div>', js_on_load=None)


def blank(value: Any) -> Any:
    """What an empty control shows of a setting that is automatic."""
    return "" if value is None else value if isinstance(value, (str, bool)) else _short(value)


def shown_model(spec: RunSpec) -> dict[str, Any]:
    """What a chooser of models shows. A config of the visitor's own is a choice with its name, while it is chosen."""
    key = spec.model or DEFAULT
    own = [(find(key).name, key)] if key.startswith("config:") else []
    return gr.update(value=key, choices=[*choices_of(MODELS), *own])


def slid(value: float, top: float) -> dict[str, Any]:
    """What a slider shows: one that usually ends at `top` reaches further where the value does."""
    return gr.update(value=value, maximum=max(top, value))


def opening(tab: Tab) -> Asked:
    """What a plain visit asks of `tab`, or of a store."""
    return Asked(OPENING, {name: one.usual for name, one in tab.choices.items()}, {})


def link(spec: RunSpec, **choices: str) -> dict[str, str]:
    """A run's settings as the address says them: nothing for those that the page opens with."""
    usual = dict(parse_qsl(OPENING.to_query()))
    return {n: v for n, v in parse_qsl(spec.to_query()) if usual.get(n) != v} | choices


def lessons(runs: Mapping[str, Mapping[str, str]]) -> gr.HTML:
    """A button for each run, by name, that replaces the settings with it."""
    return _replacing(runs, "lessons")


def reset(*keeping: str) -> gr.HTML:
    """A button that makes every setting of the run automatic, but those that it keeps."""
    return _replacing({"Reset to automatic": {}}, "reset", keeping)


def _replacing(runs: Mapping[str, Mapping[str, str]], kind: str, keeping: Sequence[str] = ()) -> gr.HTML:
    """Buttons that store.js hears."""
    buttons = "".join(
        f'<button type="button" class="small-button" data-replace="{escape(json.dumps(run))}" '
        f'data-keeping="{escape(json.dumps(keeping))}">{escape(name)}</button>'
        for name, run in runs.items()
    )
    return gr.HTML(f'<div class="{kind}">{buttons}</div>', js_on_load=None)


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


TERMS = {
    "amp": "Automatic mixed precision: fp32 weights, 16-bit copies for the matrix products",
    "temporaries": "Buffers that one operation needs while it runs, and then gives back",
    "closed form": "A formula in batch, length and rank, answered at once and a little off",
    "traced step": "One whole training step run without numbers, every tensor counted byte by byte",
    "held-out": "Kept apart: training never sees these, so they score what was learned",
    "CUDA graph": "All of a step's GPU work recorded once, then launched with one call",
    "fused": "Several operations done in one pass over memory, which is sooner done",
    "Greedy": "Always the likeliest token, so the same prompt gives the same answer",
    "nats": "How surprised the model is per token, in natural logarithms; lower is better",
}
"""Words of the trade that stand on the page, each with what it means."""


def term(word: str, shown: str = "") -> str:
    """A word of TERMS that says what it means on hover, on focus or when it is tapped."""
    tip = escape(TERMS[word])
    tag = f'<span class="how term" tabindex="0" role="note" aria-label="{word}: {tip}">'
    return f'{tag}{shown or word}<span class="tip">{tip}</span></span>'


def explained(text: str) -> str:
    """HTML in which the first of each of TERMS, outside tags, says what it means."""
    for word in TERMS:
        text = re.sub(rf"(?<![\w>-]){word}(?![\w-])(?![^<]*>)", lambda found: term(found[0]), text, count=1)
    return text


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


def as_update(value: Any) -> dict[str, Any]:
    """What the page takes as an update of a component."""
    return value if isinstance(value, dict) and "__type__" in value else gr.update(value=value)


def failed(error: Exception) -> str:
    """What is said of an error that nobody foresaw; its traceback goes to the log."""
    log.exception("the page: %s", error)
    return f"This failed here, and it is our fault: {type(error).__name__}. Change a setting and try again"


def run_alone(*tabs: Any) -> None:
    """`python demos/this_one.py`"""
    from demos.store import blocks

    blocks(*tabs).launch(**launch_options(), server_port=int(sys.argv[1]) if len(sys.argv) > 1 else None)
