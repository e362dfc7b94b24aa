"""Methods on the page: the chooser, each method's own settings, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from demos.page import address, choice, controls
from peftlab import RunSpec, resolve
from peftlab.base.models import find
from peftlab.catalog import PRESETS
from peftlab.methods import METHODS
from peftlab.resolve import METHOD_SETTINGS, with_preset
from peftlab.show.methods import PUBLISHED, method_value
from peftlab.spec import SETTINGS

CHOOSER = """
const box = () => element.querySelector('select');
element.addEventListener('change', () => {
  // Without this, an answer that puts the old method back, as Back does, would be no change, and would not be shown.
  props.value = {...props.value, method: box().value};
  peftlab.heard('TAB.method', box().value);
});
watch('value', () => { if (box()) box().value = props.value.method; });
"""


def method_choice(tab: str, method: str, model: str) -> gr.HTML:
    """The registry by family. A method that does not suit the model stands there disabled; `unsuited` says why."""
    return gr.HTML(
        method_value(method, model),
        html_template=f'<label class="chooser"><span>Method</span><small>{controls.described("method")["info"]}</small>'
        "<select>${value.options}</select></label>",
        js_on_load=CHOOSER.replace("TAB", tab),
    )


SLIDERS = {"rank": (1, 256, 8), "virtual_tokens": (1, 100, 20), "bottleneck": (1, 256, 16), "block_size": (2, 64, 16)}
BY_METHOD = (*SLIDERS, "train_norms", "target_modules")
"""Settings whose controls show the value that the method gives them; the others are empty when automatic."""
TARGETS = (
    ("every linear layer", "all-linear"),
    ("query and value", "query,value"),
    ("attention only", "query,key,value,attention output"),
)


def method_settings(method: str, names: Sequence[str]) -> dict[str, Component]:
    """A control for each of `names`, settings that only some methods read, visible where `method` reads it."""
    made = {name: _control(name) for name in names}
    for name, control in made.items():
        control.visible = name in METHODS[method].settings
    return made


def _control(name: str) -> Component:
    if name in SLIDERS:
        return controls.slider(name, *SLIDERS[name])
    if name == "train_norms":
        return gr.Checkbox(False, **controls.described(name))
    if name == "target_modules":
        return controls.choice(name, TARGETS, "all-linear", own=True)
    return controls.text(name)


def method_updates(spec: RunSpec, names: Sequence[str]) -> dict[str, controls.Update]:
    """What the controls `names` show: the values of those that the spec's method reads; the others are not visible."""
    run = resolve(spec)
    uses = METHODS[run.method].settings if find(run.model).config else ()
    updates = {}
    for name in names:
        value = _blank(None if name in run.unread else getattr(run if name in BY_METHOD else spec, name), name)
        update = controls.slid(value, SLIDERS[name][1]) if name in SLIDERS else gr.update(value=value)
        updates[name] = update | {"visible": name in uses or name not in METHOD_SETTINGS}
    return updates


def _blank(value: Any, name: str) -> Any:
    """What a control shows of `value`. A slider, a switch and the target modules have no empty state."""
    if value is None and name in BY_METHOD:
        return SLIDERS[name][2] if name in SLIDERS else "all-linear" if name == "target_modules" else False
    return value if name in SLIDERS else controls.blank(value)


def preset_choice(keys: Sequence[str]) -> gr.Dropdown:
    choices = [("none", ""), *((PRESETS[key].name, key) for key in keys)]
    return gr.Dropdown(choices, value="", label="Preset", info=PUBLISHED)


def of_preset(key: str, run: Mapping[str, str]) -> tuple[RunSpec, str]:
    """The settings of a preset, with those of `run` in their place; and the key, or "" once one is not the preset's."""
    about = {name: run[name] for name in KEPT_BY_PRESETS if name in run}
    preset = with_preset(address.public(address.OPENING.to_dict() | about), PRESETS[key])
    spec = address.public(preset.to_dict() | dict(run))
    return spec, key if with_preset(spec, PRESETS[key]) == spec else ""


KEPT_BY_PRESETS = ("model", "task", "seed")
PRESET = {"preset": choice.one_of("preset", "", PRESETS)}
PRESET_CLEARS = {"preset": tuple(name for name in SETTINGS if name not in KEPT_BY_PRESETS)}
