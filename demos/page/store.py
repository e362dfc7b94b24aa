"""The server's half of the settings, without a memory: it answers a page's question, from store.js, with what to show."""

import gc
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import gradio as gr
from gradio.components import Component
from starlette.routing import Route

from demos.page import address, choice, controls, look, methods
from demos.page.answers import Answer, Answers
from demos.page.question import Question, sound
from demos.page.serving import InBytes
from demos.page.tab import QUIET, Asked, Slow, Tab, said
from peftlab import PeftlabError, SpecError
from peftlab.resolve import METHOD_SETTINGS
from peftlab.room import quota, rooms, worker
from peftlab.show.marks import term
from peftlab.spec import SETTINGS

SCRIPT = look.script("store.js")
LONGEST = 20_000  # letters of a value that is read at all
CLEARS = {
    "method": (*METHOD_SETTINGS, "learning_rate", "quantization", "preset"),
    "model": ("target_modules", "layers"),
}
"""Settings that become automatic again when another method or model is chosen."""
log = logging.getLogger(__name__)


class Store:
    """What the tabs of one page show."""

    def __init__(self, tabs: Sequence[Tab]) -> None:
        self.tabs = {tab.key: tab for tab in tabs}
        self.choices = {name: one for tab in tabs for name, one in tab.choices.items()}
        self.answers = Answers(self)

    def read(self, state: Mapping[str, object], kept: Mapping[str, object] | None = None) -> Asked:
        """What a link or a page says; a setting that its method does not read is left out. Raises SpecError."""
        plain = {str(n): str(v) for n, v in state.items() if v not in (None, "")}
        if long := [n for n, v in plain.items() if len(v) > LONGEST]:
            raise SpecError(f"{long[0]}={plain[long[0]][:20]}…: longer than {LONGEST:,} letters; shorten it")
        plain.pop("v", None)  # an address says it to whoever looks; a press does what it says all the same
        own = {name: self.choices[name].read(plain[name]) for name in plain if name in self.choices}
        run = {name: value for name, value in plain.items() if name not in self.choices}
        chosen = {name: one.usual for name, one in self.choices.items()} | own
        spec = address.public(address.OPENING.to_dict() | run)
        if key := chosen.get("preset"):
            spec, chosen["preset"] = methods.of_preset(key, run)
        asked = Asked(spec, chosen, dict(kept or {}))
        unread = [name for name in METHOD_SETTINGS if name in asked.run.unread and getattr(spec, name) is not None]
        return replace(asked, spec=spec.but(**dict.fromkeys(unread))) if unread else asked

    def link(self, asked: Asked) -> dict[str, str]:
        """The settings as the address says them: nothing for what the page opens with."""
        unusual = {n: choice.said(v) for n, v in asked.choices.items() if v != self.choices[n].usual}
        return address.link(asked.spec) | unusual

    def understood(self, tab: Tab, question: Question) -> tuple[Asked, dict[str, str]]:
        """What a question asks, without what is refused; and the refusals, by setting."""
        state, problems = dict(question.state), dict[str, str]()
        while True:
            try:
                address.check_version(str(state.get("v") or address.VERSION))
                asked = self.read(state, question.kept)
                tab.check(asked)
                refused = {name: str(question.state[name]) for name in problems}
                return replace(asked, refused=refused) if refused else asked, problems
            except PeftlabError as error:
                if not state:
                    raise
                name = self._blamed(tab, state, str(error))
                problems[name] = str(error)
                del state[name]

    def _blamed(self, tab: Tab, state: dict[str, Any], error: str) -> str:
        """The setting that an error is about: the one it begins with, or one without which the others are accepted."""
        named = re.match(r"([\w-]+)[=:]", error)
        if named and (name := named[1].replace("-", "_")) in state:
            return name
        for name in reversed(state):
            with suppress(PeftlabError):
                tab.check(self.read({n: v for n, v in state.items() if n != name}))
                return name
        return next(reversed(state))

    def answer(self, asks: object) -> Answer:
        """What the tab on screen shows of the settings.

        The answer has the question's `number`, the `state` for the address, the `problems` by setting, what to `show` by
        component, the seconds until the page asks `again`, and the tab and job to `follow` instead; where it is `slow`,
        an `exact` answer will show more. A browser that is new here finds its token in `visitor`.
        """
        return self.answered(sound(asks))[0]

    def answered(self, question: Question) -> tuple[Answer, tuple[Slow, ...]]:
        """The answer, and the slow work that was not done when it was made."""
        tab = self.tab_of(question)
        unshown = {"number": question.number, "state": question.state, "show": {}, "again": None, "slow": False}
        try:
            asked, problems = self.understood(tab, question)
            again = tab.again(asked)  # before it is drawn: what ends meanwhile is looked at once more
            undone = tuple(slow for slow in self.wanted(tab, asked, question) if asked.known(slow) is None)
            return (
                unshown
                | self.greeted(asked.kept)
                | {
                    "state": self.link(asked) | {name: str(question.state[name]) for name in problems},
                    "problems": problems,
                    "show": self.shown(tab, asked, question),
                    "again": again,
                    "follow": f"{tab.key}/{run}" if again and (run := tab.follows(asked)) else None,
                    "slow": bool(undone),
                }
            ), undone
        except Exception as error:
            return unshown | {"problems": {"": said(error)}}, ()

    def tab_of(self, question: Question) -> Tab:
        return self.tabs.get(question.tab) or next(iter(self.tabs.values()))

    def greeted(self, kept: Mapping[str, object]) -> Answer:
        """The token of a browser that has none from here."""
        signer = rooms.here().signer
        return {} if signer.read(kept.get("visitor")) else {"visitor": signer.newcomer()}

    def shown(self, tab: Tab, asked: Asked, question: Question) -> dict[str, controls.Update]:
        """Updates of the tab's controls and of the panels that are in sight, by the names that store.js knows.

        What is refused stays in its control as it was typed; a slider's scale is stretched to hold it.
        """
        seen = {None, *question.open}
        drawn = {name: draw for name, draw in tab.draw(asked).items() if tab.folded.get(name) in seen}
        panels = {name: draw() if callable(draw) else draw for name, draw in drawn.items()}
        if "cost" in tab.panels and tab.folded.get("cost") in seen:
            panels["cost"] = tab.cost_said(asked)
        shown = {name: controls.as_update(value) for name, value in {**tab.fill(asked), **panels}.items()}
        for name in asked.refused.keys() & tab.controls.keys():
            update = {k: v for k, v in shown.get(name, gr.skip()).items() if k != "value"}
            if isinstance(control := tab.controls[name], gr.Slider):
                with suppress(ValueError):
                    if abs(number := float(asked.refused[name])) < 1e15:
                        low, high = min(control.minimum, number), max(control.maximum, number)
                        update |= {"value": number, "minimum": low, "maximum": high}
            shown[name] = update
        return {f"{tab.key}.{name}": update for name, update in shown.items()}

    def wanted(self, tab: Tab, asked: Asked, question: Question) -> list[Slow]:
        """Slow work whose result is in sight."""
        costs = tab.costs(asked).values() if "cost" in tab.panels else ()
        every = [*tab.slow(asked), *(Slow(quota.seconds, (asks,), "cost") for asks in costs)]
        return [slow for slow in every if tab.folded.get(slow.panel) in {None, *question.open}]

    def prepare(self, pause: float = 0.005) -> None:
        """Makes what the first visitors would wait for. After each little it lets those go ahead who are here already."""
        for tab in self.tabs.values():
            for _ in tab.beforehand():
                time.sleep(pause)
        gc.collect()
        gc.freeze()

    async def exact(self, asks: object) -> Answer:
        """What `answer` shows, once the slow work is done."""
        question = sound(asks)
        failed = await self.done(question)
        return {"number": question.number, "show": self.answered(question)[0]["show"] if failed is None else failed}

    async def done(self, question: Question) -> dict[str, controls.Update] | None:
        """Waits until slow work is done in its own process, which holds no thread. What is to be said instead, if it failed."""
        if question.tab not in self.tabs:
            return {}
        tab = self.tabs[question.tab]
        try:
            asked, _ = self.understood(tab, question)
            for slow in self.wanted(tab, asked, question):
                await worker.once(slow.work, *slow.arguments)
            return None
        except PeftlabError as error:
            return {f"{tab.key}.problem": controls.as_update(str(error))}
        except Exception as error:
            log.exception("exact: %s", error)
            return {}

    def build(self, tabs: gr.Tabs) -> None:
        """Makes the component that runs store.js, and wires every tab's controls and folds, once these are built."""
        outputs: dict[str, gr.blocks.Block] = {"store.tabs": tabs}
        for tab in self.tabs.values():
            outputs |= {f"{tab.key}.{name}": component for name, component in {**tab.controls, **tab.panels}.items()}
            for name, component in tab.controls.items():
                self._hear(f"{tab.key}.{name}", component, tab.also[name])
        given = {
            "tabs": list(self.tabs),
            "nats": term("nats"),
            "run": list(SETTINGS),
            "clears": CLEARS | {n: names for tab in self.tabs.values() for n, names in tab.clears.items()},
            "folds": {fold.elem_id: name for tab in self.tabs.values() for name, fold in tab.folds.items()},
            "outputs": list(outputs),
        }

        def answer(question: object) -> Answer:  # a function, because Gradio marks it and cannot mark a method
            return self.answer(question)

        async def exact(question: object) -> Answer:
            return await self.exact(question)

        vars(answer)["in_bytes"] = InBytes(self.answers.known, self.answers.made)
        vars(exact)["in_bytes"] = InBytes(self.answers.known_exact, self.answers.made_exact)
        carrier = gr.HTML(
            "", js_on_load=SCRIPT.replace("/*given*/{}", json.dumps(given)), server_functions=[answer, exact],
            visible="hidden",
        )  # fmt: skip
        shows = list(outputs.values())
        carrier.submit(None, None, shows, js="() => peftlab.take()", trigger_mode="multiple", **QUIET)

    def _hear(self, name: str, component: Component, also: Mapping[str, str]) -> None:
        """Writes what a control says. The page's scripts hear HTML and text boxes, as Gradio does not tell of a paste."""
        if not isinstance(component, (gr.HTML, gr.Textbox)):
            at_rest = json.dumps(isinstance(component, (gr.Slider, gr.Number)))  # what is moved or typed in bit by bit
            heard = f"(v) => {{ peftlab.heard('{name}', v, {at_rest}, {json.dumps(also)}); }}"
            component.input(None, component, None, js=heard, **QUIET)  # type: ignore[attr-defined]
        if isinstance(component, gr.Dropdown) and component.multiselect:
            component.change(None, component, None, js=f"(v) => {{ peftlab.picked('{name}', v); }}", **QUIET)


class Page(gr.Blocks):
    store: Store
    routes: list[Route]


def blocks(*tabs: Tab, head: Callable[[], None] | None = None, foot: Callable[[], None] | None = None) -> Page:
    """A page of these tabs, with what stands above and below them."""
    store = Store(tabs)
    with Page(title="peftlab", fill_width=True) as demo:
        demo.space_id = None  # with it, Gradio's page would ask huggingface.co for a header
        if head:
            head()
        question, keeper = gr.HTML("", visible="hidden"), gr.Textbox("", visible=False)
        with gr.Tabs(selected=tabs[0].key) as row:
            for tab in tabs:
                tab.question, tab.keeper, tab.read = question, keeper, store.read
                with gr.Tab(tab.title, id=tab.key) as shown:
                    tab.build()
                shown.select(None, None, None, js=f"() => peftlab.go('{tab.key}')", **QUIET)
        if foot:
            foot()
        store.build(row)
    demo.store, demo.routes = store, [route for tab in tabs for route in tab.routes()]
    return demo


def run_alone(tab: Tab) -> None:
    """Serves one tab, as `python demos/memory_calculator.py` does. A port may be given as an argument."""
    demo = blocks(tab)
    demo.launch(**look.launch_options(demo.routes), server_port=int(sys.argv[1]) if len(sys.argv) > 1 else None)
