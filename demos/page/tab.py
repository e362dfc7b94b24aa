"""A tab: controls and panels by name, and what they show of the settings."""

import hmac
import json
import logging
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar, cast

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component
from gradio.events import Dependency
from starlette.routing import Route

from demos.page import controls, gpu
from demos.page.choice import Choice, Number
from demos.page.controls import blank, shown_model
from demos.page.question import sound
from peftlab import PeftlabError, RunSpec, hardware, resolve, units
from peftlab.errors import Curable
from peftlab.room import jobs, quota, rooms, worker
from peftlab.run import events
from peftlab.show.refusals import refusal
from peftlab.spec import Resolved

log = logging.getLogger(__name__)
AnyControl = TypeVar("AnyControl", bound=Component)
AnyPanel = TypeVar("AnyPanel", bound=Block)
T = TypeVar("T")
Values: TypeAlias = Mapping[str, object]
"""What controls and panels show, by their names: each a value, or an update as `gr.update` makes it."""
On: TypeAlias = Sequence[Callable[..., Dependency]]  # the events that start a press
DRAWER = "element.querySelector('button').onclick = () => element.closest('.controls').classList.toggle('open')"
POLL = 0.5  # seconds between two looks at a job


@dataclass(frozen=True)
class Asked:
    """What a page asks to see: a run's settings, every tab's own choices, and what the browser keeps for itself."""

    spec: RunSpec
    choices: Mapping[str, Any]  # the tabs' own choices by name, the usual ones included
    kept: Mapping[str, Any]
    """`visitor`, the token that this server gave the browser; `run`, `race` and `scoring`, ids of what was started from it;
    `key`, the host's, where it was in the address."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Settings that the tab refuses, as they were given; the fields above leave them out."""

    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getitem__(self, name: str) -> Any:
        return self.choices[name]

    def known(self, slow: "Slow") -> object | None:
        """The result of slow work, None until it is done; the same for all who ask it of this question."""
        return self._made.setdefault(slow, worker.known(slow.work, *slow.arguments))

    def once(self, make: Callable[["Asked"], T]) -> T:
        """`make(self)`, made at the first call: a question is checked, filled in and drawn, each of the same things."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]  # type: ignore[no-any-return]

    @cached_property
    def run(self) -> Resolved:
        """The run with every automatic setting filled."""
        return resolve(self.spec)

    @cached_property
    def visitor(self) -> str:
        """The browser whose runs and races these are; empty for one that was not given its name here."""
        return rooms.here().signer.read(self.kept.get("visitor"))

    @property
    def first(self) -> bool:
        """Whether this browser has the host's key, and goes before others."""
        key = rooms.here().settings.key
        return bool(key) and hmac.compare_digest(str(self.kept.get("key") or "").encode(), key.encode())

    @cached_property
    def adapters(self) -> list[str]:
        """Ids of this visitor's own runs that have an adapter, the newest first."""
        return [job.id for job in rooms.here().adapters(self.visitor)]


@dataclass(frozen=True)
class Slow:
    """`work(*arguments)` that takes long, and so is done in a process of its own."""

    work: Callable[..., object]
    arguments: tuple[Hashable, ...]
    panel: str = ""  # the one panel that shows the result; while that is folded, the work is not begun


def refused(error: Exception) -> str:
    """What a press shows of an error."""
    return refusal(said(error), error.settings, error.change) if isinstance(error, Curable) else escape(said(error))


def said(error: Exception) -> str:
    """What the page says of an error. The traceback of one that nobody foresaw goes to the log."""
    if isinstance(error, PeftlabError):
        return str(error)
    log.exception("the page: %s", error)
    return f"This failed here, and it is our fault: {type(error).__name__}. Change a setting and try again"


Work: TypeAlias = Callable[[Asked], Iterator[Values]]  # what a press does: it yields what controls and panels show
QUIET: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
ONE_AT_A_TIME: dict[str, Any] = QUIET | (
    {} if hardware.is_shared() else {"concurrency_id": "generate", "concurrency_limit": 1}
)
"""Options for presses that compute with a model: two at once would only be slower, but where each gets a GPU of its own."""
ENDING = 3
"""Seconds of a shared GPU that are kept for the end of a run whose time is over."""


def with_result(work: Generator[float, None, T]) -> Iterator[tuple[float, T | None]]:
    """The shares done of a work, each with None; at last 1, with what the work returns."""
    for share in (told := events.Work(work)):
        yield share, None
    yield 1.0, told.result


class Tab:
    """One tab. A subclass gives `key`, `title` and its `choices`, builds its components and says what they show.

    A control is named after the setting or choice that it writes; a panel has any other name. What is inside a `fold` is
    drawn once that is opened.
    """

    key, title = "", ""
    choices: Mapping[str, Choice] = {}
    lasting = False
    """Whether what is shown follows from the settings and from slow work alone: everybody who asks the same gets the same."""
    changing: tuple[str, ...] = ()
    """The panels of a lasting tab of which that is not true."""
    quick = False
    """Whether it is drawn in a few milliseconds while its folds are closed and the model is of the catalogue."""
    clears: Mapping[str, tuple[str, ...]] = {}
    """The choices that become usual again when another one is written, by that one's name."""
    question: Component
    keeper: Component
    """These carry the settings to a press, and what the press gives the browser to keep. The store sets both."""
    read: Callable[..., Asked]  # `Store.read`

    def __init__(self) -> None:
        self.controls: dict[str, Component] = {}
        self.also: dict[str, dict[str, str]] = {}  # what a control writes besides its own setting
        self.panels: dict[str, Block] = {}
        self.folds: dict[str, gr.Accordion] = {}
        self.folded: dict[str, str] = {}  # the name of the fold that a panel is inside, by the panel's name

    def control(self, name: str, component: AnyControl, **also: str) -> AnyControl:
        """`component` writes the setting `name`, and `also` with it. The page hears a text box letter by letter."""
        self.also[name] = also
        component.elem_id = f"{self.key}-{name}"
        if isinstance(component, gr.Textbox):
            component.elem_classes = [*component.elem_classes, "typed"]
            component.interactive = True
        self.controls[name] = component
        return component

    def slider(self, name: str, label: str, info: str | None = None, step: float = 1, visible: bool = True) -> None:
        """A slider over the whole range of the tab's choice `name`, which is a number."""
        of = cast(Number, self.choices[name])
        self.control(name, gr.Slider(of.low, of.high, of.usual, step=step, label=label, info=info, visible=visible))

    def control_all(self, made: Mapping[str, Component]) -> None:
        """Controls by the settings that they write."""
        for name, component in made.items():
            self.control(name, component)

    def panel(self, name: str, component: AnyPanel) -> AnyPanel:
        component.elem_id = f"{self.key}-{name}"
        self.panels[name] = component
        return component

    @contextmanager
    def fold(self, title: str) -> Iterator[None]:
        """A closed accordion around the panels that are made inside it. It is named after the first of them."""
        before = set(self.panels)
        with gr.Accordion(title, open=False, elem_classes="fold") as accordion:
            yield
        inside = [name for name in self.panels if name not in before]
        if inside:
            name = f"{self.key}.{inside[0]}"
            accordion.elem_id = f"fold-{name}"
            self.folds[name] = accordion
            self.folded = dict.fromkeys(inside, name) | self.folded  # a fold within this one keeps its own panels

    def fold_of(self, title: str, *names: str) -> None:
        """A fold that holds nothing but panels of HTML."""
        with self.fold(title):
            for name in names:
                self.panel(name, gr.HTML())

    def build(self) -> None:
        """Settings in a column at the left on a desktop, in a drawer at the foot of a phone's screen; and the pictures."""
        with gr.Row(elem_classes="stage"):
            with gr.Column(elem_classes="controls", scale=0, min_width=320):
                handle = '<button type="button" class="handle">Settings</button>'
                gr.HTML(handle, js_on_load=DRAWER, elem_classes="drawer")
                self.settings()
            with gr.Column(elem_classes="main"):
                self.pictures()

    def settings(self) -> None:
        """Makes the controls."""
        raise NotImplementedError

    def pictures(self) -> None:
        """Makes the panels, once the settings are made."""
        raise NotImplementedError

    def check(self, asked: Asked) -> None:
        """Raises SpecError for what this tab cannot show."""

    def fill(self, asked: Asked) -> dict[str, object]:
        """What each control shows, by name: the tab's choice, or the setting of the run, empty where that is automatic."""
        spec, own = asked.spec, self.choices
        shown = {name: asked[name] if name in own else blank(getattr(spec, name)) for name in self.controls}
        return shown | ({"model": shown_model(spec)} if "model" in shown else {})

    def draw(self, asked: Asked) -> Values:
        """What each panel shows, by name, or a function that draws it. A panel that is not named stays as it is."""
        return {}

    def job(self, asked: Asked) -> jobs.Job | None:
        """The run or race whose events are shown, while it goes on and after."""
        return None

    def follows(self, asked: Asked) -> str | None:
        """The id of a job whose picture comes by itself, from `served.follow`; None where the page asks for it."""
        return None

    def routes(self) -> list[Route]:
        """What the page fetches beside Gradio's own."""
        return []

    def again(self, asked: Asked) -> float | None:
        """Seconds after which there may be more to see; None where nothing is under way."""
        return POLL if (job := self.job(asked)) and not job.over else None

    def beforehand(self) -> Iterator[None]:
        """Makes what the first visitors would wait for, a little before each `yield`."""
        yield from ()

    def costs(self, asked: Asked) -> Mapping[str, quota.Asks]:
        """What presses ask a shared GPU for, by what they are called."""
        return {}

    def cost(self) -> None:
        """A place where it is said what presses cost, where they cost something."""
        if hardware.is_shared():
            self.panel("cost", controls.note())

    def cost_said(self, asked: Asked) -> str:
        """What presses cost, as far as it is known by now."""
        known = {name: worker.known(quota.seconds, asks) for name, asks in self.costs(asked).items()}
        costs = [
            f"{name}: about {units.seconds(seconds)} of your GPU time; {units.seconds(quota.asked(seconds))} are asked for."
            for name, seconds in known.items()
            if seconds is not None
        ]
        return " ".join([*costs, gpu.sign_in()] if costs else [])

    def slow(self, asked: Asked) -> list[Slow]:
        """Work whose result `draw` shows once it is known."""
        return []

    def press(
        self, on: On, work: Work, shows: Sequence[str],
        busy: Values | None = None, free: Values | None = None, problem: str = "problem", begins: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        """`on` starts `work`, which `begins` a job or lets it go on.

        `shows` names what it may yield. `busy` is shown before it begins and `free` once it is over, however it ends; what
        goes wrong is said in the panel `problem`, with a button where other settings cure it. A value named `kept` is a dict
        for the browser to keep.
        """
        before, after = {problem: "", **(busy or {})}, dict(free or {})
        named: dict[str, Block] = {**self.controls, **self.panels, "kept": self.keeper}
        names = dict.fromkeys([*before, *after, *shows])
        changed = [f"{self.key}.{name}" for name in {**(busy or {}), **after}]

        def shown(values: Values, new: Values = MappingProxyType({})) -> dict[Block, object]:
            return {named[n]: json.dumps({**new, **cast(Values, v)}) if n == "kept" else v for n, v in values.items()}

        def pressed(question: object) -> Iterator[dict[Block, object]]:
            yield shown(before)
            try:
                asks = sound(question)
                signer, kept = rooms.here().signer, asks.kept
                new = (
                    {} if signer.read(kept.get("visitor")) else {"visitor": signer.newcomer()}
                )  # before any answer came
                for values in work(self.read(asks.state, kept | new)):
                    yield shown(values, new)
                if after:
                    yield shown(after)
            except Exception as error:
                yield shown({**after, problem: refused(error)})

        over = gr.on(
            on, pressed, self.question, [named[n] for n in names],
            js="() => [peftlab.question()]", **(QUIET | {"trigger_mode": "multiple"} | options),
        ).then(None, self.keeper, None, js=f"(text) => peftlab.pressed({json.dumps(changed)}, text)", **QUIET)  # fmt: skip
        if begins and hardware.is_shared():
            over.then(self.carry_out, self.question, None, js="() => [peftlab.question()]", **QUIET)

    def carry_out(self, question: object) -> None:
        """Does the visitor's job within this request, which a shared GPU's quota hangs on."""
        asks = sound(question)
        if job := rooms.here().running(self.read(asks.state, asks.kept).visitor):
            longest = quota.LONGEST
            with suppress(PeftlabError):  # then the job itself ends with the reason
                longest = quota.asked(quota.predicted(quota.of_job(job.kind, job.arguments)))
            rooms.here().carry_out(job, longest - ENDING)
