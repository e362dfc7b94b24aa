"""Methods on the page: the chooser, each method's own settings, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import Any

import gradio as gr

from demos import page
from peftlab import RunSpec, figures, resolve
from peftlab.catalog.methods import FAMILIES
from peftlab.catalog.models import DEFAULT, find
from peftlab.catalog.papers import PAPERS
from peftlab.catalog.presets import PRESETS
from peftlab.count import why_not
from peftlab.methods import METHODS
from peftlab.resolve import METHOD_SETTINGS

CHOOSER = """
const box = () => element.querySelector('select');
const choose = (method) => { props.value = {...props.value, method}; trigger('input'); };
element.addEventListener('change', (e) => choose(e.target.value));
watch('value', () => { if (box() && props.value) box().value = props.value.method; });
if (box().value !== props.value.method) choose(box().value);
"""
"""The last line: somebody may have chosen before the page was listening."""


def method_choice(method: str, model: str) -> gr.HTML:
    """The registry by family. A method that does not suit the model is there, disabled; `not_here` says why."""
    return gr.HTML(
        method_value(method, model),
        html_template=f'<label class="chooser"><span>Method</span><small>{page.described("method")["info"]}</small>'
        "<select>${value.options}</select></label>",
        js_on_load=CHOOSER,
    )


def method_value(method: str | None, model: str | None) -> dict[str, str]:
    """What the chooser holds. `edit` reads the method from it."""
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


def method_settings(spec: RunSpec, *names: str) -> list[Any]:
    """A control for each of `names`, settings that only some methods read, shown where `spec`'s method reads it."""
    made = []
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
    return page.public({n: v for n, v in wanted.items() if n not in unread}), moved
