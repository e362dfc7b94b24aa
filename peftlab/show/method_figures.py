"""The path of the data through a method, as SVG in the page's colours."""

from __future__ import annotations

from html import escape

from ..methods import Drawing

BOX, GAP, ROW = 36, 34, 62
"""Pixels: the height of a box, the least room between two boxes, and the way from the main line down to the branch."""
MAIN = 4 + BOX / 2
BRANCH = MAIN + ROW
"""How far below the top each line runs, in pixels."""


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
        start = gaps[drawing.leaves] if drawing.leaves is not None else None
        path += " " + _turns(start, gaps[drawing.joins])
        shapes += _beside(drawing, start or 0.0, gaps[drawing.joins])
        low = BRANCH
    height = low + BOX / 2 + 4
    flow, beside = (" → ".join(_spoken(text) for text in line) for line in (drawing.main, drawing.branch))
    said = f"{name}: {flow}" + (f"; beside it {beside}" if beside else "")
    return (
        f'<div class="wide"><svg class="data-path" role="img" aria-label="{escape(said)}" width="{end:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {end:.0f} {height:.0f}"><path d="{path}"/>'
        f'<text x="11" y="{MAIN + 6}">x</text><text x="{end - 9}" y="{MAIN + 6}">h</text>{"".join(shapes)}</svg></div>'
    )


def _turns(start: float | None, end: float) -> str:
    """The branch's line: down from the main line at `start`, or from nothing where that is None, and up to it at `end`."""
    begin = f"M{GAP} {BRANCH}" if start is None else f"M{start} {MAIN}V{BRANCH}"
    return f"{begin}H{end}V{MAIN}"


def _beside(drawing: Drawing, x: float, end: float) -> list[str]:
    """The branch's boxes from `x` on, and the sign where it joins the main line, at `end`."""
    shapes = []
    for text in drawing.branch:
        shapes.append(_box(text, x + GAP, BRANCH))
        x += GAP + _width(text)
    if drawing.how == "+":
        return [*shapes, f'<circle cx="{end}" cy="{MAIN}" r="11"/><text x="{end}" y="{MAIN + 6}">+</text>']
    return [*shapes, f'<text class="how-joined" x="{end + 10}" y="{MAIN + 34}">{escape(drawing.how)}</text>']


def _width(text: str) -> float:
    return 9 * len(text.lstrip("*~")) + 22


def _spoken(text: str) -> str:
    return f"trained {text[1:]}" if text[0] == "*" else text.lstrip("~")


def _box(text: str, x: float, middle: float) -> str:
    meaning, width = {"*": "trained", "~": "operation"}.get(text[0], "frozen"), _width(text)
    return (
        f'<rect class="{meaning}" x="{x:.0f}" y="{middle - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}" rx="3"/>'
        f'<text x="{x + width / 2:.0f}" y="{middle + 6:.0f}">{escape(text.lstrip("*~"))}</text>'
    )
