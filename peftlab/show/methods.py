"""A method in a chooser, on a card, and in full, with the path of the data as SVG in the page's colours."""

from functools import lru_cache
from html import escape

from ..base.models import DEFAULT
from ..catalog import FAMILIES, PAPERS, PRESETS
from ..count import why_not
from ..methods import METHODS, Drawing

PUBLISHED = "Published settings, with their source"
BOX, GAP, ROW = 36, 34, 62
"""Pixels: the height of a box, the least room between two boxes, and the way from the main line down to the branch."""
MAIN = 4 + BOX / 2
BRANCH = MAIN + ROW
"""How far below the top each line runs, in pixels."""


def method_value(method: str | None, model: str | None) -> dict[str, str]:
    """What the chooser holds: the chosen method, and the options as HTML."""
    method = method or "lora"
    chosen = f'value="{method}"'
    return {"method": method, "options": _options(model or DEFAULT).replace(chosen, f"{chosen} selected", 1)}


@lru_cache(maxsize=64)
def _options(model: str) -> str:
    """The chooser's options for a model, by family; those that do not suit it cannot be chosen."""

    why = _why_not(model)

    def option(key: str) -> str:
        off, said = (" disabled", " (not for this model)") if why[key] else ("", "")
        return f'<option value="{key}"{off}>{escape(METHODS[key].name)}{said}</option>'

    return "".join(
        f'<optgroup label="{family.capitalize()}">'
        f"{''.join(option(key) for key, entry in METHODS.items() if entry.about.family == family)}</optgroup>"
        for family in FAMILIES
    )


@lru_cache(maxsize=64)
def _why_not(model: str) -> dict[str, str]:
    return {key: why_not(key, model) for key in METHODS}


@lru_cache(maxsize=64)
def unsuited(model: str) -> str:
    """Which methods are not for a model, and why, folded; empty where every one is."""
    reasons = "".join(f"<p>{escape(reason)}.</p>" for reason in _why_not(model).values() if reason)
    return f"<details><summary>Methods not for this model</summary>{reasons}</details>" if reasons else ""


def method_card(key: str, model: str, left: str = "") -> str:
    """What a method trains, the paragraph about what it leaves `left`, and why some methods are not offered."""
    return escape(METHODS[key].about.trains) + left + unsuited(model)


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


def data_path(drawing: Drawing, name: str) -> str:
    """How the data flows through one adapted place, from x to h; what is trained stands out. `name` is read aloud."""
    widths = [_width(text) for text in drawing.main]
    first, last = drawing.leaves or 0, len(widths) if drawing.joins is None else drawing.joins
    needed = sum(map(_width, drawing.branch)) + GAP * (len(drawing.branch) + 1)
    taken = sum(widths[first:last]) + GAP * (last - first)
    spread = max(0, needed - taken) / (last - first) if drawing.branch else 0  # so that the branch has room below
    x, gaps, shapes = 26.0, [], []
    for i, text in enumerate(drawing.main):
        extra = spread if first <= i < last else 0
        gaps.append(x + GAP / 2)
        shapes.append(_box(text, x + GAP + extra / 2, MAIN))
        x += GAP + extra + widths[i]
    gaps.append(x + GAP / 2)
    end, low = x + GAP + 22, MAIN
    path = f"M22 {MAIN}H{end - 20}"
    if drawing.joins is not None:
        start, join, low = 0.0 if drawing.leaves is None else gaps[drawing.leaves], gaps[drawing.joins], BRANCH
        begin = f"M{GAP} {BRANCH}" if drawing.leaves is None else f"M{start} {MAIN}V{BRANCH}"
        path += f" {begin}H{join}V{MAIN}"
        for text in drawing.branch:
            shapes.append(_box(text, start + GAP, BRANCH))
            start += GAP + _width(text)
        if drawing.how == "+":
            shapes.append(f'<circle cx="{join}" cy="{MAIN}" r="11"/><text x="{join}" y="{MAIN + 6}">+</text>')
        else:
            shapes.append(f'<text class="how-joined" x="{join + 10}" y="{MAIN + 34}">{escape(drawing.how)}</text>')
    height = low + BOX / 2 + 4
    flow, beside = (
        " → ".join(line).replace("*", "trained ").replace("~", "") for line in (drawing.main, drawing.branch)
    )
    said = f"{name}: {flow}" + (f"; beside it {beside}" if beside else "")
    return (
        f'<div class="wide"><svg class="data-path" role="img" aria-label="{escape(said)}" width="{end:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {end:.0f} {height:.0f}"><path d="{path}"/>'
        f'<text x="11" y="{MAIN + 6}">x</text><text x="{end - 9}" y="{MAIN + 6}">h</text>{"".join(shapes)}</svg></div>'
    )


def _width(text: str) -> float:
    return 9 * len(text.lstrip("*~")) + 22


def _box(text: str, x: float, middle: float) -> str:
    meaning, width = {"*": "trained", "~": "operation"}.get(text[0], "frozen"), _width(text)
    return (
        f'<rect class="{meaning}" x="{x:.0f}" y="{middle - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}" rx="3"/>'
        f'<text x="{x + width / 2:.0f}" y="{middle + 6:.0f}">{escape(text.lstrip("*~"))}</text>'
    )
