"""A race: its board, its charts, what it says to the lectures' statements, how far it is and where it was recorded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from html import escape
from itertools import zip_longest
from statistics import fmean

import plotly.graph_objects as go

from .. import race, units
from ..data import tasks
from ..lectures.lessons import LESSONS, Lesson
from ..race import Line, recordings, scores
from ..room import jobs
from ..run.events import last_of
from .figures import DASHES, PALETTE, QUARTERS, Chart, blank, themed
from .marks import bold, explained, how, libraries, progress, remarks
from .runs import Events
from .statements import statements_table

ROW, ROW_LINE = 25, 16
"""The height of a racer's row in pixels, and what a name in two lines takes more."""
WRAPPED = 24
"""A name with more letters is written in two lines."""
NAMED = 6
"""Up to so many curves each have their name in the legend; among more, only the best and full fine-tuning do."""
MOST = 24
"""A chart with more curves shows each racer only at its best learning rate."""
BELOW = {"orientation": "h", "x": 0, "y": -0.25, "yanchor": "top"}
"""A legend below the chart, where it hides nothing."""
INSIDE = {"x": 0.99, "y": 0.99, "xanchor": "right", "yanchor": "top"}


def board(lines: Sequence[Line], sort: str) -> dict[str, str]:
    """The board ranked by the column `sort`: a table to look at, the same as CSV. Raises SpecError for an unknown column."""
    lines = race.ranked(lines, sort)
    columns = [c for c in race.COLUMNS if c.key not in ("low", "high") and any(c.of(x) is not None for x in lines)]
    head, rows = "".join(_head(c, sort) for c in columns), ""
    for line in lines:
        why = f'<br><span class="bad">{escape(line.error)}</span>' if line.error else ""
        cells = "".join(f"<td>{_cell(line, c)}</td>" for c in columns)
        rows += f'<tr><td class="racer"><b>{escape(line.name)}</b>{why}</td>{cells}</tr>'
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


def recorded_how(recording: recordings.Recording) -> str:
    """The mark `measured`, which tells where, when and by which commands a race was recorded."""
    commands = " ".join(f"Command: {c}" for c in recording.commands)
    return how("measured", f"{recording.hardware}, {recording.date}, {libraries(recording.versions)}. {commands}")


def provenance(recording: recordings.Recording, before: str = "") -> str:
    """Where a race was recorded and how many seeds it has, after the words `before`."""
    fewest, most = recording.seeds
    seeds = "1 seed" if most == 1 else f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    said = f"Recorded on {escape(recording.hardware)}, {len(recording.lines)} racers, {seeds} each."
    older = recording.date < tasks.find(recording.lines[0].spec["task"]).rows_since
    rows = " The task had other training rows then." if older else ""
    return remarks(f"{recorded_how(recording)} {before}{said}{rows}")


def elsewhere(lesson: Lesson, recording: recordings.Recording) -> str:
    """Why other tabs have another score of LoRA, which all of them show; empty where the race is not of all methods."""
    line = next((x for x in recording.lines if x.spec["method"] == "lora" and x.scores), None)
    if line is None or lesson.setting != "method":
        return ""
    said = escape(scores.elsewhere(scores.of_line(line, recording.hardware)))
    return f'<div class="note"><b>{escape(line.name)}</b>: {units.score(line.score)} here. {said}</div>'


def race_sentence(lines: Sequence[Line]) -> str:
    """Who scores highest and lowest of a race's lines, so far."""
    finished = sorted((line for line in lines if line.scores), key=lambda line: -line.score)
    if not finished:
        return f"{len(lines)} racers, the same rows in the same order. None has finished yet."
    best, last = finished[0], finished[-1]
    early = sum(line.error is not None for line in lines if not line.scores)
    counts = {"ended early": early, "to come": len(lines) - len(finished) - early}
    rest = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    text = (
        f"Of {len(lines)} racers{f' ({rest})' if rest else ''}, {bold(best.name, 'trained')} scores highest: "
        f"{bold(units.score(best.score), 'trained')} of held-out items "
        f"(the base {bold(units.score(fmean(best.base_scores)), 'frozen')})."
    )
    return text if last is best else f"{text} Lowest: {escape(last.name)}, {bold(units.score(last.score))}."


def picture(lesson: Lesson, lines: Sequence[Line], sort: str) -> dict[str, object]:
    """What the panels show of any race, recorded or live, by their names."""
    metric = tasks.METRICS[tasks.find(lines[0].spec["task"]).metric].name
    steps = max([len(losses) for line in lines for losses in line.losses] + [lines[0].spec["steps"] or 1])
    return {
        "sentence": race_sentence(lines),
        "scores": themed(score_chart, lines, lesson.setting, metric),
        "losses": themed(loss_chart, lines, steps),
        "tested": statements_table(lesson.findings(lines)),
        "board": board(lines, sort),
    }


def recorded(key: str, device: str = "") -> recordings.Recording:
    """A lesson's recording on a device; the fullest one for a device without any."""
    found = LESSONS[key].recordings()
    return next((r for r in found if r.device == device), found[0])


def devices(key: str) -> list[tuple[str, str]]:
    """The hardware and device of each of a lesson's recordings."""
    return [(r.hardware, r.device) for r in LESSONS[key].recordings()]


@lru_cache(maxsize=64)
def recorded_picture(key: str, device: str, sort: str) -> dict[str, object]:
    return picture(LESSONS[key], recorded(key, device).lines, sort)


def so_far(events: Events) -> list[Line]:
    """A race's lines as its events tell, with the losses of what is under way; none before it begins."""
    lines: list[Line] = []
    running: dict[int, list[float]] = {}
    for event in events:
        if event["type"] in ("racers", "done"):
            lines = [Line(**line) for line in event["lines"]]
        elif event["type"] == "line":
            lines[event["racer"]] = Line(**event["line"])
            if not event["line"]["error"]:
                running.pop(event["racer"], None)
        elif event["type"] == "run" and event["event"]["type"] == "step":
            running.setdefault(event["racer"], []).append(event["event"]["loss"])
    return [replace(line, losses=[*line.losses, running[i]]) if i in running else line for i, line in enumerate(lines)]


@lru_cache(maxsize=32)
def live_picture(job: jobs.Job, seen: int, key: str, sort: str) -> dict[str, object]:
    """What the panels show of a race here after its first `seen` events."""
    return picture(LESSONS[key], so_far(job.events[:seen]), sort)


def status(events: Events, lines: Sequence[Line], ahead: int = 0) -> str:
    """Who runs and how far the race is, with a bar; before it begins, how many jobs are `ahead` of it."""
    last = last_of(events, "run")
    seeds = next((e["seeds"] for e in events if e["type"] == "racers"), 1)
    over = sum(len(line.scores) if not line.error else seeds for line in lines)
    share, what = over / (seeds * len(lines)) if lines else 0.0, ""
    if events and events[-1]["type"] == "done":
        ended = "Done."
        if events[-1]["stopped"]:
            why = events[-1].get("message")  # that of the host's limit
            ended = f"{why} What has finished stands." if why else "Stopped; what has finished stands."
        share, what = 1.0, f"{ended} Run here, live."
    elif last is not None:
        step = f", step {last['event']['step']}" if last["event"]["type"] == "step" else ""
        what = lines[last["racer"]].name + step
    elif events and events[-1]["type"] == "queued" and ahead:
        what = f"Waiting: {ahead} ahead of yours"
    runs = f"{over} of {seeds * len(lines)} runs" if lines else "Setting up the race"
    return remarks(runs, escape(what)) + progress("race", share)


def revealed(lesson: Lesson, lines: Sequence[Line], guess: str | None) -> str:
    """The answer to a lesson's question, beside the guess if there was one; empty before the race has an answer."""
    try:
        answer = lesson.answered(lines)
    except LookupError:
        return ""
    right = '<span class="good">As you said</span>' if guess == answer else f"You said {escape(guess or '')}"
    return f"{right + '. ' if guess else ''}Here it was: <b>{escape(answer)}</b>."


def score_chart(lines: Sequence[Line], setting: str, metric: str, theme: str) -> go.Figure:
    """The held-out score of each finished line with its 95% interval, across the values of a setting or one below another."""
    done = [line for line in lines if line.scores]
    values = {line.spec[setting] for line in done}
    numbers = len(values) > 1 and all(isinstance(value, int | float) for value in values)
    return _against(done, setting, metric, theme) if numbers else _ranking(done, metric, theme)


def _ranking(lines: Sequence[Line], metric: str, theme: str) -> go.Figure:
    c = PALETTE[theme]
    order = sorted(best_rates(lines), key=lambda line: line.score)
    names = [_wrapped(_without(line, "learning rate") or line.name) for line in order]
    height = 70 + (ROW + ROW_LINE * any("<br>" in name for name in names)) * max(3, len(order))
    figure = blank(theme, height, title={"text": f"{metric} on held-out items, %, with 95% intervals"})
    colours = [c["frozen"] if line.spec["method"] == "full" else c["trained"] for line in order]
    figure.add_scatter(
        x=[100 * line.score for line in order], y=names, mode="markers", error_x=_errors(order, c),
        customdata=[_told(line) for line in order], hovertemplate="%{customdata}<extra></extra>",
        marker={"size": 11, "color": colours, "symbol": ["diamond" if x == c["frozen"] else "circle" for x in colours]},
    )  # fmt: skip
    for name, line, colour in zip(names, order, colours, strict=True):
        figure.add_annotation(
            x=1, xref="paper", y=name, text=f"<b>{units.score(line.score)}</b>", showarrow=False,
            xanchor="left", font={"color": colour, "size": 15},
        )  # fmt: skip
    figure.update_layout(margin_r=44)  # for the numbers
    figure.update_xaxes(range=[-3, 103], tickvals=[0, 50, 100], zeroline=False)
    return figure.update_yaxes(showgrid=False, tickfont={"size": 14}, range=[-0.7, len(order) - 0.3])


def best_rates(lines: Sequence[Line]) -> list[Line]:
    """The best of the finished lines that differ in nothing but the learning rate; the first of equals."""
    done = sorted(reversed([line for line in lines if line.scores]), key=lambda line: line.score)
    return list({json.dumps(line.spec | {"learning_rate": 0}): line for line in done}.values())


def _without(line: Line, setting: str) -> str:
    """A line's name without the part that tells a setting."""
    return ", ".join(part for part in line.name.split(", ") if not part.startswith(setting))


def _wrapped(name: str) -> str:
    """A name as markup. A long one is in two lines, broken at the comma that leaves the longer line shortest."""
    parts = name.split(", ")
    if len(name) <= WRAPPED or len(parts) == 1:
        return escape(name)
    halves = [(", ".join(parts[:i]), ", ".join(parts[i:])) for i in range(1, len(parts))]
    first, second = min(halves, key=lambda half: max(map(len, half)))
    return f"{escape(first)},<br>{escape(second)}"


def _against(lines: Sequence[Line], setting: str, metric: str, theme: str) -> go.Figure:
    c = PALETTE[theme]
    name = setting.replace("_", " ")
    figure = blank(theme, 380, title={"text": f"{metric} on held-out items, %, by {name} (log scale)"})
    groups: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: line.spec["method"] in ("full", "lora")):  # these two over the others
        groups.setdefault(_without(line, name), []).append(line)
    methods = len({group[0].spec["method"] for group in groups.values()}) == len(groups)
    crowd = methods and len(groups) > len(DASHES)  # the legend of a crowd names only the two that everyone knows
    for i, (label, group) in enumerate(groups.items()):
        group = sorted(group, key=lambda line: line.spec[setting])
        method = group[0].spec["method"]
        known = method in ("full", "lora") and methods
        width = 3 if known or not crowd else 1.5
        colour = c["frozen"] if method == "full" else c["trained"] if method == "lora" else c["overhead"]
        figure.add_scatter(
            x=[line.spec[setting] for line in group], y=[100 * line.score for line in group], mode="lines+markers", name=label,
            line={"color": colour, "width": width, "dash": "solid" if known else DASHES[i % len(DASHES)]},
            marker={"size": 9 if known else 5}, error_y=_errors(group, c) if len(groups) <= 2 else None,
            showlegend=known or not crowd, cliponaxis=False,
            customdata=[_told(line) for line in group], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    ticks = sorted({line.spec[setting] for line in lines})
    shown = ticks if len(ticks) <= 9 else [tick for tick in ticks if f"{tick:.0e}".startswith("1")]
    figure.update_xaxes(
        type="log", title_text=name, tickvals=shown, ticktext=[f"{tick:g}" for tick in shown], zeroline=False,
        tickangle=0, tickfont={"size": 12},
    )  # fmt: skip
    figure.update_yaxes(range=[-2, 108], tickvals=QUARTERS)
    return figure.update_layout(showlegend=True, legend=BELOW)


def _errors(lines: Sequence[Line], colours: Mapping[str, str]) -> Chart:
    """Error bars over the 95% intervals."""
    return {
        "type": "data", "symmetric": False, "color": colours["muted"], "thickness": 1.5, "width": 4,
        "array": [100 * (line.interval[1] - line.score) for line in lines],
        "arrayminus": [100 * (line.score - line.interval[0]) for line in lines],
    }  # fmt: skip


def _told(line: Line) -> str:
    low, high = line.interval
    runs = "1 seed" if len(line.scores) == 1 else f"{len(line.scores)} seeds"
    return (
        f"<b>{escape(line.name)}</b><br>{units.score(line.score)} ({units.score(low)} to {units.score(high)}), {runs}"
        f"<br>{line.trainable_parameters:,} trained<br>held-out loss {fmean(line.loss):.3f}"
        f"<br>forgetting {fmean(line.forgetting):.2f}"
    )


def loss_chart(lines: Sequence[Line], steps: int, theme: str) -> go.Figure:
    """Training loss by step, the mean over the seeds run so far. While a race goes on, a later call only adds points."""
    c = PALETTE[theme]
    shown = lines if len(lines) <= MOST else best_rates(lines)
    running = []
    for line in shown:
        if line.losses and line.losses[0]:  # the mean at each step of the seeds that have come so far
            by_step = zip_longest(*line.losses)
            running.append((line, [fmean(loss for loss in losses if loss is not None) for losses in by_step]))
    figure = blank(theme, 340, title={"text": "Training loss, nats per answer token (log scale)"}, uirevision="race")
    leader = max((line for line in lines if line.scores), key=lambda line: line.score, default=None)
    running.sort(key=lambda pair: (pair[0] is leader, pair[0].spec["method"] == "full"))  # the last is drawn on top
    yardsticks = sum(line.spec["method"] == "full" for line, _ in running)
    for i, (line, losses) in enumerate(running):
        ours, full = line is leader, line.spec["method"] == "full" and yardsticks == 1
        named = len(running) <= NAMED or ours or full
        colour = c["trained"] if ours else c["frozen"] if full else c["overhead"]
        dash = DASHES[i % len(DASHES)] if named and not (ours or full) else "solid"
        figure.add_scatter(
            x=list(range(1, len(losses) + 1)), y=losses, mode="lines", name=_wrapped(line.name), showlegend=named,
            line={"color": colour, "width": 3 if named else 1.2, "dash": dash},
            hovertemplate="%{fullData.name}<br>step %{x}: %{y:.3f}<extra></extra>",
        )  # fmt: skip
    long = any("<br>" in trace.name for trace in figure.data if trace.showlegend)
    figure.update_layout(showlegend=True, legend=BELOW if long else INSIDE)
    figure.update_xaxes(range=[0, steps * 1.02], title_text="step")
    return figure.update_yaxes(type="log", dtick=1, exponentformat="none")
