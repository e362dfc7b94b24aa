"""What the tabs are built of: controls with the settings' own words, notes, charts, drawers."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Protocol, TypeAlias, TypedDict, cast

import gradio as gr
from gradio.components import Component

from peftlab import RunSpec
from peftlab.base.models import DEFAULT, MODELS, find
from peftlab.show.figures import Chart
from peftlab.show.marks import replacing
from peftlab.show.settings import label, short
from peftlab.spec import SETTINGS

PLOT = "const begin = () => window.peftlab ? peftlab.plot(element, props, watch) : setTimeout(begin, 20); begin();"
Update: TypeAlias = dict[str, Any]  # an update of a component, as `gr.update` makes it


class Named(Protocol):
    """An entry of a registry, as a chooser shows it."""

    @property
    def name(self) -> str: ...


class Described(TypedDict):
    """What stands above a control: the setting's name and its meaning."""

    label: str
    info: str


def plot(value: dict[str, Chart] | None, label: str, title: str = "", height: int = 300) -> gr.HTML:
    """A plotly figure made by `figures.themed`; `label` is read to those who cannot see it.

    Without a value, the `title` and the `height` of those to come keep their room, so that nothing moves once they are there.
    """
    layout = cast("dict[str, Any]", value["light"]["layout"]) if value else {}
    height, title = layout.get("height", height), layout.get("title", {}).get("text", title)
    return gr.HTML(
        value,
        html_template=f"<h3>{escape(title)}</h3>"
        f'<div class="plot" role="img" aria-label="{escape(label)}" style="min-height:{height}px"></div>',
        js_on_load=PLOT,
        elem_classes="figure",
    )


def sentence() -> gr.HTML:
    return gr.HTML("", html_template='<h2 class="sentence" aria-live="polite">${value}</h2>', js_on_load=None)


def note(text: str = "") -> gr.HTML:
    return gr.HTML(text, html_template='<div class="note">${value}</div>', js_on_load=None)


def problem() -> gr.HTML:
    """Where a refusal appears that no control has a place for; it goes once it is cured."""
    return gr.HTML("", html_template='<div class="problem" role="alert">${value}</div>', js_on_load=None)


def blank(value: object) -> str | bool:
    """What a control shows of a setting: a switch its state, anything else its text, which is empty for automatic."""
    return "" if value is None else value if isinstance(value, (str, bool)) else short(value)


def shown_model(spec: RunSpec) -> Update:
    """What a chooser of models shows. A config of the visitor's own is a choice with its name, while it is chosen."""
    key = spec.model or DEFAULT
    own = [(find(key).name, key)] if key.startswith("config:") else []
    return gr.update(value=key, choices=[*choices_of(MODELS), *own])


def slid(value: float, top: float) -> Update:
    """What a slider shows: one that usually ends at `top` reaches further where the value does."""
    return gr.update(value=value, maximum=max(top, value))


def seen(value: object) -> Update:
    """What a panel shows that is visible only where it has something to show."""
    return gr.update(value=value, visible=value is not None)


def lessons(runs: Mapping[str, Mapping[str, str]], kind: str = "lessons", keeping: Sequence[str] = ()) -> gr.HTML:
    """A button for each run, by name. store.js then replaces the run's settings, but for those in `keeping`."""
    buttons = "".join(replacing(name, run, keeping) for name, run in runs.items())
    return gr.HTML(f'<div class="{kind}">{buttons}</div>', js_on_load=None)


def reset(*keeping: str) -> gr.HTML:
    """A button that makes every setting of the run automatic, but for those in `keeping`."""
    return lessons({"Reset to automatic": {}}, "reset", keeping)


def described(name: str) -> Described:
    about = SETTINGS[name]
    return {"label": label(name), "info": about.meaning[0].upper() + about.meaning[1:]}


def choice(name: str, choices: Sequence[tuple[str, str]], value: str | None = None, own: bool = False) -> gr.Dropdown:
    """A dropdown of `choices`, pairs of a name and a value; where `own`, others may be typed in."""
    return gr.Dropdown(choices, value=value, allow_custom_value=own, **described(name))


def setting(name: str) -> Component:
    """A switch, a dropdown of the setting's choices, or a box, empty for automatic: a hidden gr.Number would send 0."""
    about = SETTINGS[name]
    if about.type is bool:
        return gr.Checkbox(False, **described(name))
    if about.choices:
        return gr.Dropdown([(f"automatic: {about.automatic}", ""), *about.choices], value="", **described(name))
    return gr.Textbox(placeholder=about.automatic, max_lines=1, **described(name))


def model_choice(value: str | None) -> gr.Dropdown:
    """Any model that can be counted; what `address.public` lets through may be typed in."""
    made = choice("model", choices_of(MODELS), value, own=True)
    made.info = "From the catalogue, a Hub id, or a bare count such as 100B"
    return made


def choices_of(registry: Mapping[str, Named]) -> list[tuple[str, str]]:
    return [(entry.name, key) for key, entry in registry.items()]


def as_update(value: object) -> Update:
    """What the page takes as an update of a component."""
    return value if isinstance(value, dict) and "__type__" in value else gr.update(value=value)
