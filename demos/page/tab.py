"""A tab: controls and panels by name, and what they show of the settings."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from demos.page.choice import Choice
from peftlab import PeftlabError, RunSpec

log = logging.getLogger(__name__)
Draw = Callable[[], Any]
"""Gives what a panel holds, or an update of it. Raises PeftlabError."""


@dataclass(frozen=True)
class Asked:
    """What a page asks to see: a run's settings, every tab's own choices, and what the browser keeps for itself."""

    spec: RunSpec
    choices: Mapping[str, Any]
    """By name, the usual ones included."""
    kept: Mapping[str, Any]
    """`visitor`, a name that the browser made up; `adapters`, `run` and `race`, ids of what was started from it."""
    given: frozenset[str] = frozenset()
    """Names of the settings and choices that are not left as usual."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """What was given of settings that the tab refuses, and that are left out of the above."""

    def __getitem__(self, name: str) -> Any:
        return self.choices[name]

    @property
    def visitor(self) -> str:
        """Whose runs and races these are."""
        return str(self.kept.get("visitor") or "")


@dataclass(frozen=True)
class Slow:
    """Work of the process that takes long work: `work(*arguments)`, and what its result draws, by panel."""

    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    panel: str = ""
    """Where one panel alone shows it: nothing is begun while that is folded."""


def failed(error: Exception) -> str:
    """What is said of an error that nobody foresaw; its traceback goes to the log."""
    log.exception("the page: %s", error)
    return f"This failed here, and it is our fault: {type(error).__name__}. Change a setting and try again"


QUIET: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
ONE_AT_A_TIME: dict[str, Any] = QUIET | {"concurrency_id": "generate", "concurrency_limit": 1}
"""For what computes with a model: two at once would only be slower."""


class Tab:
    """One tab. A subclass gives `key`, `title` and its `choices`, builds its components and says what they show.

    A control is named after the setting or choice that it writes; a panel has any other name. A panel inside a `fold` is
    drawn when that is opened.
    """

    key = ""
    title = ""
    choices: Mapping[str, Choice] = {}
    clears: Mapping[str, tuple[str, ...]] = {}
    """Which choices start anew when another one is written."""

    def __init__(self) -> None:
        self.controls: dict[str, Any] = {}
        self.also: dict[str, dict[str, str]] = {}
        """What a control writes besides its own setting."""
        self.panels: dict[str, Any] = {}
        self.folds: dict[str, gr.Accordion] = {}
        self.folded: dict[str, str] = {}
        """Panels that are inside a fold, and which."""

    def control(self, name: str, component: Any, **also: str) -> Any:
        """`component` writes the setting `name`, and `also` with it. The page hears a text box letter by letter."""
        self.also[name] = also
        component.elem_id = f"{self.key}-{name}"
        if isinstance(component, gr.Textbox):
            component.elem_classes = [*component.elem_classes, "typed"]
            component.interactive = True
        self.controls[name] = component
        return component

    def control_all(self, made: Mapping[str, Any]) -> None:
        """Controls by the settings that they write."""
        for name, component in made.items():
            self.control(name, component)

    def panel(self, name: str, component: Any) -> Any:
        component.elem_id = f"{self.key}-{name}"
        self.panels[name] = component
        return component

    @contextmanager
    def fold(self, title: str) -> Iterator[gr.Accordion]:
        before = set(self.panels)
        with gr.Accordion(title, open=False, elem_classes="fold") as accordion:
            yield accordion
        inside = [name for name in self.panels if name not in before]
        name = f"{self.key}.{inside[0]}" if inside else ""
        if inside:
            self.folds[name] = accordion
            self.folded.update(dict.fromkeys((n for n in inside if n not in self.folded), name))

    def build(self) -> None:
        """Makes the components, inside a Blocks that is open."""
        raise NotImplementedError

    def check(self, asked: Asked) -> None:
        """Raises SpecError for what this tab cannot show."""

    def fill(self, asked: Asked) -> dict[str, Any]:
        """What each control shows, by name."""
        return {}

    def draw(self, asked: Asked) -> dict[str, Draw]:
        """How each panel is drawn, by name. A panel that is not named stays as it is."""
        return {}

    def again(self, asked: Asked) -> float | None:
        """Seconds after which there may be more to see; None where nothing is under way."""
        return None

    def slow(self, asked: Asked) -> list[Slow]:
        """Work whose result `draw` would show, where it knew it."""
        return []

    def press(
        self, on: Any, work: Callable[[Asked], Iterator[Mapping[str, Any]]], shows: Sequence[str],
        busy: Mapping[str, Any] | None = None, free: Mapping[str, Any] | None = None, problem: str = "problem",
        **options: Any,
    ) -> None:  # fmt: skip
        """`on`, a button or several events, starts `work(asked)`, which yields values of controls and panels by name.

        `shows` names those that it may yield. `busy` is shown before it begins and `free` once it is over, however it ends;
        what goes wrong is said in the panel that `problem` names. A value named `kept` is a dict for the browser to keep.
        """
        before, after = {problem: "", **(busy or {})}, dict(free or {})
        named = {**self.controls, **self.panels, "kept": self.keeper}
        names = list(dict.fromkeys([*before, *after, *shows]))

        def shown(values: Mapping[str, Any]) -> dict[Any, Any]:
            return {named[n]: json.dumps(v) if n == "kept" else v for n, v in values.items()}

        def pressed(question: dict[str, Any]) -> Iterator[dict[Any, Any]]:
            yield shown(before)
            try:
                for values in work(self.read(question["state"], question["kept"])):
                    yield shown(values)
                if after:
                    yield shown(after)
            except PeftlabError as error:
                yield shown({**after, problem: escape(str(error))})
            except Exception as error:
                yield shown({**after, problem: failed(error)})

        gr.on(
            on if isinstance(on, list) else [on.click], pressed, self.question, [named[n] for n in names],
            js="() => [peftlab.question()]", **(QUIET | {"trigger_mode": "multiple"} | options),
        ).then(None, self.keeper, None, js="(text) => { if (text) peftlab.keep(JSON.parse(text)); }", **QUIET)  # fmt: skip

    question: Any = None
    keeper: Any = None
    """Components that carry the settings to a press, and what it gives the browser to keep. The store sets both."""
    read: Callable[..., Asked]
    """`Store.read`."""
