"""peftlab: assembles the tabs and launches. `python app.py`, or the entry point of a Hugging Face Space."""

from __future__ import annotations

import os

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  a shared GPU must be claimed before anything touches CUDA

from collections.abc import Callable, Mapping
from html import escape
from itertools import chain
from typing import Any

import gradio as gr

from demos import live_finetune, lora_visualizer, memory_calculator, page, side_by_side
from peftlab import RunSpec, SpecError, jobs, weights, words
from peftlab.catalog.models import DEFAULT, MODELS
from peftlab.memory import conventions

TABS = ("memory", "lora", "live", "compare")
preparation = jobs.Preparation(DEFAULT)


def chip() -> str:
    """The state of the base model, in a line."""
    name, p = MODELS[DEFAULT].name, preparation.progress
    if preparation.ready:
        source = weights.source_of(MODELS[DEFAULT])
        tip = f"{source.where}; {source.precision}; sha256 {source.sha256[:16]}" if source else ""
        return f"{escape(name)} is ready {page.how('verified', tip)}"
    if preparation.error:
        return f'<span class="bad">{escape(preparation.error)}</span>'
    amount = f": {words.size(p.done)} of {words.size(p.total)}" if p.total and p.stage == "downloading" else ""
    return f"{escape(name)}: {p.stage} {escape(p.detail)}{amount}"


def watch() -> tuple[Any, Any, Any]:
    """The chip, whether to go on looking, and whether a second try is on offer."""
    settled = preparation.ready or preparation.error is not None
    return chip(), gr.Timer(active=not settled), gr.Button(visible=preparation.error is not None)


def try_again() -> tuple[Any, Any, Any]:
    preparation.begin()
    return watch()


def from_link(params: Mapping[str, str]) -> tuple[RunSpec | None, str, str | None, str]:
    """The spec, convention and tab that a link carries, None where it has none, and what is wrong with it."""
    query = {k: v for k, v in params.items() if not k.startswith("__")}
    tab, convention = query.pop("tab", None), query.pop("convention", page.CONVENTION)
    try:
        conventions.find(convention)
        asked = page.public(page.OPENING.to_dict() | query) if query or convention != page.CONVENTION else None
        return asked, convention, tab if tab in TABS else None, ""
    except SpecError as error:
        return None, page.CONVENTION, None, f"This link cannot be read: {escape(str(error))}"


def to_link(spec: RunSpec, convention: str) -> str:
    """The query of a link to what is on screen; empty for what the page opens with."""
    counted = "" if convention == page.CONVENTION else f"convention={convention}"
    return "&".join(filter(None, ("" if spec == page.OPENING else spec.to_query(), counted)))


def first_as_it_is(view: page.View) -> Callable[..., tuple[Any, ...]]:
    """`view.show`, but for the first look at a tab that nothing has changed.

    A page selects its own tab when it loads, and an answer to that would undo what an early visitor has just chosen.
    """

    def show(visited: bool, spec: RunSpec, *inputs: Any) -> tuple[Any, ...]:
        if not visited and spec == page.OPENING:
            return (True, *page.skipped(view.outputs))
        return (True, *view.show(spec, *inputs))

    return show


LINK = """(query) => {
  const url = new URL(location.href), search = new URLSearchParams(query);
  const tab = document.querySelector('[role=tab][aria-selected=true]')?.textContent?.trim().toLowerCase();
  if (tab && tab !== 'memory') search.set('tab', tab);
  url.searchParams.forEach((value, name) => { if (name.startsWith('__')) search.set(name, value); });
  url.search = search;
  history.replaceState(null, '', url);
}"""
"""The address bar follows the settings and the tab; the reader's theme stays."""


with gr.Blocks(title="peftlab", fill_width=True) as demo:
    gr.HTML(
        "<h1>peftlab</h1><p>Fine-tune a fraction of a model, and check every number.</p>",
        html_template='<header class="brand">${value}</header>',
        js_on_load=None,
    )
    spec = gr.State(page.OPENING)
    query = gr.Textbox("", visible=False)
    mine = gr.BrowserState([], storage_key="peftlab-adapters")
    link_problem = page.problem()
    with gr.Tabs(selected=TABS[0]) as tabs:
        with gr.Tab("Memory", id="memory") as memory_tab:
            memory = memory_calculator.build(spec)
        with gr.Tab("LoRA", id="lora") as lora_tab:
            lora = lora_visualizer.build(spec, mine)
        with gr.Tab("Live", id="live") as live_tab:
            live = live_finetune.build(spec, mine)
        with gr.Tab("Compare", id="compare") as compare_tab:
            compare = side_by_side.build(mine)
    with gr.Row(elem_classes="foot"):
        state = gr.HTML(chip(), html_template='<div class="chip">${value}</div>', js_on_load=None)
        again = gr.Button("Try again", visible=False, size="sm", scale=0)

    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    tick = gr.Timer(1.0)
    tick.tick(watch, None, [state, tick, again], **quiet)
    again.click(try_again, None, [state, tick, again], **quiet)
    views = ((memory_tab, memory), (lora_tab, lora), (live_tab, live))
    for tab, view in views:
        visited = gr.State(False)
        tab.select(page.looking(first_as_it_is(view)), [visited, spec, *view.inputs], [visited, *view.outputs], **quiet)
    compare_tab.select(compare.show, [spec, *compare.inputs], compare.outputs, **quiet)

    def open_link(params: Mapping[str, str], mine: list[str]) -> tuple[Any, ...]:
        """What a link changes; a plain visit changes nothing, so that nothing moves under an early click."""
        asked, convention, tab, problem = from_link(params)
        opening = gr.Tabs(selected=tab) if tab else gr.skip()
        if asked is None:
            return (gr.skip(), opening, problem, *[gr.skip()] * len(every_output))
        shown = (memory.show(asked, convention), lora.show(asked, mine), live.show(asked))
        return (asked, opening, problem, *chain(*shown))

    def load(request: gr.Request, mine: list[str]) -> Any:
        answer = open_link(request.query_params, mine)
        if answer[0] != gr.skip():  # the link has settings
            page.made.again(request.session_hash)
        return answer

    every_output = [output for _, view in views for output in view.outputs]
    opened = demo.load(load, mine, [spec, tabs, link_problem, *every_output], **quiet)
    assert live.resume is not None
    opened.then(live.resume.work, live.resume.state, live.resume.outputs, **quiet)
    convention = memory.inputs[0]
    gr.on([spec.change, convention.change], to_link, [spec, convention], query, **quiet).then(
        None, query, None, js=LINK
    )
    gr.on([t.select for t in (memory_tab, lora_tab, live_tab, compare_tab)], None, query, None, js=LINK)


def main() -> None:
    if os.environ.get("SPACES_ZERO_GPU"):
        weights.load(preparation.spec)  # at module scope, where a shared GPU wants the weights
    demo.queue(default_concurrency_limit=8, max_size=256)
    demo.launch(**page.launch_options(), prevent_thread_lock=True)
    preparation.begin()  # once the page answers: loading a model library would hold it up
    demo.block_thread()


if __name__ == "__main__":
    main()
