"""Methods on the page: the chooser, each method's own settings, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from demos.page import address, choice, controls
from peftlab import RunSpec, resolve
from peftlab.base.models import DEFAULT, find
from peftlab.catalog.presets import PRESETS
from peftlab.methods import METHODS
from peftlab.resolve import METHOD_SETTINGS, with_preset
from peftlab.show.methods import PUBLISHED, method_value
from peftlab.spec import SETTINGS

CHOOSER = """
const box = () => element.querySelector('select');
element.addEventListener('change', () => {
  props.value = {...props.value, method: box().value};  // or the old value, put back by Back, would be no news
  peftlab.heard('TAB.method', box().value);
});
watch('value', () => { if (box()) box().value = props.value.method; });
"""


def method_choice(tab: str, method: str, model: str) -> gr.HTML:
    """The registry by family. A method that does not suit the model is there, disabled; `unsuited` says why."""
    return gr.HTML(
        method_value(method, model),
        html_template=f'<label class="chooser"><span>Method</span><small>{controls.described("method")["info"]}</small>'
        "<select>${value.options}</select></label>",
        js_on_load=CHOOSER.replace("TAB", tab),
    )


SLIDERS = {"rank": (1, 256, 8), "virtual_tokens": (1, 100, 20), "bottleneck": (1, 256, 16), "block_size": (2, 64, 16)}
BY_METHOD = (*SLIDERS, "train_norms", "target_modules")
"""Settings whose controls show the method's own default when the method changes; the others are empty when automatic."""


def method_settings(spec: RunSpec, *names: str) -> dict[str, Any]:
    """A control for each of `names`, settings that only some methods read, shown where `spec`'s method reads it."""
    made: dict[str, Any] = {}
    for name in names:
        if name in SLIDERS:
            control: Any = controls.slider(name, *SLIDERS[name])
        elif name == "train_norms":
            control = gr.Checkbox(False, **controls.described(name))
        elif name == "target_modules":
            control = controls.choice(name, TARGETS, "all-linear", allow_custom_value=True)
        else:
            control = controls.text(name)
        control.visible = name in METHODS[spec.method or "lora"].settings
        made[name] = control
    return made


def method_updates(spec: RunSpec, names: Sequence[str]) -> dict[str, Any]:
    """What the controls `names` show: those that the spec's method reads, and their values."""
    of, countable = resolve(spec), find(spec.model or DEFAULT).config is not None
    uses = METHODS[of.method or ""].settings if countable else ()
    updates = {}
    for name in names:
        value = _blank(None if name in of.unread else getattr(of if name in BY_METHOD else spec, name), name)
        update = controls.slid(value, SLIDERS[name][1]) if name in SLIDERS else gr.update(value=value)
        updates[name] = update | {"visible": name in uses or name not in METHOD_SETTINGS}
    return updates


def _blank(value: Any, name: str) -> Any:
    """What an empty control shows; a slider has no empty state."""
    if name in SLIDERS:
        return SLIDERS[name][2] if value is None else value
    if value is None and name == "target_modules":
        return "all-linear"
    return bool(value) if name == "train_norms" else controls.blank(value)


TARGETS = (
    ("every linear layer", "all-linear"),
    ("query and value", "query,value"),
    ("attention only", "query,key,value,attention output"),
)


def preset_choice(keys: Sequence[str]) -> gr.Dropdown:
    choices = [("none", ""), *((PRESETS[key].name, key) for key in keys)]
    return gr.Dropdown(choices, value="", label="Preset", info=PUBLISHED)


def of_preset(key: str, run: Mapping[str, Any]) -> tuple[RunSpec, str]:
    """The settings of a preset, those of `run` in their place where it has some; and the key, while all are the preset's."""
    about = {name: run[name] for name in KEPT_BY_PRESETS if name in run}
    preset = with_preset(address.public(address.OPENING.to_dict() | about), PRESETS[key])
    spec = address.public(preset.to_dict() | dict(run))
    return spec, key if with_preset(spec, PRESETS[key]) == spec else ""


KEPT_BY_PRESETS = ("model", "task", "seed")
PRESET = {"preset": choice.one_of("preset", "", PRESETS)}
PRESET_CLEARS = {"preset": tuple(name for name in SETTINGS if name not in KEPT_BY_PRESETS)}
