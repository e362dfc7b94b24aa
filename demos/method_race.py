"""Tab 6, which one? Lessons from recorded races, what the lectures claim put to the test, and the same race run here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import choice, methods, page
from demos.gpu import on_gpu
from demos.live_finetune import here, runnable
from demos.tab import QUIET, Asked, Draw, Tab
from peftlab import RunSpec, SpecError, figures, jobs, race, race_figures, scores, tasks, words
from peftlab.catalog.models import DEFAULT
from peftlab.lessons import LESSONS, Lesson
from peftlab.methods import METHODS
from peftlab.race import Line
from peftlab.recordings import Board, Recording
from peftlab.resolve import METHOD_SETTINGS
from peftlab.spec import closest
from peftlab.tasks import METRICS, TASKS

FIRST = next(iter(LESSONS))
SHOW, NONE = "show me", "none"
"""Instead of a guess: the result in the open, and hidden until there is a guess."""
MOST = 24
"""Racers of one race here."""
MOST_SEEDS = 5

RACE = on_gpu(race.race)  # at import, because a shared GPU wants to know its functions before the page is up

Events = Sequence[dict[str, Any]]


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


def board(lines: Sequence[Line], sort: str) -> dict[str, str]:
    """The board as the page holds it: a table to look at, and the same as CSV."""
    lines = race.ranked(lines, sort)
    columns = [c for c in race.COLUMNS if c.key not in ("low", "high") and any(c.of(x) is not None for x in lines)]
    head = "".join(_head(c, sort) for c in columns)
    rows = "".join(_row(line, columns) for line in lines)
    return {
        "html": f'<div class="wide"><table class="data board"><thead><tr><th>racer</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
        "csv": race.to_csv(lines),
    }


def _head(column: race.Column, sort: str) -> str:
    chosen = column.key == sort
    order = ' aria-sort="descending"' if chosen and column.high_is_good else ' aria-sort="ascending"' if chosen else ""
    unit = f"<small>{page.explained(escape(column.unit))}</small>" if column.unit and column.unit != "bytes" else ""
    return f'<th{order}><button type="button" data-sort="{column.key}">{escape(column.title)}</button>{unit}</th>'


def _row(line: Line, columns: Sequence[race.Column]) -> str:
    cells = "".join(f"<td>{_cell(line, c)}</td>" for c in columns)
    why = f'<br><span class="bad">{escape(line.error)}</span>' if line.error else ""
    return f'<tr><td class="racer"><b>{escape(line.name)}</b>{why}</td>{cells}</tr>'


def _cell(line: Line, column: race.Column) -> str:
    value = column.of(line)
    if value is None:
        return ""
    if column.key == "score":
        return f"<b>{words.score(value)}</b><br><small>{' to '.join(map(words.score, line.interval))}</small>"
    if column.unit == "bytes":
        return words.size(value)
    if column.key == "trainable_parameters":
        return f"{value:,}<br><small>{words.percent(line.trainable_percent / 100)}</small>"
    if column.key == "training_seconds":
        return words.seconds(value)
    return (
        f"{value:.2f}×" if column.unit.startswith("×") else f"{value:.2f}" if isinstance(value, float) else str(value)
    )


def findings(lesson: Lesson, lines: Sequence[Line]) -> str:
    """What the lectures claim, what these lines say to it, and whether it holds here."""
    rows = ""
    for claim, found in lesson.findings(lines):
        if found is None:
            continue
        verdict = (
            '<span class="good">holds here</span>' if found.holds else '<span class="bad">does not hold here</span>'
        )
        rows += (
            f"<tr><td>{escape(claim.says)}<br><small>{escape(claim.source)}</small></td>"
            f"<td>{escape(found.text)}</td><td>{verdict}</td></tr>"
        )
    head = "<tr><th>What the lectures claim</th><th>in this race</th><th></th></tr>"
    return page.explained(f'<table class="data findings">{head}{rows}</table>') if rows else ""


def provenance(recording: Recording, before: str = "") -> str:
    """Where and when a race was recorded, after the words `before`."""
    libraries = ", ".join(f"{name} {version}" for name, version in recording.versions.items())
    tip = (
        f"{recording.hardware}, {recording.date}, {libraries}. {' '.join(f'Command: {c}' for c in recording.commands)}"
    )
    fewest, most = recording.seeds
    seeds = "1 seed" if most == 1 else f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    said = f"Recorded on {escape(recording.hardware)}, {len(recording.lines)} racers, {seeds} each."
    return f'<div class="status"><span>{page.how("measured", tip)} {before}{said}</span></div>'


def elsewhere(lesson: Lesson, recording: Recording) -> str:
    """Why other tabs have another score of the method that all of them show first."""
    line = next((x for x in recording.lines if x.spec["method"] == "lora" and x.scores), None)
    if line is None or lesson.setting != "method":
        return ""
    said = escape(scores.elsewhere(scores.of_line(line, recording.hardware)))
    return f'<div class="note"><b>{escape(line.name)}</b>: {words.score(line.score)} here. {said}</div>'


def picture(lesson: Lesson, lines: Sequence[Line], sort: str) -> dict[str, Any]:
    """What is seen of any race, recorded or live, by panel."""
    metric = METRICS[tasks.find(lines[0].spec["task"]).metric].name
    steps = max([len(losses) for line in lines for losses in line.losses] + [lines[0].spec["steps"] or 1])
    finished = [line for line in lines if line.scores]
    return {
        "sentence": words.race_sentence(lines),
        "scores": figures.themed(race_figures.scores, finished, lesson.setting, metric),
        "losses": figures.themed(race_figures.curves, lines, steps),
        "tested": findings(lesson, lines),
        "board": board(lines, sort),
    }


@lru_cache(maxsize=64)
def recorded_picture(key: str, device: str, sort: str) -> dict[str, Any]:
    return picture(LESSONS[key], recorded(key, device).lines, sort)


@dataclass(frozen=True)
class SoFar:
    """A race as far as its events tell."""

    lines: list[Line]
    """None before it begins."""
    running: dict[int, list[float]]
    """By racer, the losses of a run that is not in its line yet."""
    last: dict[str, Any]
    """The last event of the run under way."""

    def with_running(self) -> list[Line]:
        """The lines, and in them the losses of what is under way."""
        return [
            replace(line, losses=[*line.losses, self.running[i]]) if i in self.running else line
            for i, line in enumerate(self.lines)
        ]


def so_far(events: Events) -> SoFar:
    lines: list[Line] = []
    running: dict[int, list[float]] = {}
    last: dict[str, Any] = {}
    for event in events:
        if event["type"] in ("racers", "done"):
            lines = [Line(**line) for line in event["lines"]]
        elif event["type"] == "line":
            lines[event["racer"]] = Line(**event["line"])
            if not event["line"]["error"]:
                running.pop(event["racer"], None)
        elif event["type"] == "run":
            last = event
            if event["event"]["type"] == "step":
                running.setdefault(event["racer"], []).append(event["event"]["loss"])
    return SoFar(lines, running, last)


@lru_cache(maxsize=32)
def live_picture(job: jobs.Job, seen: int, key: str, sort: str) -> dict[str, Any]:
    """The same of a race here, of its first `seen` events; findings are of what has finished."""
    found = so_far(job.events[:seen])
    return picture(LESSONS[key], found.with_running(), sort) | {"tested": findings(LESSONS[key], found.lines)}


def status(events: Events, found: SoFar, ahead: int = 0) -> str:
    """Who runs, how far the race is, with a bar; before it begins, how many are `ahead`."""
    lines, last = found.lines, found.last
    seeds = next((e["seeds"] for e in events if e["type"] == "racers"), 1)
    over = sum(len(line.scores) if not line.error else seeds for line in lines)
    share, what = over / (seeds * len(lines)) if lines else 0.0, ""
    if events and events[-1]["type"] == "done":
        ended = "Stopped; what has finished stands." if events[-1]["stopped"] else "Done."
        share, what = 1.0, f"{ended} Run here, live."
    elif last:
        step = last["event"].get("step")
        what = lines[last["racer"]].name + (f", step {step}" if last["event"]["type"] == "step" else "")
    elif events and events[-1]["type"] == "queued" and ahead:
        what = f"Waiting: {ahead} ahead of yours"
    return (
        f'<div class="status"><span>{over} of {seeds * len(lines)} runs</span><span>{escape(what)}</span></div>'
        f'<div class="progress" role="progressbar" aria-label="race" aria-valuenow="{100 * share:.0f}">'
        f'<div style="width:{100 * share:.1f}%"></div></div>'
    )


def recorded(key: str, device: str = "") -> Recording:
    found = LESSONS[key].recordings()
    return next((r for r in found if r.device == device), found[0])


def devices(key: str) -> list[tuple[str, str]]:
    return [(r.hardware, r.device) for r in LESSONS[key].recordings()]


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
        with gr.Row(elem_classes="stage"):
            with page.controls():
                self._settings()
            with gr.Column(elem_classes="main"):
                self._pictures()
        self.panels["go"].click(None, None, None, js=CLOSED, **QUIET)
        self.press(self.panels["go"], self.begin, ["kept"])
        self.press(self.panels["stop"], self.halt, ["stop", "kept"])
        self.press(self.panels["back"], self.put_away, ["kept"])

    def _settings(self) -> None:
        page.drawer_handle()
        lesson = gr.Radio(page.choices_of(LESSONS), value=FIRST, label="Lesson", info="What the racers differ in")
        self.control("lesson", lesson, guess=NONE)  # whoever opens one is asked first
        self.control("device", gr.Radio([], label="Recorded on", visible=False))
        with gr.Row(elem_classes="run-row"):
            self.panel("go", gr.Button("Race here", variant="primary", scale=0, min_width=160))
            self.panel("stop", gr.Button("Stop", scale=0, min_width=110, interactive=False))
        self.control("task", gr.Radio(page.choices_of(TASKS), value=tasks.DEFAULT, label="Task"))
        values = gr.Dropdown(
            [], multiselect=True, allow_custom_value=True, label="Racers", info=asked_for(LESSONS[FIRST])
        )
        self.control("values", values)
        self.control("steps", page.text("steps"))
        with gr.Accordion("More settings", open=False):
            info = "Of training for each, instead of steps"
            self.control("seconds", gr.Textbox(label="Seconds", placeholder="none", max_lines=1, info=info))
            info = "Runs of each, to see the spread"
            self.control("seeds", gr.Textbox(label="Seeds", placeholder="1", max_lines=1, info=info))
        self.panel("settings", page.note())

    def _pictures(self) -> None:
        self.panel("problem", page.problem())
        self.panel("sentence", page.sentence(""))
        self.control("guess", gr.Radio([], label=LESSONS[FIRST].question, elem_classes="guess"))
        self.panel("told", gr.HTML(min_height=28))
        self.panel("bar", gr.HTML(min_height=44))
        with gr.Row():
            self.panel("back", gr.Button("Show the recorded race", size="sm", visible=False, scale=0, min_width=230))
        with gr.Column() as result:
            with gr.Row(elem_classes="panes"):
                with gr.Column(scale=3):
                    label = "The held-out score of each racer, with 95% intervals"
                    self.panel("scores", page.plot(None, label))
                with gr.Column(scale=2):
                    self.panel("losses", page.plot(None, "Training loss of each racer by step"))
            self.panel("tested", gr.HTML())
            gr.HTML("<h3>The board</h3>", js_on_load=None)
            self.panel(
                "board", gr.HTML({"html": "", "csv": ""}, html_template=TOOLBAR + "${value.html}", js_on_load=BOARD)
            )
        self.panel("result", result)

    # --- what the settings show

    def check(self, asked: Asked) -> None:
        lesson, guess = LESSONS[asked["lesson"]], asked["guess"]
        if asked["device"] and asked["device"] not in (known := [key for _, key in devices(lesson.key)]):
            raise SpecError(f"device={asked['device']}: no such recording; {closest(asked['device'], known)}")
        if guess not in (known := [*lesson.options, SHOW, NONE]):
            raise SpecError(f"guess={guess}: no answer to the question; {closest(guess, known)}")
        page.settings_line(here(asked.spec))  # refuses what cannot run
        if asked["values"] is not None:
            racers(asked.spec, lesson, asked["values"])

    def fill(self, asked: Asked) -> dict[str, Any]:
        lesson, spec = LESSONS[asked["lesson"]], here(asked.spec)
        places, values = devices(lesson.key), asked["values"]
        options, guess = [*lesson.options, SHOW], asked["guess"]
        return {
            "lesson": lesson.key,
            "device": gr.update(
                choices=places, value=recorded(lesson.key, asked["device"]).device, visible=len(places) > 1
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
            **{name: page.blank(value) for name in ("seconds", "seeds") for value in [asked[name]]},
            "steps": page.blank(spec.steps),
        }

    def draw(self, asked: Asked) -> dict[str, Draw]:
        lesson, job = LESSONS[asked["lesson"]], self.race_of(asked)
        standing = job if job and self.raced[job.id] == lesson.key else None
        parts = self._buttons(job) | {
            "settings": page.settings_line(here(asked.spec)),
            "back": gr.update(visible=bool(standing and standing.over)),
            **self._shown(asked, lesson, standing),
        }
        return {name: lambda value=value: value for name, value in parts.items()}

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
        record, guess = recorded(lesson.key, asked["device"]), asked["guess"]
        told = "" if guess == NONE else revealed(lesson, record.lines, guess)
        parts = {"told": told, "result": gr.update(visible=guess != NONE)}
        bar = ""
        if job:
            events = list(job.events)
            found, last = so_far(events), events[-1]
            failed = f'<div class="problem">{escape(last["message"])}</div>' if last["type"] == "error" else ""
            bar = failed or status(events, found, jobs.ahead(job))
            if found.lines:
                live = live_picture(job, len(events), lesson.key, asked["sort"])
                return parts | live | {"bar": bar, "result": gr.update(visible=True)}
        bar += provenance(record, "Until yours begins, this stands below. " if job and not job.over else "")
        if guess == NONE:
            return parts | {"bar": bar, "sentence": "A guess first, then what was recorded."}
        return (
            parts
            | {"bar": bar + elsewhere(lesson, record)}
            | recorded_picture(lesson.key, record.device, asked["sort"])
        )

    def again(self, asked: Asked) -> float | None:
        job = self.race_of(asked)
        return 0.5 if job and not job.over else None

    # --- what the presses do

    def race_of(self, asked: Asked) -> jobs.Job | None:
        """The race that was started from this browser, the one under way first."""
        running = jobs.running(owner(asked))
        job = running if running and running.id in self.raced else jobs.find(str(asked.kept.get("race") or ""))
        return job if job and job.id in self.raced else None

    def begin(self, asked: Asked) -> Iterator[Mapping[str, Any]]:
        """Starts a race; a second press finds the one that is under way."""
        job = self.race_of(asked)
        if job is None or job.over:
            lesson = LESSONS[asked["lesson"]]
            field = racers(asked.spec, lesson, asked["values"])
            seeds, seconds = asked["seeds"] or 1, asked["seconds"]
            job = jobs.start(field[0].spec, owner(asked), lambda spec, out: RACE(field, out, seeds, seconds))
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


def owner(asked: Asked) -> str:
    return str(asked.kept.get("visitor") or "")


def asked_for(lesson: Lesson) -> str:
    """What the racers may be, and the licences of models among them."""
    models = lesson.values if lesson.setting == "model" else ()
    return f"Two or more of: {lesson.name.lower()}.{''.join(map(page.terms, models))}"


def suited(lesson: Lesson, spec: RunSpec) -> list[tuple[str, str]]:
    """What may race, by name."""
    if lesson.setting == "method":
        model = here(spec).model or DEFAULT
        return [(entry.name, key) for key, entry in METHODS.items() if not methods.why_not(key, model)]
    if lesson.setting == "target_modules":
        return list(methods.TARGETS)
    if lesson.setting == "model":
        return runnable()
    known = {str(line.spec[lesson.setting]) for r in lesson.recordings() for line in r.lines} | set(lesson.values)
    return [(value, value) for value in sorted(known, key=float)]


def revealed(lesson: Lesson, lines: Sequence[Line], guess: str) -> str:
    """The answer to a lesson's question, beside what was guessed."""
    try:
        answer = lesson.options[lesson.answer(Board(lines))]
    except LookupError:
        return ""
    right = '<span class="good">As you said</span>' if guess == answer else f"You said {escape(guess)}"
    lead = "" if guess == SHOW else f"{right}. "
    return f"{lead}Here it was: <b>{escape(answer)}</b>."


if __name__ == "__main__":
    page.run_alone(Race())
