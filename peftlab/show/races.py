"""A race in words: its board, what it says to the lectures' statements, how far it is and where it was recorded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape

from .. import race, units
from ..data import tasks
from ..data.tasks import METRICS
from ..lectures.lessons import LESSONS, Lesson
from ..race import Line, scores
from ..race.recordings import Recording
from ..room import jobs
from ..run import Event
from . import figures, race_figures, sentences
from .marks import explained, how, libraries, progress, remarks
from .statements import statements_table

Events = Sequence[Event]


def board(lines: Sequence[Line], sort: str) -> dict[str, str]:
    """The board as the page holds it, ranked by the column `sort`: a table to look at, and the same as CSV.

    Raises SpecError for an unknown column.
    """
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
    unit = f"<small>{explained(escape(column.unit))}</small>" if column.unit and column.unit != "bytes" else ""
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
        return f"<b>{units.score(value)}</b><br><small>{' to '.join(map(units.score, line.interval))}</small>"
    if column.unit == "bytes":
        return units.size(value)
    if column.key == "trainable_parameters":
        return f"{value:,}<br><small>{units.percent(line.trainable_percent / 100)}</small>"
    if column.key == "training_seconds":
        return units.seconds(value)
    if column.unit.startswith("×"):
        return f"{value:.2f}×"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def recorded_how(recording: Recording) -> str:
    """The mark `measured`, which tells where, when and by which commands a race was recorded."""
    commands = " ".join(f"Command: {c}" for c in recording.commands)
    return how("measured", f"{recording.hardware}, {recording.date}, {libraries(recording.versions)}. {commands}")


def provenance(recording: Recording, before: str = "") -> str:
    """Where a race was recorded and how many seeds it has, after the words `before`."""
    fewest, most = recording.seeds
    seeds = "1 seed" if most == 1 else f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    said = f"Recorded on {escape(recording.hardware)}, {len(recording.lines)} racers, {seeds} each."
    return remarks(f"{recorded_how(recording)} {before}{said}")


def elsewhere(lesson: Lesson, recording: Recording) -> str:
    """Why other tabs have another score of LoRA, which all of them show; empty where the race is not of all methods."""
    line = next((x for x in recording.lines if x.spec["method"] == "lora" and x.scores), None)
    if line is None or lesson.setting != "method":
        return ""
    said = escape(scores.elsewhere(scores.of_line(line, recording.hardware)))
    return f'<div class="note"><b>{escape(line.name)}</b>: {units.score(line.score)} here. {said}</div>'


def picture(lesson: Lesson, lines: Sequence[Line], sort: str) -> dict[str, object]:
    """What the panels show of any race, recorded or live, by their names."""
    metric = METRICS[tasks.find(lines[0].spec["task"]).metric].name
    steps = max([len(losses) for line in lines for losses in line.losses] + [lines[0].spec["steps"] or 1])
    finished = [line for line in lines if line.scores]
    return {
        "sentence": sentences.race_sentence(lines),
        "scores": figures.themed(race_figures.scores, finished, lesson.setting, metric),
        "losses": figures.themed(race_figures.curves, lines, steps),
        "tested": statements_table(lesson.findings(lines)),
        "board": board(lines, sort),
    }


def recorded(key: str, device: str = "") -> Recording:
    """A lesson's recording on a device; the fullest one for a device without any."""
    found = LESSONS[key].recordings()
    return next((r for r in found if r.device == device), found[0])


def devices(key: str) -> list[tuple[str, str]]:
    """The hardware and device of each of a lesson's recordings."""
    return [(r.hardware, r.device) for r in LESSONS[key].recordings()]


@lru_cache(maxsize=64)
def recorded_picture(key: str, device: str, sort: str) -> dict[str, object]:
    return picture(LESSONS[key], recorded(key, device).lines, sort)


@dataclass(frozen=True)
class SoFar:
    """A race as far as its events tell."""

    lines: list[Line]
    """There are none before the race begins."""
    running: dict[int, list[float]]
    """The losses of the run under way, which its line does not have yet, by the racer's place."""
    last: Event | None
    """The last event of a racer's own training; None before the first."""

    def with_running(self) -> list[Line]:
        """The lines, and in them the losses of what is under way."""
        return [
            replace(line, losses=[*line.losses, self.running[i]]) if i in self.running else line
            for i, line in enumerate(self.lines)
        ]


def so_far(events: Events) -> SoFar:
    """What a race's events tell; they are in the order in which they came."""
    lines: list[Line] = []
    running: dict[int, list[float]] = {}
    last: Event | None = None
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
def live_picture(job: jobs.Job, seen: int, key: str, sort: str) -> dict[str, object]:
    """What the panels show of a race here after its first `seen` events."""
    return picture(LESSONS[key], so_far(job.events[:seen]).with_running(), sort)


def status(events: Events, found: SoFar, ahead: int = 0) -> str:
    """Who runs and how far the race is, with a bar; before it begins, how many jobs are `ahead` of it."""
    lines, last = found.lines, found.last
    seeds = next((e["seeds"] for e in events if e["type"] == "racers"), 1)
    over = sum(len(line.scores) if not line.error else seeds for line in lines)
    share, what = over / (seeds * len(lines)) if lines else 0.0, ""
    if events and events[-1]["type"] == "done":
        ended = "Stopped; what has finished stands." if events[-1]["stopped"] else "Done."
        share, what = 1.0, f"{ended} Run here, live."
    elif last is not None:
        step = last["event"].get("step")
        what = lines[last["racer"]].name + (f", step {step}" if last["event"]["type"] == "step" else "")
    elif events and events[-1]["type"] == "queued" and ahead:
        what = f"Waiting: {ahead} ahead of yours"
    return remarks(f"{over} of {seeds * len(lines)} runs", escape(what)) + progress("race", share)


def revealed(lesson: Lesson, lines: Sequence[Line], guess: str | None) -> str:
    """The answer to a lesson's question, beside the guess if there was one; empty before the race has an answer."""
    try:
        answer = lesson.answered(lines)
    except LookupError:
        return ""
    right = '<span class="good">As you said</span>' if guess == answer else f"You said {escape(guess or '')}"
    return f"{right + '. ' if guess else ''}Here it was: <b>{escape(answer)}</b>."
