"""Small pieces of HTML that every subject uses: marks of where a number comes from, words explained, tables, verdicts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any


def how(kind: str, tip: str) -> str:
    """The small mark that answers 'how do you know?': exact, estimated or measured."""
    words = f'aria-label="{kind}: {escape(tip)}"'
    return f'<span class="how" tabindex="0" role="note" {words}>{kind}<span class="tip">{escape(tip)}</span></span>'


TERMS = {
    "amp": "Automatic mixed precision: fp32 weights, 16-bit copies for the matrix products",
    "temporaries": "Buffers that one operation needs while it runs, and then gives back",
    "closed form": "A formula in batch, length and rank, answered at once and a little off",
    "traced step": "One whole training step run without numbers, every tensor counted byte by byte",
    "held-out": "Kept apart: training never sees these, so they score what was learned",
    "CUDA graph": "All of a step's GPU work recorded once, then launched with one call",
    "fused": "Several operations done in one pass over memory, which is sooner done",
    "Greedy": "Always the likeliest token, so the same prompt gives the same answer",
    "nats": "How surprised the model is per token, in natural logarithms; lower is better",
}
"""Words of the trade that stand on the page, each with what it means."""


def term(word: str, shown: str = "") -> str:
    """A word of TERMS that says what it means on hover, on focus or when it is tapped."""
    tip = escape(TERMS[word])
    tag = f'<span class="how term" tabindex="0" role="note" aria-label="{word}: {tip}">'
    return f'{tag}{shown or word}<span class="tip">{tip}</span></span>'


def explained(text: str) -> str:
    """HTML in which the first of each of TERMS, outside tags, says what it means."""
    for word in TERMS:
        text = re.sub(rf"(?<![\w>-]){word}(?![\w-])(?![^<]*>)", lambda found: term(found[0]), text, count=1)
    return text


def row(cells: Iterable[str], tag: str = "td") -> str:
    """Cells are markup."""
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def heading(text: str, columns: int = 4) -> str:
    """A row of a table that stands over the rows of one source."""
    return f'<tr><th colspan="{columns}" class="source">{escape(text)}</th></tr>'


def table(heads: Sequence[str], rows: Iterable[Iterable[str] | str], kind: str = "") -> str:
    """Heads and cells are markup; a row that is a string is a whole row already. A wide one scrolls by itself."""
    head = row(heads, "th") if heads else ""
    body = "".join(cells if isinstance(cells, str) else row(cells) for cells in rows)
    return f'<div class="wide"><table class="data{kind and " " + kind}">{head}{body}</table></div>'


def verdict(good: object, yes: str = "holds", no: str = "differs") -> str:
    """`yes` in the colour of what is good, or `no` in that of what is not."""
    return f'<span class="good">{yes}</span>' if good else f'<span class="bad">{no}</span>'


def remarks(*said: str) -> str:
    """A line of short remarks, which are markup."""
    return f'<div class="status">{"".join(f"<span>{text}</span>" for text in said)}</div>'


def progress(label: str, share: float) -> str:
    """A bar for a share between 0 and 1."""
    return (
        f'<div class="progress" role="progressbar" aria-label="{label}" aria-valuenow="{100 * share:.0f}">'
        f'<div style="width:{100 * share:.1f}%"></div></div>'
    )


def failure(events: Sequence[Mapping[str, Any]]) -> str:
    """Why a run or a race ended early, from its last event; empty where it did not."""
    last = events[-1]
    return f'<div class="problem">{escape(last["message"])}</div>' if last["type"] == "error" else ""


def libraries(versions: Mapping[str, str]) -> str:
    """What a recording was made with: torch 2.10, peft 0.19."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
