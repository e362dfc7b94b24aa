"""Tab 6, which one? Lessons from recorded races, what the lectures claim put to the test, and the same race run here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run alone, a demo finds the backend beside it

from demos import methods, page
from demos.gpu import on_gpu
from demos.live_finetune import here, runnable
from peftlab import RunSpec, SpecError, figures, jobs, lessons, race, race_figures, tasks, words
from peftlab.catalog.models import DEFAULT
from peftlab.lessons import LESSONS, Lesson
from peftlab.methods import METHODS
from peftlab.race import Line
from peftlab.recordings import Board, Recording
from peftlab.resolve import METHOD_SETTINGS
from peftlab.spec import closest
from peftlab.tasks import METRICS, TASKS

TAB = "race"
FIRST = next(iter(LESSONS))
SHOW = "show me"
"""Instead of a guess."""
MOST = 24
"""Racers of one race here."""
MOST_SEEDS = 5

RACE = on_gpu(race.race)  # at import, because a shared GPU wants to know its functions before the page is up

Events = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Choice:
    """What of this tab a link carries, besides the settings."""

    lesson: str = FIRST
    sort: str = "score"
    values: str = ""
    """Of the race to run here, by semicolon; empty for the lesson's own."""
    seconds: str = ""
    seeds: str = ""

    def __post_init__(self) -> None:
        lessons.find(self.lesson)
        race.column(self.sort)
        number(self.seconds, "seconds", 600.0)
        number(self.seeds, "seeds", float(MOST_SEEDS))

    @classmethod
    def read(cls, query: str) -> Choice:
        """Raises SpecError for what is no choice; other words of the query are not its own."""
        given = dict(parse_qsl(query))
        return cls(**{name: given[name] for name in CARRIED if name in given})

    def query(self) -> str:
        usual = Choice()
        return urlencode({n: v for n in CARRIED if (v := getattr(self, n)) != getattr(usual, n)}, safe=",;")

    def racing(self) -> tuple[str, ...]:
        return tuple(self.values.split(";")) if self.values else LESSONS[self.lesson].values


CARRIED = tuple(Choice.__dataclass_fields__)


def number(text: str, name: str, most: float) -> float | None:
    """Raises SpecError for what is no number above 0; None for nothing."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= most:
        raise SpecError(f"{name}={text}: a number above 0 and at most {most:g}; leave it empty for the usual")
    return value


def racers(spec: RunSpec, choice: Choice) -> list[race.Racer]:
    """Those of a race run here. Raises SpecError."""
    lesson, base = LESSONS[choice.lesson], here(spec)
    method = METHODS[base.method or "lora"]
    if lesson.setting == "method" or (lesson.setting in METHOD_SETTINGS and lesson.setting not in method.settings):
        plain = dict.fromkeys([*METHOD_SETTINGS, "method", "learning_rate", "quantization"])
        base = RunSpec.from_dict({**base.to_dict(), **plain})
    for model in choice.racing() if lesson.setting == "model" else ():
        if model not in (offered := [key for _, key in runnable()]):
            raise SpecError(f"model={model}: no model that trains here; {closest(model, offered)}")
    found = race.along(base, {lesson.setting: choice.racing()})
    if len(found) > MOST:
        raise SpecError(f"{len(found)} racers: at most {MOST} run here at a time; take some away")
    return found


BOARD = """
element.addEventListener('click', (e) => {
  const sort = e.target.closest('[data-sort]'), csv = e.target.closest('[data-csv]'), link = e.target.closest('[data-link]');
  if (sort) { props.value = {...props.value, sort: sort.dataset.sort}; trigger('input'); }
  if (csv) {
    const file = Object.assign(document.createElement('a'), {download: 'peftlab-race.csv'});
    file.href = URL.createObjectURL(new Blob([props.value.csv], {type: 'text/csv'}));
    file.click();
    URL.revokeObjectURL(file.href);
  }
  if (link) navigator.clipboard.writeText(location.href).then(() => { link.textContent = 'Copied'; });
});
"""


CLOSED = "() => { document.querySelectorAll('.controls.open').forEach((e) => e.classList.remove('open')); return ''; }"
"""A phone's drawer, so that what was started is seen; and an old refusal."""
TOOLBAR = (
    '<div class="toolbar"><button type="button" class="small-button" data-csv>Download CSV</button>'
    '<button type="button" class="small-button" data-link>Copy link</button>'
    "<small>Press a column's name to sort by it.</small></div>"
)


def board(lines: Sequence[Line], sort: str, run: str = "") -> dict[str, str]:
    """The board as the page holds it: a table to look at, the same as CSV, the column it is sorted by, and the live run
    that it is of, if any.
    """
    lines = race.ranked(lines, sort)
    columns = [c for c in race.COLUMNS if c.key not in ("low", "high") and any(c.of(x) is not None for x in lines)]
    head = "".join(_head(c, sort) for c in columns)
    rows = "".join(_row(line, columns) for line in lines)
    return {
        "html": f'<div class="wide"><table class="data board"><thead><tr><th>racer</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
        "csv": race.to_csv(lines),
        "sort": sort,
        "run": run,
    }


def _head(column: race.Column, sort: str) -> str:
    chosen = column.key == sort
    order = ' aria-sort="descending"' if chosen and column.high_is_good else ' aria-sort="ascending"' if chosen else ""
    unit = f"<small>{escape(column.unit)}</small>" if column.unit and column.unit != "bytes" else ""
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
    return f'<table class="data findings">{head}{rows}</table>' if rows else ""


def provenance(recording: Recording) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in recording.versions.items())
    tip = (
        f"{recording.hardware}, {recording.date}, {libraries}. {' '.join(f'Command: {c}' for c in recording.commands)}"
    )
    fewest, most = recording.seeds
    seeds = "1 seed" if most == 1 else f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    said = f"Recorded on {escape(recording.hardware)}, {len(recording.lines)} racers, {seeds} each."
    return f'<div class="status"><span>{page.how("measured", tip)} {said}</span></div>'


def picture(lesson: Lesson, lines: Sequence[Line], sort: str, run: str = "") -> tuple:
    """Sentence, scores, losses and board of any race, recorded or live."""
    metric = METRICS[tasks.find(lines[0].spec["task"]).metric].name
    steps = max([len(losses) for line in lines for losses in line.losses] + [lines[0].spec["steps"] or 1])
    finished = [line for line in lines if line.scores]
    return (
        words.race_sentence(lines),
        figures.themed(race_figures.scores, finished, lesson.setting, metric),
        figures.themed(race_figures.curves, lines, steps),
        board(lines, sort, run),
    )


def so_far(events: Events) -> tuple[list[Line], dict[int, list[float]], dict[str, Any]]:
    """Of a race's events: its lines, the losses of runs that are not in them, and the last event of the run under way."""
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
    return lines, running, last


def status(events: Events, lines: Sequence[Line], last: Mapping[str, Any]) -> str:
    """Who runs, how far the race is, with a bar."""
    seeds = next((e["seeds"] for e in events if e["type"] == "racers"), 1)
    over = sum(len(line.scores) if not line.error else seeds for line in lines)
    share, what = over / (seeds * len(lines)) if lines else 0.0, ""
    if events and events[-1]["type"] == "done":
        ended = "Stopped; what has finished stands." if events[-1]["stopped"] else "Done."
        share, what = 1.0, f"{ended} Run here, live."
    elif last:
        step = last["event"].get("step")
        what = lines[last["racer"]].name + (f", step {step}" if last["event"]["type"] == "step" else "")
    elif events and events[-1]["type"] == "queued" and events[-1]["ahead"]:
        what = f"Waiting: {events[-1]['ahead']} ahead of yours"
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


def build(spec: gr.State, current: gr.BrowserState) -> page.View:
    changing = partial(page.changing, TAB)
    first, opening = LESSONS[FIRST], recorded(FIRST)
    start = picture(first, opening.lines, "score")
    choice = gr.Textbox("", visible=False)
    sentence = page.sentence(start[0])
    with gr.Row(elem_classes="stage"):
        with page.controls():
            page.drawer_handle()
            lesson = gr.Radio(page.choices_of(LESSONS), value=FIRST, label="Lesson", info="What the racers differ in")
            device = gr.Radio(
                devices(FIRST), value=opening.device, label="Recorded on", visible=len(devices(FIRST)) > 1
            )
            with gr.Row(elem_classes="run-row"):
                go = gr.Button("Race here", variant="primary", scale=0, min_width=160)
                stop = gr.Button("Stop", scale=0, min_width=110, interactive=False)
            task = gr.Radio(page.choices_of(TASKS), value=tasks.DEFAULT, label="Task")
            values = gr.Dropdown(
                suited(first, page.OPENING), value=list(first.values), multiselect=True, allow_custom_value=True,
                label="Racers", info=asked_for(first),
            )  # fmt: skip
            steps = page.text("steps")
            with gr.Accordion("More settings", open=False):
                seconds = gr.Textbox(
                    label="Seconds", placeholder="none", max_lines=1, info="Of training for each, instead of steps"
                )
                seeds = gr.Textbox(label="Seeds", placeholder="1", max_lines=1, info="Runs of each, to see the spread")
            note = page.note(page.settings_line(here(page.OPENING)))
        with gr.Column(elem_classes="main"):
            problem = page.problem()
            guess = gr.Radio([*first.options, SHOW], label=first.question, value=SHOW, elem_classes="guess")
            told = gr.HTML(revealed(first, opening.lines, SHOW), min_height=28)
            bar = gr.HTML(provenance(opening), min_height=44)
            with gr.Column() as result:
                with gr.Row(elem_classes="panes"):
                    with gr.Column(scale=3):
                        chart = page.plot(start[1], "The held-out score of each racer, with 95% intervals")
                    with gr.Column(scale=2):
                        loss = page.plot(start[2], "Training loss of each racer by step")
                tested = gr.HTML(findings(first, opening.lines))
                gr.HTML("<h3>The board</h3>", js_on_load=None)
                table = gr.HTML(
                    start[3],
                    html_template=TOOLBAR + "${value.html}",
                    js_on_load=BOARD,
                )
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
    mine = [lesson, table, values, seconds, seeds]
    shown = [sentence, told, bar, result, chart, loss, table, tested]
    chosen = [lesson, device, values, seconds, seeds, guess]

    def read(key: str, table: Mapping[str, str], values: list[str], seconds: str | None, seeds: str | None) -> Choice:
        listed = ";".join(map(str, values or ()))
        usual = ";".join(LESSONS[key].values)
        return Choice(
            key, table["sort"], "" if listed == usual else listed, (seconds or "").strip(), (seeds or "").strip()
        )

    def result_of(key: str, device: str, guess: str | None, sort: str) -> tuple:
        """What is shown of a recorded race: nothing before a guess."""
        about, record = LESSONS[key], recorded(key, device)
        if not guess:
            hidden = gr.update(visible=False)
            return ("A guess first, then what was recorded.", "", provenance(record), hidden, *[gr.skip()] * 4)
        said, scores, losses, lines = picture(about, record.lines, sort)
        reply = revealed(about, record.lines, guess)
        return (
            said, reply, provenance(record), gr.update(visible=True), scores, losses, lines, findings(about, record.lines),
        )  # fmt: skip

    def open_lesson(key: str, table: Mapping[str, str], spec: RunSpec) -> tuple:
        picked = Choice(key, table["sort"])
        return (picked.query(), *arranged(picked, spec)[1:], *result_of(key, "", None, picked.sort))

    def arranged(picked: Choice, spec: RunSpec, guess: str | None = None) -> tuple:
        """The controls that a choice sets."""
        about, places = LESSONS[picked.lesson], devices(picked.lesson)
        return (
            picked.lesson,
            gr.update(choices=places, value=recorded(picked.lesson).device, visible=len(places) > 1),
            gr.update(choices=suited(about, spec), value=list(picked.racing()), info=asked_for(about)),
            picked.seconds,
            picked.seeds,
            gr.update(choices=[*about.options, SHOW], label=about.question, value=guess),
        )

    def linked(query: str, spec: RunSpec) -> tuple:
        """A link's choice, with its result in the open: whoever sent it has seen it. Raises SpecError."""
        picked = Choice.read(query)
        return (*arranged(picked, spec, SHOW), *result_of(picked.lesson, "", SHOW, picked.sort))

    def guessed(key: str, device: str, guess: str, table: Mapping[str, str]) -> tuple:
        return result_of(key, device, guess, table["sort"])

    def sorted_by(key: str, device: str, table: Mapping[str, str], *rest: Any) -> tuple:
        job = jobs.find(table["run"])
        lines = so_far(job.events)[0] if job else recorded(key, device).lines
        picked = read(key, table, *rest)
        return picked.query(), board(lines, picked.sort, table["run"])

    def settle(key: str, *rest: Any) -> tuple:
        return (read(key, *rest).query(),)

    def follow(job: jobs.Job | None, about: Lesson, sort: str) -> Iterator[tuple]:
        if job is None:
            yield (gr.skip(),) * len(live)
            return
        drawn = -1
        for events in job.follow():
            lines, running, last = so_far(events)
            over = events[-1]["type"] in ("done", "error")
            points = sum(map(len, running.values())) + sum(len(x) for line in lines for x in line.losses)
            error = escape(events[-1]["message"]) if events[-1]["type"] == "error" else ""
            parts: tuple = (gr.skip(),) * 5
            if lines and (points != drawn or over):
                partial_lines = [
                    replace(line, losses=[*line.losses, running[i]] if i in running else line.losses)
                    for i, line in enumerate(lines)
                ]
                parts = (*picture(about, partial_lines, sort, job.id), findings(about, lines))
                drawn = points
            yield (
                error if over else gr.skip(),  # a refused second press stays readable meanwhile
                *parts,
                status(events, lines, last),
                gr.update(visible=bool(lines)),
                gr.update(interactive=over, value="Race again" if over else "Racing"),
                gr.update(interactive=not over, value="Stop"),
            )

    live = [problem, sentence, chart, loss, table, tested, bar, result, go, stop]

    def begin(spec: RunSpec, request: gr.Request, task: str, steps: str, key: str, *rest: Any) -> Iterator[tuple]:
        try:
            asked = configured(spec, task, steps)
            picked = read(key, *rest)
            field = racers(asked, picked)
            seconds, runs = (
                number(picked.seconds, "seconds", 600.0),
                int(number(picked.seeds, "seeds", MOST_SEEDS) or 1),
            )
            job = jobs.start(
                field[0].spec, request.session_hash or "", lambda spec, out: RACE(field, out, runs, seconds)
            )
        except SpecError as error:
            yield (gr.skip(), escape(str(error)), *[gr.skip()] * (len(live) - 1))
            return
        started: Any = f"{job.id} {key}"
        for parts in follow(job, LESSONS[key], picked.sort):
            yield (started, *parts)
            started = gr.skip()

    def again(run: str, query: str) -> Iterator[tuple]:
        """A page that comes back to the lesson finds its race where it is."""
        name, _, key = run.partition(" ")
        picked = Choice.read(query)
        yield from follow(jobs.find(name) if key == picked.lesson else None, LESSONS[picked.lesson], picked.sort)

    def halt(run: str, request: gr.Request) -> Any:
        job = jobs.running(request.session_hash or "") or jobs.find(run.partition(" ")[0])
        if job is None or job.over:
            return gr.skip()
        job.stop()
        return gr.update(interactive=False, value="Stopping")

    def configured(spec: RunSpec, task: str, steps: str) -> RunSpec:
        return page.public({**here(spec).to_dict(), "task": task, "steps": steps or None})

    def set_task(spec: RunSpec, task: str, steps: str) -> tuple:
        asked = configured(spec, task, steps)
        return asked, page.settings_line(asked)

    lesson.input(open_lesson, [lesson, table, spec], [choice, *chosen[1:], *shown], **quiet)
    gr.on([guess.input, device.input], guessed, [lesson, device, guess, table], shown, **quiet)
    table.input(sorted_by, [lesson, device, *mine[1:]], [choice, table], **quiet)
    gr.on(
        [values.input, seconds.input, seeds.input], page.refusing(settle, 1), mine, [problem, choice],
        trigger_mode="always_last", **quiet,
    )  # fmt: skip
    gr.on(
        [task.input, steps.input], changing(page.refusing(set_task, 2)), [spec, task, steps], [problem, spec, note],
        trigger_mode="always_last", **quiet,
    )  # fmt: skip
    go.click(None, None, problem, js=CLOSED, **quiet)
    go.click(begin, [spec, task, steps, *mine], [current, *live], trigger_mode="multiple", **quiet)
    stop.click(halt, current, stop, **quiet)

    def show(spec: RunSpec) -> tuple:
        asked = here(spec)
        return asked.task or tasks.DEFAULT, asked.steps, page.settings_line(asked)

    return page.View(
        TAB, show, [task, steps, note], resumed=page.Event(again, [current, choice], live),
        linked=page.Event(linked, [choice, spec], [*chosen, *shown]),
    )  # fmt: skip


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
    page.run_alone("Race", lambda spec: build(spec, gr.BrowserState("")))
