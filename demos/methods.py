"""Methods on the page: the chooser, each method's own settings, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import Any

import gradio as gr

from demos import choice, page
from demos.tab import QUIET, Asked, Tab
from peftlab import RunSpec, figures, resolve
from peftlab.catalog.methods import FAMILIES
from peftlab.catalog.models import DEFAULT, find
from peftlab.catalog.papers import PAPERS
from peftlab.catalog.presets import PRESETS
from peftlab.count import why_not
from peftlab.methods import METHODS
from peftlab.resolve import METHOD_SETTINGS, with_preset

CHOOSER = """
const box = () => element.querySelector('select');
element.addEventListener('change', () => {
  props.value = {...props.value, method: box().value};  // or the old value, put back by Back, would be no news
  peftlab.heard('TAB.method', box().value);
});
watch('value', () => { if (box()) box().value = props.value.method; });
"""


def method_choice(tab: str, method: str, model: str) -> gr.HTML:
    """The registry by family. A method that does not suit the model is there, disabled; `not_here` says why."""
    return gr.HTML(
        method_value(method, model),
        html_template=f'<label class="chooser"><span>Method</span><small>{page.described("method")["info"]}</small>'
        "<select>${value.options}</select></label>",
        js_on_load=CHOOSER.replace("TAB", tab),
    )


def method_value(method: str | None, model: str | None) -> dict[str, str]:
    """What the chooser holds."""
    chosen = f'value="{method or "lora"}"'
    return {
        "method": method or "lora",
        "options": method_options(model or DEFAULT).replace(chosen, chosen + " selected", 1),
    }


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


def method_settings(spec: RunSpec, *names: str) -> dict[str, Any]:
    """A control for each of `names`, settings that only some methods read, shown where `spec`'s method reads it."""
    made: dict[str, Any] = {}
    for name in names:
        if name in SLIDERS:
            control: Any = page.slider(name, *SLIDERS[name])
        elif name == "train_norms":
            control = gr.Checkbox(False, **page.described(name))
        elif name == "target_modules":
            control = page.choice(name, TARGETS, "all-linear", allow_custom_value=True)
        else:
            control = page.text(name)
        control.visible = name in METHODS[spec.method or "lora"].settings
        made[name] = control
    return made


def method_updates(spec: RunSpec, names: Sequence[str]) -> dict[str, Any]:
    """What the controls `names` show: those that the spec's method reads, and their values."""
    of, countable = resolve(spec), find(spec.model or DEFAULT).config is not None
    uses = METHODS[of.method or ""].settings if countable else ()
    updates = {}
    for name in names:
        value = _blank(getattr(of if name in BY_METHOD else spec, name), name)
        update = page.slid(value, SLIDERS[name][1]) if name in SLIDERS else gr.update(value=value)
        updates[name] = update | {"visible": name in uses or name not in METHOD_SETTINGS}
    return updates


def _blank(value: Any, name: str) -> Any:
    """What an empty control shows; a slider has no empty state."""
    if name in SLIDERS:
        return SLIDERS[name][2] if value is None else value
    if value is None and name == "target_modules":
        return "all-linear"
    return bool(value) if name == "train_norms" else page.blank(value)


TARGETS = (
    ("every linear layer", "all-linear"),
    ("query and value", "query,value"),
    ("attention only", "query,key,value,attention output"),
)


def preset_choice(keys: Sequence[str]) -> gr.Dropdown:
    choices = [("none", ""), *((PRESETS[key].name, key) for key in keys)]
    return gr.Dropdown(choices, value="", label="Preset", info=PUBLISHED)


def presets(tab: Tab, keys: Sequence[str]) -> None:
    """A chooser of published settings, which it writes. The tab has PRESET among its choices."""
    chooser, run = preset_choice(keys), gr.Textbox(visible=False)
    tab.panel("preset", chooser)

    def chosen(key: str, question: dict[str, Any]) -> str:
        spec = tab.read(question["state"]).spec
        return json.dumps(page.link(with_preset(spec, PRESETS[key]) if key else spec, preset=key))

    write = "(run) => { if (run) peftlab.replace(JSON.parse(run)); return ''; }"
    question = "(key) => [key, peftlab.question()]"
    chooser.input(chosen, [chooser, tab.question], run, js=question, **QUIET).then(None, run, run, js=write, **QUIET)


def preset_shown(asked: Asked) -> dict[str, Any]:
    """The preset that was chosen, while the settings are still its own."""
    key = asked["preset"]
    holds = key and with_preset(asked.spec, PRESETS[key]) == asked.spec
    return gr.update(value=key if holds else "", info=preset_says(key if holds else ""))


PRESET = {"preset": choice.one_of("preset", "", PRESETS)}
PUBLISHED = "Published settings, with their source"


def preset_says(key: str) -> str:
    """What a preset sets and who published it."""
    return f"{PRESETS[key].says} {PRESETS[key].source}." if key else PUBLISHED
