"""The settings of the page as the server sees them: it keeps none, reads what a page asks and answers with what to show.

The page's half is store.js. A question is a dict of `number`, `tab`, `state` (what the address says, name by name),
`kept` (see `Asked`) and `open` (folds that are open).
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from demos.page import address, choice, controls, look, methods
from demos.page.tab import QUIET, Asked, Slow, Tab, failed
from peftlab import PeftlabError, SpecError, resolve
from peftlab.methods import METHODS
from peftlab.resolve import METHOD_SETTINGS
from peftlab.room import worker
from peftlab.show.marks import term
from peftlab.spec import SETTINGS

SCRIPT = look.script("plot.js", "store.js")
LONGEST = 20_000
"""Letters of a value that is read at all."""
CLEARS = {
    "method": (*METHOD_SETTINGS, "learning_rate", "quantization", "preset"),
    "model": ("target_modules", "layers"),
}
"""A new method starts at its own settings; modules and layers are a model's."""
REST = (gr.Slider, gr.Number)
"""Controls that are moved or typed in bit by bit: nobody asks until they rest."""

log = logging.getLogger(__name__)


class Store:
    """What the tabs of one page show."""

    def __init__(self, tabs: Sequence[Tab]) -> None:
        self.tabs = {tab.key: tab for tab in tabs}
        self.choices = {name: one for tab in tabs for name, one in tab.choices.items()}

    # --- reading

    def read(self, state: Mapping[str, Any], kept: Mapping[str, Any] | None = None) -> Asked:
        """What a link or a page says. Raises SpecError."""
        plain = {str(n): str(v) for n, v in state.items() if v not in (None, "")}
        if long := [n for n, v in plain.items() if len(v) > LONGEST]:
            raise SpecError(f"{long[0]}={plain[long[0]][:20]}…: longer than {LONGEST:,} letters; shorten it")
        own = {name: self.choices[name].read(plain[name]) for name in plain if name in self.choices}
        run = {name: value for name, value in plain.items() if name not in self.choices}
        chosen = {name: one.usual for name, one in self.choices.items()} | own
        spec = address.public(address.OPENING.to_dict() | run)
        if key := chosen.get("preset"):
            spec, chosen["preset"] = methods.of_preset(key, run)
        unread = {n for n in METHOD_SETTINGS if n not in METHODS[resolve(spec).method or ""].settings}
        spec = spec.but(**dict.fromkeys(unread)) if unread else spec
        given = frozenset(n for n in plain if n not in unread)
        return Asked(spec, chosen, dict(kept or {}), given)

    def link(self, asked: Asked) -> dict[str, str]:
        """The settings as the address says them: nothing for what the page opens with."""
        return address.link(asked.spec) | choice.unusual(asked.choices, self.choices)

    def understood(self, tab: Tab, question: Mapping[str, Any]) -> tuple[Asked, dict[str, str]]:
        """What a question asks, without what is refused; and the refusals, by setting.

        A setting is refused where the rest would do without it; the names of a refusal come first in it.
        """
        state, kept = dict(question["state"]), question.get("kept") or {}
        problems: dict[str, str] = {}
        while True:
            try:
                asked = self.read(state, kept)
                tab.check(asked)
                return replace(asked, refused={name: str(question["state"][name]) for name in problems}), problems
            except PeftlabError as error:
                if not state:
                    raise
                name = self._blamed(tab, state, str(error))
                problems[name] = str(error)
                del state[name]

    def _blamed(self, tab: Tab, state: Mapping[str, Any], error: str) -> str:
        named = re.match(r"([\w-]+)[=:]", error)
        if named and (name := named[1].replace("-", "_")) in state:
            return name
        for name in reversed(list(state)):
            try:
                tab.check(self.read({n: v for n, v in state.items() if n != name}))
                return name
            except PeftlabError:
                continue
        return next(reversed(list(state)))

    # --- answering

    def answer(self, question: Any) -> dict[str, Any]:
        """What the tab on screen shows of the settings."""
        question = sound(question)
        number, tab = question.get("number"), self.tabs.get(question.get("tab", "")) or next(iter(self.tabs.values()))
        try:
            asked, problems = self.understood(tab, question)
            again = tab.again(asked)  # before it is drawn: what ends meanwhile is looked at once more
            state = self.link(asked) | {n: str(question["state"][n]) for n in problems}
            return {
                "number": number,
                "state": state,
                "problems": problems,
                "show": self.shown(tab, asked, problems, question["open"]),
                "again": again,
                "slow": any(worker.known(s.work, *s.arguments) is None for s in self.wanted(tab, asked, question)),
            }
        except Exception as error:
            said = str(error) if isinstance(error, PeftlabError) else failed(error)
            state = question.get("state") or {}
            return {"number": number, "state": state, "problems": {"": said}, "show": {}, "again": None, "slow": False}

    def shown(self, tab: Tab, asked: Asked, problems: Mapping[str, str], opened: Sequence[str]) -> dict[str, Any]:
        """Updates of the tab's controls and of the panels that are in sight, by the names that store.js knows."""
        panels = {
            name: draw()
            for name, draw in tab.draw(asked).items()
            if name not in tab.folded or tab.folded[name] in opened
        }
        shown = {**tab.fill(asked), **panels}
        named = {f"{tab.key}.{name}": controls.as_update(value) for name, value in shown.items()}
        return named | self.kept_as_typed(tab, problems, asked)

    def wanted(self, tab: Tab, asked: Asked, question: Mapping[str, Any]) -> list[Slow]:
        """Slow work whose result is in sight."""
        seen = {None, *(question.get("open") or ())}
        return [slow for slow in tab.slow(asked) if tab.folded.get(slow.panel) in seen]

    def kept_as_typed(self, tab: Tab, problems: Mapping[str, str], asked: Asked) -> dict[str, Any]:
        """What is refused stays in its control, which would else end where its scale does."""
        shown = {}
        for name in problems:
            control, filled = (
                tab.controls.get(name),
                controls.as_update(tab.fill(asked).get(name, {"__type__": "update"})),
            )
            if control is None:
                continue
            shown[f"{tab.key}.{name}"] = {key: value for key, value in filled.items() if key != "value"}
            number = plain_number(asked.refused[name])
            if isinstance(control, gr.Slider) and number is not None:
                low, high = min(control.minimum, number), max(control.maximum, number)
                shown[f"{tab.key}.{name}"] |= {"value": number, "minimum": low, "maximum": high}
        return shown

    async def exact(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The same once the slow work is done, in a process of its own: those who wait hold no thread."""
        question = sound(question)
        number, tab = question["number"], self.tabs.get(question["tab"])
        if tab is None:
            return {"number": number, "show": {}}
        try:
            asked, problems = self.understood(tab, question)
            for slow in self.wanted(tab, asked, question):
                await worker.once(slow.work, *slow.arguments)
            return {"number": number, "show": self.shown(tab, asked, problems, question["open"])}
        except PeftlabError as error:
            return {"number": number, "show": {f"{tab.key}.problem": controls.as_update(str(error))}}
        except Exception as error:
            log.exception("exact: %s", error)
        return {"number": number, "show": {}}

    # --- building

    def build(self, tabs: gr.Tabs) -> None:
        """The component that carries it all, and what the controls and folds of every tab do. Call it once they are built."""
        outputs = {"store.tabs": tabs}
        for tab in self.tabs.values():
            for name, fold in tab.folds.items():
                fold.elem_id = fold.elem_id or f"fold-{name}"
        for tab in self.tabs.values():
            named = {**tab.controls, **tab.panels}
            outputs |= {f"{tab.key}.{name}": component for name, component in named.items()}
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

        def answer(question: dict[str, Any]) -> dict[str, Any]:
            return self.answer(question)

        async def exact(question: dict[str, Any]) -> dict[str, Any]:
            return await self.exact(question)

        self.carrier = gr.HTML(
            "", js_on_load=SCRIPT.replace("/*given*/{}", json.dumps(given)), server_functions=[answer, exact],
            visible="hidden",
        )  # fmt: skip
        self.carrier.submit(
            None, None, list(outputs.values()), js="() => peftlab.take()", trigger_mode="multiple", **QUIET
        )

    def _hear(self, name: str, component: Any, also: Mapping[str, str]) -> None:
        """HTML and text boxes are heard by scripts of the page: Gradio tells of letters, not of what is pasted or deleted."""
        if not isinstance(component, (gr.HTML, gr.Textbox)):
            more = ", ".join(["v", str(isinstance(component, REST)).lower(), *([json.dumps(also)] if also else [])])
            component.input(None, component, None, js=f"(v) => {{ peftlab.heard('{name}', {more}); }}", **QUIET)
        if getattr(component, "multiselect", False):
            component.change(None, component, None, js=f"(v) => {{ peftlab.picked('{name}', v); }}", **QUIET)


def plain_number(text: str) -> int | float | None:
    """What a box for numbers can hold."""
    try:
        number = float(text)
    except ValueError:
        return None
    return (int(number) if number == int(number) else number) if abs(number) < 1e15 else None


def sound(question: Any) -> dict[str, Any]:
    """A question in its form, whatever somebody sent: a part that has another is left out."""
    given = question if isinstance(question, dict) else {}
    forms = {"tab": str, "state": dict, "kept": dict, "open": list}
    parts = {name: given[name] if isinstance(given.get(name), form) else form() for name, form in forms.items()}
    return parts | {"number": given.get("number"), "open": [name for name in parts["open"] if isinstance(name, str)]}


class Page(gr.Blocks):
    """What `blocks` makes, with its store."""

    store: Store


def blocks(*tabs: Tab, head: Callable[[], None] | None = None, foot: Callable[[], None] | None = None) -> Page:
    """A page of these tabs, with what stands above and below them."""
    store = Store(tabs)
    with Page(title="peftlab", fill_width=True) as demo:
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
    demo.store = store
    return demo


def run_alone(*tabs: Any) -> None:
    """`python demos/this_one.py`"""
    blocks(*tabs).launch(**look.launch_options(), server_port=int(sys.argv[1]) if len(sys.argv) > 1 else None)
