"""The LoRA tab's proofs by doing: merging, the dial on the update, and what each way to serve an adapter costs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import gradio as gr

from demos.page import choice, controls
from demos.page.adapter_choice import bundled, chooser, of, offered, task_of
from demos.page.gpu import on_gpu
from demos.page.tab import ONE_AT_A_TIME, QUIET, Asked, Tab, Values, with_result
from peftlab import PeftlabError, units
from peftlab.adapters import Adapter
from peftlab.room import quota
from peftlab.show.comparisons import dialled, merged_said, timed

if TYPE_CHECKING:
    from peftlab.compare import proofs


def merge(adapter: Adapter, prompt: str) -> Iterator[proofs.MergeReport]:
    from peftlab.compare import proofs

    yield proofs.merge_check(adapter, prompt)


def latency(adapter: Adapter, prompt: str) -> Iterator[tuple[float, proofs.LatencyReport | None]]:
    from peftlab.compare import proofs

    yield from with_result(proofs.latency(adapter, prompt))


def dial(adapter: Adapter, prompt: str) -> Iterator[tuple[float, str]]:
    from peftlab.compare import proofs

    yield from proofs.dial(adapter, prompt)


def asks(adapter: Adapter, prompt: str) -> quota.Asks:
    return quota.of_proof(adapter.spec)


MERGE, DIAL, LATENCY = on_gpu(merge, asks), on_gpu(dial, asks), on_gpu(latency, asks)
CHOICES = {"proof_prompt": choice.words("proof_prompt")}
ANOTHER = "(proof_adapter) => { peftlab.keep({proof_adapter}); peftlab.write({proof_prompt: ''}); }"
IDLE = (
    "h = W₀x + (alpha / r)BAx = (W₀ + (alpha / r)BA)x: kept apart or added up, the layer is the same. "
    "Merge and see how exactly; scale the update from nothing to twice itself; measure what each way costs."
)


def build(tab: Tab) -> None:
    adapter = tab.panel("proof_adapter", chooser(list(bundled())[-1]))
    adapter.input(None, adapter, None, js=ANOTHER, **QUIET)
    tab.control("proof_prompt", gr.Textbox(label="Prompt", lines=2, max_lines=5))
    tab.panel("proof_problem", controls.problem())
    with gr.Row(elem_classes="lessons"):
        buttons = {name: tab.panel(name, gr.Button(label, size="sm")) for name, (label, *_) in PROOFS.items()}
    tab.cost()
    tab.panel("proved", gr.HTML(f'<p class="note">{IDLE}</p>'))
    busy, free = ({name: gr.update(interactive=is_free) for name in PROOFS} for is_free in (False, True))
    for name, button in buttons.items():
        tab.press([button.click], partial(prove, name), ["proved"], busy, free, "proof_problem", **ONE_AT_A_TIME)


def draw(asked: Asked) -> Values:
    return {"proof_adapter": lambda: offered(asked, chosen(asked))}


def costs(asked: Asked) -> dict[str, quota.Asks]:
    return {"Each proof": quota.of_proof(of(asked, chosen(asked)).spec)}


def chosen(asked: Asked) -> str:
    """The key of the adapter to prove with: the visitor's choice while it is here, else a bundled one."""
    key = asked.kept.get("proof_adapter")
    try:
        of(asked, key)
        return str(key)
    except PeftlabError:
        return list(bundled())[-1]


def prompt(asked: Asked) -> str:
    """What was written, or the first held-out prompt of the adapter's task."""
    return asked["proof_prompt"] or task_of(of(asked, chosen(asked))).heldout[0].prompt


def merging(asked: Asked) -> Iterator[str]:
    yield from map(merged_said, MERGE(of(asked, chosen(asked)), prompt(asked)))


def turning(asked: Asked) -> Iterator[str]:
    stops: list[tuple[float, str]] = []
    for stop in DIAL(of(asked, chosen(asked)), prompt(asked)):
        stops.append(stop)
        yield dialled(stops)


def timing(asked: Asked) -> Iterator[str]:
    for share, report in LATENCY(of(asked, chosen(asked)), prompt(asked)):
        yield timed(report) if report else f'<p class="note">Timing, {units.score(share)} done.</p>'


READING = "Reading the same text with four models: apart and merged, in fp32 and in bf16."
PROOFS = {
    "merge": ("Merge and compare", READING, merging),
    "dial": ("Turn the dial from 0 to 2", "Answering five times.", turning),
    "latency": ("Time the four ways to serve it", "Loading the four models.", timing),
}
"""Each proof's button, what is said while it begins, and what it shows as it goes on."""


def prove(name: str, asked: Asked) -> Iterator[Values]:
    _, begins, work = PROOFS[name]
    yield {"proved": f'<p class="note">{begins}</p>'}
    try:
        yield from ({"proved": shown} for shown in work(asked))
    except PeftlabError:
        yield {"proved": ""}
        raise
