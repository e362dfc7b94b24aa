"""A method in words: in a chooser, on a card, and in full; and what a preset says."""

from __future__ import annotations

from functools import lru_cache
from html import escape

from ..base.models import DEFAULT
from ..catalog import FAMILIES, PAPERS, PRESETS
from ..count import why_not
from ..methods import METHODS
from .method_figures import data_path

PUBLISHED = "Published settings, with their source"


def method_value(method: str | None, model: str | None) -> dict[str, str]:
    """What the chooser holds: the chosen method, and the options as HTML."""
    method = method or "lora"
    chosen = f'value="{method}"'
    return {"method": method, "options": _options(model or DEFAULT).replace(chosen, f"{chosen} selected", 1)}


@lru_cache(maxsize=64)
def _options(model: str) -> str:
    """The chooser's options for a model, by family; those that do not suit it cannot be chosen."""

    def option(key: str) -> str:
        off, said = (" disabled", " (not for this model)") if why_not(key, model) else ("", "")
        return f'<option value="{key}"{off}>{escape(METHODS[key].name)}{said}</option>'

    return "".join(
        f'<optgroup label="{family.capitalize()}">'
        f"{''.join(option(key) for key, entry in METHODS.items() if entry.about.family == family)}</optgroup>"
        for family in FAMILIES
    )


@lru_cache(maxsize=64)
def unsuited(model: str) -> str:
    """Which methods are not for a model, and why, folded; empty where every one is."""
    reasons = "".join(f"<p>{escape(reason)}.</p>" for key in METHODS if (reason := why_not(key, model)))
    return f"<details><summary>Methods not for this model</summary>{reasons}</details>" if reasons else ""


def method_card(key: str, model: str) -> str:
    """What a method trains, and why some are not offered."""
    return escape(METHODS[key].about.trains) + unsuited(model)


def method_panel(key: str) -> str:
    """A method in full: the path of the data, why it should work, when to use it, when not, and where it comes from."""
    about = METHODS[key].about
    family = about.family + (", reparameterized" if about.reparameterized else "")
    sources = "; ".join(paper_link(paper) for paper in about.papers)
    mistakes = "".join(f"<li>{escape(m)}</li>" for m in about.mistakes)
    rows = {
        "Why it should work": about.hypothesis,
        "When": about.when,
        "When not": about.when_not,
        "In use": about.inference,
        "Merging": about.merging,
    }
    words = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in rows.items())
    return (
        f'<div class="method"><h3>{escape(about.name)} <small>{family}</small></h3>'
        f"{data_path(METHODS[key].drawing, about.name)}"
        f'<dl>{words}<dt>Common mistakes</dt><dd><ul>{mistakes}</ul></dd></dl><p class="note">{sources}</p></div>'
    )


def paper_link(key: str) -> str:
    """A paper's citation, with its link."""
    return f'<a href="{PAPERS[key].url}">{escape(PAPERS[key].citation)}</a>'


def preset_says(key: str) -> str:
    """What a preset sets and who published it."""
    return f"{PRESETS[key].says} {PRESETS[key].source}." if key else PUBLISHED
