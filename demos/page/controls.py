"""What the tabs are built of: controls with the settings' own words, notes, charts, drawers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from peftlab import RunSpec
from peftlab.base.models import DEFAULT, MODELS, find
from peftlab.show.settings import label, short
from peftlab.spec import SETTINGS

PLOT = "const begin = () => window.peftlab ? peftlab.plot(element, props, watch) : setTimeout(begin, 20); begin();"
DRAWER = "element.querySelector('button').onclick = () => element.closest('.controls').classList.toggle('open')"


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


def as_update(value: Any) -> dict[str, Any]:
    """What the page takes as an update of a component."""
    return value if isinstance(value, dict) and "__type__" in value else gr.update(value=value)
