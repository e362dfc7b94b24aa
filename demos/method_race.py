"""Tab 6, which one? Lessons from recorded races, the lectures' statements put to the test, the same race run here."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos.live_finetune import buttons, here, note, own, runnable
from demos.page import choice, controls, methods, served, store
from demos.page.gpu import on_job
from demos.page.tab import QUIET, Asked, Tab, Values
from peftlab import RunSpec, SpecError, race, resolve
from peftlab.count import why_not
from peftlab.data.tasks import DEFAULT, TASKS
from peftlab.lectures.lessons import LESSONS, Lesson
from peftlab.methods import METHODS
from peftlab.resolve import METHOD_SETTINGS
from peftlab.room import jobs, quota, rooms
from peftlab.show import races, refusals, settings
from peftlab.spec import Json, closest

FIRST = next(iter(LESSONS))
SHOW, NONE = "show me", "none"
"""What stands in the place of a guess: the result is shown without one, or is hidden until there is one."""
MOST, MOST_SEEDS = 24, 5
"""The most racers of one race here, and runs of each."""
BOARD = """
element.addEventListener('click', (e) => {
  const [sort, csv] = ['sort', 'csv'].map((name) => e.target.closest(`[data-${name}]`));
  if (sort) peftlab.write({sort: sort.dataset.sort});
  if (csv) {
    const file = Object.assign(document.createElement('a'), {download: 'peftlab-race.csv'});
    file.href = URL.createObjectURL(new Blob([props.value.csv], {type: 'text/csv'}));
    file.click();
    URL.revokeObjectURL(file.href);
  }
});
"""
CLOSED = "() => { document.querySelectorAll('.controls.open').forEach((e) => e.classList.remove('open')); }"
"""Closes a phone's drawer, so that the race that was started is seen."""
TOOLBAR = (
    '<div class="toolbar"><button type="button" class="small-button" data-csv>Download CSV</button>'
    '<button type="button" class="small-button" data-copy>Copy link</button>'
    "<small>Press a column's name to sort by it.</small></div>"
)
on_job("race")


def racers(spec: RunSpec, lesson: Lesson, values: Sequence[str] | None = None) -> list[race.Racer]:
    """The racers of a race here: one for each of `values`, by default the lesson's own. Raises SpecError."""
    base, values = here(spec), lesson.values if values is None else values
    method, said = METHODS[resolve(base).method], ";".join(values)[:80] or NONE
    if not 2 <= len(values) <= MOST:
        raise SpecError(f"values={said}: a race here takes 2 to {MOST} racers, not {len(values)}; name others")
    if lesson.setting == "method" or (lesson.setting in METHOD_SETTINGS and lesson.setting not in method.settings):
        plain = dict.fromkeys([*METHOD_SETTINGS, "method", "learning_rate", "quantization"])
        base = RunSpec.from_dict({**base.to_dict(), **plain})
    offered = [key for _, key in runnable()]
    for model in values if lesson.setting == "model" else ():
        if model not in offered:
            raise SpecError(f"values={model}: no model that trains here; {closest(model, offered)}")
    try:
        return race.along(base, {lesson.setting: values})
    except SpecError as error:
        raise SpecError(f"values={said}: {error}") from None


class Race(Tab):
    """Lessons from recorded races, and the same race run here."""

    key, title = "race", "Race"
    choices = {
        "lesson": choice.one_of("lesson", FIRST, LESSONS),
        "device": choice.words("device", most=100),
        "sort": choice.one_of("sort", "score", race.BY_KEY),
        "values": choice.Choice(None, lambda text: () if text == "none" else tuple(text.split(";"))),
        "seconds": choice.number("seconds", None, 0.1, 600, whole=False),
        "seeds": choice.number("seeds", None, 1, MOST_SEEDS),
        "guess": choice.words("guess", SHOW, most=100),
    }
    clears = {"lesson": ("device", "values", "seconds", "seeds", "guess")}

    def build(self) -> None:
        super().build()
        self.go.click(None, None, None, js=CLOSED, **QUIET)
        self.press([self.go.click], self.begin, ["kept"], begins=True)
        self.press([self.stop.click], self.halt, ["stop", "kept"])
        self.press([self.cancel.click], self.drop, ["kept"])
        self.press([self.resume.click], self.go_on, ["kept"], begins=True)
        self.press([self.back.click], self.put_away, ["kept"])

    def settings(self) -> None:
        lesson = gr.Radio(controls.choices_of(LESSONS), value=FIRST, label="Lesson", info="What the racers differ in")
        self.control("lesson", lesson, guess=NONE)  # whoever opens a lesson is asked for a guess first
        self.control("device", gr.Radio([], label="Recorded on", visible=False))
        with gr.Row(elem_classes="run-row"):
            self.go = self.panel("go", gr.Button("Race here", variant="primary", scale=0, min_width=160))
            self.stop = self.panel("stop", gr.Button("Stop", scale=0, min_width=110, interactive=False))
            self.cancel = self.panel("cancel", gr.Button("Cancel", visible=False, scale=0, min_width=110))
            self.resume = self.panel("resume", gr.Button("Resume", visible=False, scale=0, min_width=110))
        self.cost()
        self.control("task", gr.Radio(controls.choices_of(TASKS), value=DEFAULT, label="Task"))
        info = asked_for(LESSONS[FIRST])
        values = gr.Dropdown([], multiselect=True, allow_custom_value=True, label="Racers", info=info)
        self.control("values", values)
        self.control("steps", controls.setting("steps"))
        with gr.Accordion("More settings", open=False):
            info = "Of training for each, instead of steps"
            self.control("seconds", gr.Textbox(label="Seconds", placeholder="none", max_lines=1, info=info))
            info = "Runs of each, to see the spread"
            self.control("seeds", gr.Textbox(label="Seeds", placeholder="1", max_lines=1, info=info))
        self.panel("settings", controls.note())

    def pictures(self) -> None:
        self.panel("problem", controls.problem())
        self.panel("sentence", controls.sentence())
        self.control("guess", gr.Radio([], label=LESSONS[FIRST].question, elem_classes="guess"))
        self.panel("told", gr.HTML(min_height=28))
        self.panel("bar", gr.HTML(min_height=44))
        with gr.Row():
            back = gr.Button("Show the recorded race", size="sm", visible=False, scale=0, min_width=230)
            self.back = self.panel("back", back)
        with gr.Column() as result:
            with gr.Row(elem_classes="panes"):
                with gr.Column(scale=3):
                    self.panel("scores", controls.plot(None, "The held-out score of each racer, with 95% intervals"))
                with gr.Column(scale=2):
                    self.panel("losses", controls.plot(None, "Training loss of each racer by step"))
            self.panel("tested", gr.HTML())
            gr.HTML("<h3>The board</h3>", js_on_load=None)
            none = {"html": "", "csv": ""}
            self.panel("board", gr.HTML(none, html_template=TOOLBAR + "${value.html}", js_on_load=BOARD))
        self.panel("result", result)

    def check(self, asked: Asked) -> None:
        lesson, guess = LESSONS[asked["lesson"]], asked["guess"]
        if asked["device"] and asked["device"] not in (known := [key for _, key in races.devices(lesson.key)]):
            raise SpecError(f"device={asked['device']}: no such recording; {closest(asked['device'], known)}")
        if guess not in (known := [*lesson.options, SHOW, NONE]):
            raise SpecError(f"guess={guess}: no answer to the question; {closest(guess, known)}")
        settings.settings_line(here(asked.spec))  # refuses what cannot run
        if asked["values"] is not None:
            racers(asked.spec, lesson, asked["values"])

    def fill(self, asked: Asked) -> dict[str, object]:
        lesson, spec = LESSONS[asked["lesson"]], here(asked.spec)
        devices, device = races.devices(lesson.key), races.recorded(lesson.key, asked["device"]).device
        values = list(lesson.values if asked["values"] is None else asked["values"])
        options = [(option, option) for option in [*lesson.options, SHOW]]
        guess = None if asked["guess"] == NONE else asked["guess"]
        return {
            "lesson": lesson.key,
            "device": gr.update(choices=devices, value=device, visible=len(devices) > 1),
            "values": gr.update(choices=suited(lesson, spec), value=values, info=asked_for(lesson)),
            "guess": gr.update(choices=options, label=lesson.question, value=guess),
            "task": asked.run.task,
            "steps": controls.blank(spec.steps),
            **{name: controls.blank(asked[name]) for name in ("seconds", "seeds")},
        }

    def costs(self, asked: Asked) -> dict[str, quota.Asks]:
        return {"Race here": quota.of_job("race", self.arguments(asked))}

    def draw(self, asked: Asked) -> Values:
        lesson, job = LESSONS[asked["lesson"]], self.job(asked)
        standing = job if job and job.arguments["lesson"] == lesson.key else None
        return {
            **buttons(job, "Race here", "Racing", "Race again", "Stop"),
            "settings": note(asked.spec),
            "back": gr.update(visible=bool(standing and standing.over)),
            **self._shown(asked, lesson, standing),
        }

    def _shown(self, asked: Asked, lesson: Lesson, job: jobs.Job | None) -> Values:
        """What the panels show of a race here once it has begun; before, the recorded one, hidden until a guess."""
        record, guess = races.recorded(lesson.key, asked["device"]), asked["guess"]
        told = "" if guess == NONE else races.revealed(lesson, record.lines, None if guess == SHOW else guess)
        parts = {"told": told, "result": gr.update(visible=guess != NONE)}
        bar, events = self.lost(asked), list(job.events) if job else []
        if job:
            lines = races.so_far(events)
            bar = refusals.failure(events) or races.status(events, lines, rooms.here().ahead(job))
            if lines:
                live = races.live_picture(job, len(events), lesson.key, asked["sort"])
                return parts | live | {"bar": bar, "result": gr.update(visible=True)}
        bar += races.provenance(record, "Until yours begins, this stands below. " if job and not job.over else "")
        if guess == NONE:
            return parts | {"bar": bar, "sentence": "A guess first, then what was recorded."}
        recorded = races.recorded_picture(lesson.key, record.device, asked["sort"])
        return parts | recorded | {"bar": bar + races.elsewhere(lesson, record)}

    def job(self, asked: Asked) -> jobs.Job | None:
        """The race that was started from this browser, the one under way first."""
        running = rooms.here().running(asked.visitor)
        job = running if running and running.kind == "race" else own(rooms.here().find(asked.kept.get("race")), asked)
        return job if job and job.kind == "race" else None

    def lost(self, asked: Asked) -> str:
        """What is said where the race of this browser is not here any more."""
        had = asked.kept.get("race")
        return served.gone("Your last race") if had and not rooms.here().find(had) else ""

    def begin(self, asked: Asked) -> Iterator[Values]:
        """Starts a race; a second press finds the one that is under way."""
        job = self.job(asked)
        if job is None or job.over:
            job = rooms.here().start("race", self.arguments(asked), asked.visitor, asked.first)
        yield {"kept": {"race": job.id}}

    def arguments(self, asked: Asked) -> Json:
        """Those of the race that a press begins."""
        lesson = LESSONS[asked["lesson"]]
        field = racers(asked.spec, lesson, asked["values"])
        return {
            "spec": field[0].spec.to_dict(),
            "racers": [(racer.name, racer.spec.to_dict()) for racer in field],
            "seeds": asked["seeds"] or 1,
            "seconds": asked["seconds"],
            "lesson": lesson.key,
        }

    def halt(self, asked: Asked) -> Iterator[Values]:
        job = self.job(asked)
        if job and not job.over:
            job.stop()
            yield {"stop": gr.update(interactive=False, value="Stopping"), "kept": {"race": job.id}}

    def drop(self, asked: Asked) -> Iterator[Values]:
        if job := self.job(asked):
            job.cancel()
            yield {"kept": {"race": job.id}}

    def go_on(self, asked: Asked) -> Iterator[Values]:
        """Lets a race that ended early go on with the runs that are still to come."""
        if job := self.job(asked):
            if job.over:  # a second press finds it under way
                rooms.here().resume(job)
            yield {"kept": {"race": job.id}}

    def put_away(self, asked: Asked) -> Iterator[Values]:
        """Shows the recorded race again, in the place of one that is over."""
        yield {"kept": {"race": ""}}


def asked_for(lesson: Lesson) -> str:
    """What the racers may be, and the licences of models among them."""
    models = lesson.values if lesson.setting == "model" else ()
    return f"Two or more of: {lesson.name.lower()}.{''.join(map(settings.terms, models))}"


def suited(lesson: Lesson, spec: RunSpec) -> list[tuple[str, str]]:
    """Names and values of what may race."""
    if lesson.setting == "method":
        model = resolve(here(spec)).model
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
