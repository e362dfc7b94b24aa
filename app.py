"""peftlab: assembles the tabs and launches. `python app.py`, or the entry point of a Hugging Face Space."""

from __future__ import annotations

import os
import re

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  a shared GPU must be claimed before anything touches CUDA

from collections.abc import Mapping
from html import escape
from itertools import chain
from typing import Any

import gradio as gr

from demos import live_finetune, lora_visualizer, memory_calculator, method_map, method_race, page, side_by_side
from peftlab import RunSpec, SpecError, jobs, weights, words
from peftlab.catalog.models import DEFAULT, MODELS
from peftlab.memory import conventions

TABS = ("memory", "lora", "live", "compare", "methods", "race")
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


def from_link(params: Mapping[str, str]) -> tuple[RunSpec | None, str, str, str | None, str]:
    """The spec, convention, race and tab that a link carries, None where it has none, and what is wrong with it."""
    query = {k: v for k, v in params.items() if not k.startswith("__")}
    tab, convention = query.pop("tab", None), query.pop("convention", page.CONVENTION)
    race = {name: query.pop(name) for name in method_race.CARRIED if name in query}
    try:
        conventions.find(convention)
        asked = page.public(page.OPENING.to_dict() | query) if query or convention != page.CONVENTION else None
        return asked, convention, method_race.Choice(**race).query(), tab if tab in TABS else None, ""
    except SpecError as error:
        return None, page.CONVENTION, "", None, f"This link cannot be read: {escape(str(error))}"


def to_link(spec: RunSpec, convention: str, race: str = "") -> str:
    """The query of a link to what is on screen; empty for what the page opens with."""
    counted = "" if convention == page.CONVENTION else f"convention={convention}"
    return "&".join(filter(None, ("" if spec == page.OPENING else spec.to_query(), counted, race)))


TAB = "document.querySelector('[role=tab][aria-selected=true]')?.textContent?.trim().toLowerCase()"
SCREEN = f"(_, ...rest) => [`${{{TAB}}} ${{Date.now()}}`, ...rest]"
"""Which tab is on screen, and when."""
SEEN = re.compile(r"(\S+) (\d+)")
"""What it gives; a page that is on its way in or out may have no tab to name, which is no question."""
UNREAD = "?"
"""Instead of a query until the link has been read: the page sends it with its address, which must still have it."""
LINK = """(query) => {
  if (query === 'UNREAD') return;
  const url = new URL(location.href), search = new URLSearchParams(query), tab = TAB;
  if (tab && tab !== 'memory') search.set('tab', tab);
  url.searchParams.forEach((value, name) => { if (name.startsWith('__')) search.set(name, value); });
  url.search = search;
  history.replaceState(null, '', url);
}""".replace("UNREAD", UNREAD).replace("TAB", TAB)
"""The address bar follows the settings and the tab; the reader's theme stays."""


with gr.Blocks(title="peftlab", fill_width=True) as demo:
    gr.HTML(
        "<h1>peftlab</h1><p>Fine-tune a fraction of a model, and check every number.</p>",
        html_template='<header class="brand">${value}</header>',
        js_on_load=None,
    )
    spec = gr.State(page.OPENING)
    query, screen, drew = gr.Textbox(UNREAD, visible=False), *(gr.Textbox("", visible=False) for _ in range(2))
    mine = gr.BrowserState([], storage_key="peftlab-adapters")
    running, racing = gr.BrowserState("", storage_key="peftlab-run"), gr.BrowserState("", storage_key="peftlab-race")
    link_problem = page.problem()
    with gr.Tabs(selected=TABS[0]) as tabs:
        with gr.Tab("Memory", id="memory") as memory_tab:
            memory = memory_calculator.build(spec)
        with gr.Tab("LoRA", id="lora") as lora_tab:
            lora = lora_visualizer.build(spec, mine)
        with gr.Tab("Live", id="live") as live_tab:
            live = live_finetune.build(spec, mine, running)
        with gr.Tab("Compare", id="compare") as compare_tab:
            compare = side_by_side.build(mine)
        with gr.Tab("Methods", id="methods") as methods_tab:
            methods = method_map.build(spec)
        with gr.Tab("Race", id="race") as race_tab:
            race = method_race.build(spec, racing)
    with gr.Row(elem_classes="foot"):
        state = gr.HTML(chip(), html_template='<div class="chip">${value}</div>', js_on_load=None)
        again = gr.Button("Try again", visible=False, size="sm", scale=0)

    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    tick = gr.Timer(1.0)
    tick.tick(watch, None, [state, tick, again], **quiet)
    again.click(try_again, None, [state, tick, again], **quiet)
    every_tab = (memory_tab, lora_tab, live_tab, compare_tab, methods_tab, race_tab)
    views = (memory, lora, live, methods, race)
    for tab, event in ((lora_tab, lora.opened), (compare_tab, compare)):
        tab.select(event.work, event.inputs, event.outputs, **quiet)

    def load(request: gr.Request) -> tuple[Any, ...]:
        """What a link changes; a plain visit changes nothing, so that nothing moves under an early click."""
        page.visitor(request).landed = True
        asked, rule, chosen, tab, problem = from_link(request.query_params)
        opening = gr.Tabs(selected=tab) if tab else gr.skip()
        board = race.linked.work(chosen, asked or page.OPENING) if chosen else page.skipped(race.linked.outputs)
        if asked is None:
            skipped = page.skipped(every_output)
            return (gr.skip(), gr.skip(), opening, problem, chosen or gr.skip(), *board, *skipped)
        page.visitor(request).made(asked, TABS)  # before it is drawn: nobody waits for figures of what was there before
        inputs = {memory.tab: (rule,)}
        shown = (view.show(asked, *inputs.get(view.tab, ())) for view in views)
        return (asked, rule, opening, problem, chosen or gr.skip(), *board, *chain(*shown))

    def look(request: gr.Request, screen: str, spec: RunSpec, chosen: str, convention: str, *rest: Any) -> Any:
        """The link to what is on screen, and what the tab on screen does not show yet."""
        if not (seen := SEEN.fullmatch(screen)):
            return page.skipped([query, drew, *every_output])
        tab, moment = seen.groups()
        who = page.visitor(request)
        overtaken = who.looks(float(moment))
        inputs = {memory.tab: (convention, *rest)}
        drawn = [
            who.look(view, overtaken, spec, inputs.get(view.tab, ())) if view.tab == tab else page.skipped(view.outputs)
            for view in views
        ]
        link = to_link(spec, convention, chosen) if who.landed and not overtaken() else gr.skip()
        answer = tuple(chain(*drawn))
        return (link, gr.skip() if answer == page.skipped(answer) else screen, *answer)

    def arrived(request: gr.Request, screen: str) -> None:
        if seen := SEEN.fullmatch(screen):
            page.visitor(request).arrived(seen[1])

    every_output = [output for view in views for output in view.outputs]
    convention, choice = memory.inputs[0], race.linked.inputs[0]
    opened = demo.load(
        load, None, [spec, convention, tabs, link_problem, choice, *race.linked.outputs, *every_output], **quiet
    )
    for view in (live, race):
        opened.then(view.resumed.work, view.resumed.inputs, view.resumed.outputs, **quiet)
    gr.on(
        [spec.change, convention.change, choice.change, *(tab.select for tab in every_tab)],
        look,
        [screen, spec, choice, *memory.inputs],
        [query, drew, *every_output],
        js=SCREEN,
        trigger_mode="multiple",
        **quiet,
    ).then(None, query, None, js=LINK)
    drew.change(arrived, drew, trigger_mode="multiple", **quiet)


def main() -> None:
    if os.environ.get("SPACES_ZERO_GPU"):
        weights.load(preparation.spec)  # at module scope, where a shared GPU wants the weights
    demo.queue(default_concurrency_limit=8, max_size=256)
    try:
        demo.launch(**page.launch_options(), prevent_thread_lock=True)
        preparation.begin()  # once the page answers: loading a model library would hold it up
        demo.block_thread()
    except KeyboardInterrupt:  # before it blocks, from where on Gradio closes by itself
        demo.close()


if __name__ == "__main__":
    main()
