"""What every tab shares: the theme, controls built from the settings' own words, charts, and how a demo is launched."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import gradio as gr

from demos.tab import Asked, Tab
from peftlab import RunSpec, SpecError, tasks
from peftlab.catalog.models import DEFAULT, MODELS, find
from peftlab.places import ASSETS
from peftlab.show.settings import label, short
from peftlab.spec import SETTINGS, closest

OPENING = RunSpec(model="llama-3.1-8b", method="lora")
"""What the page opens with: large enough that the difference matters."""
NAMED = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}|\d{1,20}(\.\d{1,20})?\s?[KMBTkmbt]|config:[A-Za-z0-9_-]{1,8192}")
"""What a visitor may name besides the catalogue: a Hub id, a count, or a config that the link itself carries."""
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
COLOURS = {
    "body_background_fill": ("#FBFBFA", "#101215"),
    "body_text_color": ("#1A1D21", "#ECEEF1"),
    "body_text_color_subdued": ("#565D66", "#A6ADB7"),
    "block_background_fill": ("transparent", "transparent"),
    "block_info_text_color": ("#565D66", "#A6ADB7"),
    "block_label_text_color": ("#1A1D21", "#ECEEF1"),
    "block_title_text_color": ("#1A1D21", "#ECEEF1"),
    "border_color_primary": ("#D9DCE0", "#3A3F47"),
    "input_background_fill": ("#FFFFFF", "#16181C"),
    "input_border_color": ("#B9BEC5", "#555C66"),
    "button_primary_background_fill": ("#B34E00", "#FF8F4A"),
    "button_primary_background_fill_hover": ("#8F3E00", "#FFA56E"),
    "button_primary_text_color": ("#FFFFFF", "#16181C"),
    "button_primary_border_color": ("transparent", "transparent"),
    "checkbox_background_color_selected": ("#0072B2", "#0072B2"),
    "checkbox_border_color_selected": ("#0072B2", "#0072B2"),
    "button_secondary_background_fill": ("#FFFFFF", "#1D2025"),
    "button_secondary_border_color": ("#B9BEC5", "#555C66"),
    "slider_color": ("#0072B2", "#56B4E9"),
    "panel_background_fill": ("transparent", "transparent"),
}
"""Of the theme: in light, and in dark."""
PLOT = "const begin = () => window.peftlab ? peftlab.plot(element, props, watch) : setTimeout(begin, 20); begin();"
DRAWER = "element.querySelector('button').onclick = () => element.closest('.controls').classList.toggle('open')"


def script(*names: str) -> str:
    """Files of this folder as a browser gets them: without comments of whole lines and without indentation."""
    lines = "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names).splitlines()
    return "\n".join(line for line in map(str.strip, lines) if line and not line.startswith(("//", "/**", "* ")))


def theme() -> gr.themes.Base:
    light, dark = ({name + end: pair[i] for name, pair in COLOURS.items()} for i, end in enumerate(("", "_dark")))
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.gray,
        text_size=gr.themes.sizes.text_lg,
        radius_size=gr.themes.sizes.radius_sm,
        font=FONT,
        font_mono=MONO,
    ).set(
        **light,
        **dark,
        block_border_width="0px",
        block_shadow="none",
        block_title_text_weight="600",
        input_border_width="1px",
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
    return "" if value is None else value if isinstance(value, (str, bool)) else short(value)


def shown_model(spec: RunSpec) -> dict[str, Any]:
    """What a chooser of models shows. A config of the visitor's own is a choice with its name, while it is chosen."""
    key = spec.model or DEFAULT
    own = [(find(key).name, key)] if key.startswith("config:") else []
    return gr.update(value=key, choices=[*choices_of(MODELS), *own])


def slid(value: float, top: float) -> dict[str, Any]:
    """What a slider shows: one that usually ends at `top` reaches further where the value does."""
    return gr.update(value=value, maximum=max(top, value))


def seen(value: Any) -> dict[str, Any]:
    """What a panel shows that is there only where it has something to show."""
    return gr.update(value=value, visible=value is not None)


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


def stage(settings: Callable[[], None], pictures: Callable[[], None]) -> None:
    """Settings in a column at the left on a desktop, in a drawer at the foot of a phone's screen; and the pictures."""
    with gr.Row(elem_classes="stage"):
        with gr.Column(elem_classes="controls", scale=0, min_width=320):
            handle = '<button type="button" class="handle">Settings</button>'
            gr.HTML(handle, js_on_load=DRAWER, elem_classes="drawer")
            settings()
        with gr.Column(elem_classes="main"):
            pictures()


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


def as_update(value: Any) -> dict[str, Any]:
    """What the page takes as an update of a component."""
    return value if isinstance(value, dict) and "__type__" in value else gr.update(value=value)


def run_alone(*tabs: Any) -> None:
    """`python demos/this_one.py`"""
    from demos.store import blocks

    blocks(*tabs).launch(**launch_options(), server_port=int(sys.argv[1]) if len(sys.argv) > 1 else None)
