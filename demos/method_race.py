"""Tab 6, which one? Lessons from recorded races, what the lectures claim put to the test, and the same race run here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos.live_finetune import here, runnable
from demos.page import choice, controls, methods, store
from demos.page.gpu import on_gpu
from demos.page.tab import QUIET, Asked, Draw, Tab
from peftlab import RunSpec, SpecError, race
from peftlab.base.models import DEFAULT
from peftlab.count import why_not
from peftlab.data import tasks
from peftlab.data.tasks import TASKS
from peftlab.lectures.lessons import LESSONS, Lesson
from peftlab.methods import METHODS
from peftlab.resolve import METHOD_SETTINGS
from peftlab.room import jobs
from peftlab.show import races
from peftlab.show.marks import failure
from peftlab.show.settings import settings_line, terms
from peftlab.spec import closest

FIRST = next(iter(LESSONS))
SHOW, NONE = "show me", "none"
"""Instead of a guess: the result in the open, and hidden until there is a guess."""
MOST = 24
"""Racers of one race here."""
MOST_SEEDS = 5

RACE = on_gpu(race.race)  # at import, because a shared GPU wants to know its functions before the page is up


def named(text: str) -> tuple[str, ...]:
    """The racers that a link or the box names, by semicolon."""
    return () if text == "none" else tuple(text.split(";"))


def racers(spec: RunSpec, lesson: Lesson, values: Sequence[str] | None = None) -> list[race.Racer]:
    """Those of a race run here: `values` of what the lesson varies, its own where none are named. Raises SpecError."""
    base, values = here(spec), lesson.values if values is None else values
    method, said = METHODS[base.method or "lora"], ";".join(values)[:80] or NONE
    if not 2 <= len(values) <= MOST:
        raise SpecError(f"values={said}: a race here takes 2 to {MOST} racers, not {len(values)}; name others")
    if lesson.setting == "method" or (lesson.setting in METHOD_SETTINGS and lesson.setting not in method.settings):
        plain = dict.fromkeys([*METHOD_SETTINGS, "method", "learning_rate", "quantization"])
        base = RunSpec.from_dict({**base.to_dict(), **plain})
    for model in values if lesson.setting == "model" else ():
        if model not in (offered := [key for _, key in runnable()]):
            raise SpecError(f"values={model}: no model that trains here; {closest(model, offered)}")
    try:
        return race.along(base, {lesson.setting: values})
    except SpecError as error:
        raise SpecError(f"values={said}: {error}") from None


BOARD = """
element.addEventListener('click', (e) => {
  const sort = e.target.closest('[data-sort]'), csv = e.target.closest('[data-csv]'), link = e.target.closest('[data-link]');
  if (sort) peftlab.write({sort: sort.dataset.sort});
  if (csv) {
    const file = Object.assign(document.createElement('a'), {download: 'peftlab-race.csv'});
    file.href = URL.createObjectURL(new Blob([props.value.csv], {type: 'text/csv'}));
    file.click();
    URL.revokeObjectURL(file.href);
  }
  if (link) navigator.clipboard.writeText(location.href).then(() => { link.textContent = 'Copied'; });
});
"""
CLOSED = "() => { document.querySelectorAll('.controls.open').forEach((e) => e.classList.remove('open')); }"
"""A phone's drawer, so that what was started is seen."""
TOOLBAR = (
    '<div class="toolbar"><button type="button" class="small-button" data-csv>Download CSV</button>'
    '<button type="button" class="small-button" data-link>Copy link</button>'
    "<small>Press a column's name to sort by it.</small></div>"
)


class Race(Tab):
    """Lessons from recorded races, and the same race run here."""

    key, title = "race", "Race"
    choices = {
        "lesson": choice.one_of("lesson", FIRST, LESSONS),
        "device": choice.words("device", most=100),
        "sort": choice.one_of("sort", "score", race.BY_KEY),
        "values": choice.Choice(None, named),
        "seconds": choice.number("seconds", None, 0.1, 600, whole=False),
        "seeds": choice.number("seeds", None, 1, MOST_SEEDS),
        "guess": choice.words("guess", SHOW, most=100),
    }
    clears = {"lesson": ("device", "values", "seconds", "seeds", "guess")}

    def __init__(self) -> None:
        super().__init__()
        self.raced: dict[str, str] = {}
        """The lesson of each race that was started here, by the job's id."""

    def build(self) -> None:
        controls.stage(self._settings, self._pictures)
        self.panels["go"].click(None, None, None, js=CLOSED, **QUIET)
        self.press(self.panels["go"], self.begin, ["kept"])
        self.press(self.panels["stop"], self.halt, ["stop", "kept"])
        self.press(self.panels["back"], self.put_away, ["kept"])

    def _settings(self) -> None:
        lesson = gr.Radio(controls.choices_of(LESSONS), value=FIRST, label="Lesson", info="What the racers differ in")
        self.control("lesson", lesson, guess=NONE)  # whoever opens one is asked first
        self.control("device", gr.Radio([], label="Recorded on", visible=False))
        with gr.Row(elem_classes="run-row"):
            self.panel("go", gr.Button("Race here", variant="primary", scale=0, min_width=160))
            self.panel("stop", gr.Button("Stop", scale=0, min_width=110, interactive=False))
        self.control("task", gr.Radio(controls.choices_of(TASKS), value=tasks.DEFAULT, label="Task"))
        values = gr.Dropdown(
            [], multiselect=True, allow_custom_value=True, label="Racers", info=asked_for(LESSONS[FIRST])
        )
        self.control("values", values)
        self.control("steps", controls.text("steps"))
        with gr.Accordion("More settings", open=False):
            info = "Of training for each, instead of steps"
            self.control("seconds", gr.Textbox(label="Seconds", placeholder="none", max_lines=1, info=info))
            info = "Runs of each, to see the spread"
            self.control("seeds", gr.Textbox(label="Seeds", placeholder="1", max_lines=1, info=info))
        self.panel("settings", controls.note())

    def _pictures(self) -> None:
        self.panel("problem", controls.problem())
        self.panel("sentence", controls.sentence(""))
        self.control("guess", gr.Radio([], label=LESSONS[FIRST].question, elem_classes="guess"))
        self.panel("told", gr.HTML(min_height=28))
        self.panel("bar", gr.HTML(min_height=44))
        with gr.Row():
            self.panel("back", gr.Button("Show the recorded race", size="sm", visible=False, scale=0, min_width=230))
        with gr.Column() as result:
            with gr.Row(elem_classes="panes"):
                with gr.Column(scale=3):
                    label = "The held-out score of each racer, with 95% intervals"
                    self.panel("scores", controls.plot(None, label))
                with gr.Column(scale=2):
                    self.panel("losses", controls.plot(None, "Training loss of each racer by step"))
            self.panel("tested", gr.HTML())
            gr.HTML("<h3>The board</h3>", js_on_load=None)
            self.panel(
                "board", gr.HTML({"html": "", "csv": ""}, html_template=TOOLBAR + "${value.html}", js_on_load=BOARD)
            )
        self.panel("result", result)

    # --- what the settings show

    def check(self, asked: Asked) -> None:
        lesson, guess = LESSONS[asked["lesson"]], asked["guess"]
        if asked["device"] and asked["device"] not in (known := [key for _, key in races.devices(lesson.key)]):
            raise SpecError(f"device={asked['device']}: no such recording; {closest(asked['device'], known)}")
        if guess not in (known := [*lesson.options, SHOW, NONE]):
            raise SpecError(f"guess={guess}: no answer to the question; {closest(guess, known)}")
        settings_line(here(asked.spec))  # refuses what cannot run
        if asked["values"] is not None:
            racers(asked.spec, lesson, asked["values"])

    def fill(self, asked: Asked) -> dict[str, Any]:
        lesson, spec = LESSONS[asked["lesson"]], here(asked.spec)
        places, values = races.devices(lesson.key), asked["values"]
        options, guess = [*lesson.options, SHOW], asked["guess"]
        return {
            "lesson": lesson.key,
            "device": gr.update(
                choices=places, value=races.recorded(lesson.key, asked["device"]).device, visible=len(places) > 1
            ),
            "values": gr.update(
                choices=suited(lesson, spec),
                value=list(lesson.values if values is None else values),
                info=asked_for(lesson),
            ),
            "guess": gr.update(
                choices=[(o, o) for o in options], label=lesson.question, value=None if guess == NONE else guess
            ),
            "task": spec.task or tasks.DEFAULT,
            **{name: controls.blank(value) for name in ("seconds", "seeds") for value in [asked[name]]},
            "steps": controls.blank(spec.steps),
        }

    def draw(self, asked: Asked) -> dict[str, Draw]:
        lesson, job = LESSONS[asked["lesson"]], self.race_of(asked)
        standing = job if job and self.raced[job.id] == lesson.key else None
        parts = self._buttons(job) | {
            "settings": settings_line(here(asked.spec)),
            "back": gr.update(visible=bool(standing and standing.over)),
            **self._shown(asked, lesson, standing),
        }
        return {name: partial(parts.get, name) for name in parts}

    def _buttons(self, job: jobs.Job | None) -> dict[str, Any]:
        racing = job is not None and not job.over
        stopping = racing and job is not None and job.stopping
        go = "Racing" if racing else "Race again" if job else "Race here"
        return {
            "go": gr.update(interactive=not racing, value=go),
            "stop": gr.update(interactive=racing and not stopping, value="Stopping" if stopping else "Stop"),
        }

    def _shown(self, asked: Asked, lesson: Lesson, job: jobs.Job | None) -> dict[str, Any]:
        """The race here once it has begun; the recorded one until then, but nothing of it before a guess."""
        record, guess = races.recorded(lesson.key, asked["device"]), asked["guess"]
        told = "" if guess == NONE else races.revealed(lesson, record.lines, None if guess == SHOW else guess)
        parts = {"told": told, "result": gr.update(visible=guess != NONE)}
        bar = ""
        if job:
            events = list(job.events)
            found = races.so_far(events)
            bar = failure(events) or races.status(events, found, jobs.ahead(job))
            if found.lines:
                live = races.live_picture(job, len(events), lesson.key, asked["sort"])
                return parts | live | {"bar": bar, "result": gr.update(visible=True)}
        bar += races.provenance(record, "Until yours begins, this stands below. " if job and not job.over else "")
        if guess == NONE:
            return parts | {"bar": bar, "sentence": "A guess first, then what was recorded."}
        return (
            parts
            | {"bar": bar + races.elsewhere(lesson, record)}
            | races.recorded_picture(lesson.key, record.device, asked["sort"])
        )

    def again(self, asked: Asked) -> float | None:
        job = self.race_of(asked)
        return 0.5 if job and not job.over else None

    # --- what the presses do

    def race_of(self, asked: Asked) -> jobs.Job | None:
        """The race that was started from this browser, the one under way first."""
        running = jobs.running(asked.visitor)
        job = running if running and running.id in self.raced else jobs.find(str(asked.kept.get("race") or ""))
        return job if job and job.id in self.raced else None

    def begin(self, asked: Asked) -> Iterator[Mapping[str, Any]]:
        """Starts a race; a second press finds the one that is under way."""
        job = self.race_of(asked)
        if job is None or job.over:
            lesson = LESSONS[asked["lesson"]]
            field = racers(asked.spec, lesson, asked["values"])
            seeds, seconds = asked["seeds"] or 1, asked["seconds"]
            job = jobs.start(field[0].spec, asked.visitor, lambda spec, out: RACE(field, out, seeds, seconds))
            self.raced[job.id] = lesson.key
        yield {"kept": {"race": job.id}}

    def halt(self, asked: Asked) -> Iterator[Mapping[str, Any]]:
        job = self.race_of(asked)
        if job and not job.over:
            job.stop()
            yield {"stop": gr.update(interactive=False, value="Stopping"), "kept": {"race": job.id}}

    def put_away(self, asked: Asked) -> Iterator[Mapping[str, Any]]:
        """The recorded race takes the place of a race that is over."""
        yield {"kept": {"race": ""}}


def asked_for(lesson: Lesson) -> str:
    """What the racers may be, and the licences of models among them."""
    models = lesson.values if lesson.setting == "model" else ()
    return f"Two or more of: {lesson.name.lower()}.{''.join(map(terms, models))}"


def suited(lesson: Lesson, spec: RunSpec) -> list[tuple[str, str]]:
    """What may race, by name."""
    if lesson.setting == "method":
        model = here(spec).model or DEFAULT
        return [(entry.name, key) for key, entry in METHODS.items() if not why_not(key, model)]
    if lesson.setting == "target_modules":
        return list(methods.TARGETS)
    if lesson.setting == "model":
        return runnable()
    recorded_ones = (str(line.spec[lesson.setting]) for r in lesson.recordings() for line in r.lines)
    known = {float(value): value for value in (*recorded_ones, *lesson.values)}  # 3e-4 and 0.0003 are one
    return [(known[number], known[number]) for number in sorted(known)]


if __name__ == "__main__":
    store.run_alone(Race())
