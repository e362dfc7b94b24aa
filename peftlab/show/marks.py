"""Small pieces of HTML that every subject uses: bold words, where a number comes from, words explained, tables, verdicts."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

MUCH = 0.3
"""Nats a token by which a model that forgot a lot reads ordinary prose worse."""


def bold(text: str, meaning: str = "") -> str:
    """Text that is not markup, in bold; a `meaning` of the palette, such as `trained`, gives it that colour."""
    return f'<b class="{meaning}">{escape(text)}</b>' if meaning else f"<b>{escape(text)}</b>"


def small(text: str) -> str:
    """A second line in small letters, of text that is not markup."""
    return f"<br><small>{escape(text)}</small>"


def sentence(text: str) -> str:
    """Words with a capital at the beginning and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def how(kind: str, tip: str) -> str:
    """The small mark that answers 'how do you know?': exact, estimated or measured, and `tip` says more."""
    return _tipped("how", kind, escape(tip))


def _tipped(look: str, word: str, tip: str) -> str:
    """A word with a `tip` on hover, on focus or when it is tapped; both are markup, and are read aloud."""
    spoken = f'tabindex="0" role="note" aria-label="{word}: {tip}"'
    return f'<span class="{look}" {spoken}>{word}<span class="tip">{tip}</span></span>'


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
"""Words of the field that stand on the page, each with what it means."""


def term(word: str, tip: str = "") -> str:
    """A word that says what it means on hover, on focus or when it is tapped: its `tip`, by default that of TERMS."""
    return _tipped("how term", word, escape(tip or TERMS[word]))


def explained(text: str) -> str:
    """The HTML `text`, in which the first use of each word of TERMS says what it means."""
    for word in TERMS:
        text = re.sub(rf"(?<![\w>-]){word}(?![\w-])(?![^<]*>)", lambda found: term(found[0]), text, count=1)
    return text


def row(cells: Iterable[str], tag: str = "td") -> str:
    """A row of a table. Cells are markup."""
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def heading(text: str) -> str:
    """A row of a table of four columns that names the source of the rows below it."""
    return f'<tr><th colspan="4" class="source">{escape(text)}</th></tr>'


def table(heads: Sequence[str], rows: Iterable[Iterable[str] | str], kind: str = "") -> str:
    """A table, which scrolls by itself where it is too wide. Heads and cells are markup; a row that is a string is a `<tr>`."""
    head = row(heads, "th") if heads else ""
    body = "".join(cells if isinstance(cells, str) else row(cells) for cells in rows)
    return f'<div class="wide"><table class="data{kind and " " + kind}">{head}{body}</table></div>'


def graded(score: float | None, wrong: str = "wrong") -> str:
    """`right` for an answer with a score, else the word for a `wrong` one, each in its colour."""
    return '<span class="good">right</span>' if score else f'<span class="bad">{wrong}</span>'


def remarks(*said: str) -> str:
    """A line of short remarks, which are markup."""
    return f'<div class="status">{"".join(f"<span>{text}</span>" for text in said)}</div>'


def progress(label: str, share: float) -> str:
    """A bar for a share between 0 and 1."""
    return (
        f'<div class="progress" role="progressbar" aria-label="{label}" aria-valuenow="{100 * share:.0f}">'
        f'<div style="width:{100 * share:.1f}%"></div></div>'
    )


def replacing(label: str, settings: Mapping[str, object], keeping: Sequence[str] = ()) -> str:
    """A button that writes these settings. The page's store makes all others automatic, but for those in `keeping`."""
    return (
        f'<button type="button" class="small-button" data-replace="{escape(json.dumps(dict(settings)))}" '
        f'data-keeping="{escape(json.dumps(keeping))}">{escape(label)}</button>'
    )


def forgot(change: float) -> str:
    """How much a model forgot that reads ordinary prose worse by `change` nats a token, as an object of "it forgot"."""
    # 0.05 is a 5% and 0.3 a 35% rise of perplexity
    return "nothing" if change <= 0 else "almost nothing" if change < 0.05 else "a little" if change < MUCH else "a lot"


def libraries(versions: Mapping[str, str]) -> str:
    """The libraries that a recording was made with: torch 2.10, peft 0.19."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
