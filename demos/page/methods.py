"""Methods on the page: the chooser, each method's own settings, and what is said of it."""

from collections.abc import Mapping, Sequence

import gradio as gr
from gradio.components import Component

from demos.page import address, choice, controls
from peftlab import RunSpec, resolve
from peftlab.base.models import find
from peftlab.catalog import PRESETS
from peftlab.methods import METHODS
from peftlab.resolve import METHOD_SETTINGS, with_preset
from peftlab.show.methods import method_value
from peftlab.spec import SETTINGS, Resolved

NEVER_EMPTY = {"train_norms": False, "target_modules": "all-linear"}
"""What a switch and the target modules show where the method has none."""
SLIDERS = {"rank": (1, 256, 8), "virtual_tokens": (1, 100, 20), "bottleneck": (1, 256, 16), "block_size": (2, 64, 16)}
BY_METHOD = (*SLIDERS, *NEVER_EMPTY)
"""Settings whose controls show the value that the method gives them; the others are empty when automatic."""
TARGETS = (
    ("every linear layer", "all-linear"),
    ("query and value", "query,value"),
    ("attention only", "query,key,value,attention output"),
)
KEPT_BY_PRESETS = ("model", "task", "seed")
PRESET = {"preset": choice.one_of("preset", "", PRESETS)}
PRESET_CLEARS = {"preset": tuple(name for name in SETTINGS if name not in KEPT_BY_PRESETS)}
CHOOSER = """
const box = () => element.querySelector('select');
element.addEventListener('change', () => {
  // Without this, an answer that puts the old method back, as Back does, would be no change, and would not be shown.
  props.value = {...props.value, method: box().value};
  peftlab.heard('TAB.method', box().value);
});
watch('value', () => { if (box()) box().value = props.value.method; });
"""


def method_choice(tab: str, model: str) -> gr.HTML:
    """The registry by family. A method that does not suit the model stands there disabled; `unsuited` says why."""
    return gr.HTML(
        method_value(address.METHOD, model),
        html_template=f'<label class="chooser"><span>Method</span><small>{controls.described("method")["info"]}</small>'
        "<select>${value.options}</select></label>",
        js_on_load=CHOOSER.replace("TAB", tab),
    )


def method_settings(names: Sequence[str]) -> dict[str, Component]:
    """A control for each of `names`, settings that only some methods read, visible where the page's first method reads it."""
    made: dict[str, Component] = {}
    for name in names:
        if name in SLIDERS:
            made[name] = gr.Slider(*SLIDERS[name], step=1, **controls.described(name))
        elif name == "target_modules":
            made[name] = controls.choice(name, TARGETS, "all-linear", own=True)
        else:
            made[name] = controls.setting(name)
        made[name].visible = name in METHODS[address.METHOD].settings
    return made


def method_updates(spec: RunSpec, names: Sequence[str], run: Resolved | None = None) -> dict[str, controls.Update]:
    """What the controls `names` show: the values of those that the spec's method reads; the others are not visible.

    `run` is the spec resolved, where the caller has it.
    """
    run = run or resolve(spec)
    uses = METHODS[run.method].settings if find(run.model).config else ()
    updates = {}
    for name in names:
        value = None if name in run.unread else getattr(run if name in BY_METHOD else spec, name)
        if name in SLIDERS:
            update = controls.slid(SLIDERS[name][2] if value is None else value, SLIDERS[name][1])
        else:
            update = gr.update(value=controls.blank(NEVER_EMPTY.get(name) if value is None else value))
        updates[name] = update | {"visible": name in uses or name not in METHOD_SETTINGS}
    return updates


def of_preset(key: str, run: Mapping[str, str]) -> tuple[RunSpec, str]:
    """The settings of a preset, with those of `run` in their place; and the key, or "" once one is not the preset's."""
    about = {name: run[name] for name in KEPT_BY_PRESETS if name in run}
    preset = with_preset(address.public(address.OPENING.to_dict() | about), PRESETS[key])
    spec = address.public(preset.to_dict() | dict(run))
    return spec, key if with_preset(spec, PRESETS[key]) == spec else ""
