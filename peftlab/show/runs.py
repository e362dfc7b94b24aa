"""A training run in words and charts: how far it is, what it answers, and the recording that stands until there is one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

from .. import measured, units
from ..count import count
from ..data import tasks
from ..race import scores
from ..resolve import resolve
from ..room import jobs, rooms
from ..run.events import Event, standing
from ..spec import RunSpec
from .figures import PALETTE, QUARTERS, Chart, blank, themed
from .marks import bold, explained, failure, graded, how, libraries, progress, remarks, table
from .settings import method_name

if TYPE_CHECKING:
    import plotly.graph_objects as go

Events = Sequence[Event]


def card(task: str) -> str:
    """What a task teaches, and how many rows it has."""
    t = tasks.TASKS[task]
    return f"<b>{escape(t.name)}.</b> {escape(t.teaches)} {len(t.train)} training rows, {len(t.heldout)} held out."


def gear(events: Events) -> str:
    """How the steps of a run are launched, and why, and which operations are not fused, from its events."""
    said = [e for e in events if "gear" in e]
    if not said:
        return "steps launched one operation at a time"
    apart = [name for e in events for name in e.get("not_fused", ())]
    rest = f"; not fused: {escape(', '.join(apart))}" if apart else ""
    if said[-1]["gear"] == "graph":
        return "each step one CUDA graph" + rest
    return f"steps launched one operation at a time ({escape(said[-1]['why_eager'])}){rest}"


def last_of(events: Events, kind: str) -> Event | None:
    """The last event of a kind, None where there is none."""
    return next((e for e in reversed(events) if e["type"] == kind), None)


def live_sentence(events: Events) -> str:
    """What a run has achieved so far, from its events."""
    if not events:
        return "Loading the model."
    start, step, last = last_of(events, "start"), last_of(events, "step"), events[-1]
    if last["type"] == "error":
        steps = sum(e["type"] == "step" for e in events)
        return f"The run ended after {steps} steps." if steps else "The run ended before it had learned anything."
    if last["type"] == "queued":
        ahead = last["ahead"]
        return f"Waiting: {ahead} run{'s' if ahead != 1 else ''} ahead of yours." if ahead else "Starting the run."
    if start is None:
        return f"Loading {escape(last.get('model', 'the model'))}."
    if last["type"] == "done" and not last["steps"]:
        return escape(last["message"])
    name = bold(start["model"], "frozen")
    if step is None:
        return f"{name} answers {start['heldout']} held-out items before it has learned anything."
    total = sum(e["seconds"] for e in events if e["type"] == "step")
    read = f"{name} has read {step['examples']} examples in {units.seconds(total)}."
    scores = [units.score(next(iter(e["metrics"].values()))) for e in events if e["type"] == "eval"]
    if not scores:
        return read
    metric, before = tasks.METRICS[start["metric"]].name, bold(scores[0], "frozen")
    if len(scores) == 1:
        return f"{read} {metric} before: {before}."
    return f"{read} {metric}: {before} → {bold(scores[-1], 'trained')} on items it has never seen."


def status(events: Events) -> str:
    """Steps done, time left, and what is going on, with a bar."""
    start, step = last_of(events, "start"), last_of(events, "step")
    steps = start["spec"]["steps"] if start else 1
    done = step["step"] if step else 0
    what, left = "", ""
    last = events[-1] if events else None
    if last and last["type"] == "progress":
        what = f"{last['what']}, {units.score(last['share'])}"
    elif last and last["type"] == "step":
        left = f"about {units.seconds(last['eta_seconds'])} of training left"
    elif last and last["type"] == "done" and last["steps"]:
        kept = "Stopped early; what it learned is kept." if last["stopped"] else "Done."
        speed = f"{units.significant(last['tokens_per_second'])} tokens/s, {gear(events)}"
        what = f"{kept} {units.seconds(last['seconds'])} in all, {speed}{_peak(last)}, on {last['device']}."
        done = last["steps"]
    far = f"step {step['step']} of {steps}" if step else "before the first step" if start else ""
    return remarks(far, escape(what), left) + progress("training", done / steps)


def _peak(done: Event) -> str:
    """The peak memory of a run that is done; empty on a CPU, where nobody counts it."""
    peak, said = done["measured_peak_bytes"], done["predicted_peak_bytes"]
    beside = f" ({units.size(said)} predicted)" if said else ""
    return f", peak memory {units.size(peak)}{beside}" if peak else ""


def _answers(events: Events) -> str:
    """What the model says to a few held-out items: before, and at the last measurement."""
    seen = [e for e in events if e["type"] == "eval" and "examples" in e]
    if not seen:
        return ""
    first, last = seen[0], seen[-1]
    learned = last["step"] > 0

    def row(before: dict[str, Any], now: dict[str, Any]) -> str:
        mark = graded(now["score"], "not yet")
        said = f'<td class="said">{escape(now["text"])}<br>{mark}</td>' if learned else ""
        return f'<tr><td>{escape(before["prompt"])}</td><td class="said">{escape(before["text"])}</td>{said}</tr>'

    heads = ["never seen in training", "before", *([f"at step {last['step']}"] if learned else [])]
    return table(heads, map(row, first["examples"], last["examples"]), "answers")


def charts(events: Events) -> dict[str, dict[str, Chart]]:
    """The loss and the metric of a run so far, by panel."""
    events = standing(events)
    start = last_of(events, "start")
    steps = start["spec"]["steps"] if start else 40
    name = tasks.METRICS[start["metric"]].name if start else "Score"
    return {"loss": themed(loss_curve, events, steps), "metric": themed(metric_curve, events, steps, name)}


@lru_cache(maxsize=32)
def charts_of(job: jobs.Job, seen: int) -> dict[str, dict[str, Chart]]:
    """The charts of a job's first `seen` events."""
    return charts(job.events[:seen])


@lru_cache(maxsize=len(tasks.TASKS) + 8)
def recording(task: str) -> dict[str, object]:
    """What stands here until there is a run of one's own: a recorded one of this task, fastest hardware first, by panel."""
    run = next((r for r in measured.runs() if r["spec"]["task"] == task), None)
    if run is None:
        return {"sentence": "The model learns while you watch.", "bar": "", "said": "", **charts([])}
    events, recorded = run["events"], scores.of_run(run)
    tip = f"{run['hardware']}, {run['date']}, {libraries(run['versions'])}. Command: {run['command']}"
    about = (
        f"{how('measured', tip)} A recording, seed {recorded.spec['seed']}: {recorded.settings()}, "
        f"{units.seconds(events[-1]['seconds'])} in all{_peak(events[-1])}."
    )
    return {
        "sentence": f"Recorded on {escape(run['hardware'])}: {live_sentence(events)}",
        "bar": f'{remarks(about)}<div class="note">{explained(escape(scores.elsewhere(recorded)))}</div>',
        "said": _answers(events),
        **charts(events),
    }


def _named(spec: RunSpec) -> str:
    """Which model a run trains, and by which method."""
    report = count(resolve(spec))
    return f"{escape(report.model_name)}, {method_name(report)}"


def waiting(job: jobs.Job | None, spec: RunSpec) -> str:
    """What is said while the recording stands: what `spec` would begin, how many are before it, or what it is loading."""
    if job is None:
        return remarks(f"<b>Press Train to run it here: {_named(spec)}.</b>")
    last, before = job.events[-1], rooms.here().ahead(job)
    what = "The run begins"
    if last["type"] == "queued" and before:
        wait = rooms.here().wait(job)
        what = f"The run waits: {before} ahead of it" + (f", about {units.seconds(wait)}" if wait else "")
    if last["type"] == "loading":
        what += f": loading {escape(last['model'])}, which is fetched first where it is not here yet"
    return remarks(f"<b>{what}.</b>")


def shown(job: jobs.Job | None, spec: RunSpec) -> dict[str, object]:
    """What the panels of a run show, by name. Until it has begun, the recording of the task stays."""
    if job is None or not (job.over or last_of(job.events, "start")):
        old = recording(spec.task or tasks.DEFAULT)
        return {**old, "bar": f"{waiting(job, spec)}{old['bar']}"}
    told = list(job.events)
    events = standing(told)
    points = [n for n, e in enumerate(told, 1) if e["type"] in ("step", "eval")]  # drawn anew for a new one only
    return {
        "sentence": live_sentence(events),
        "bar": remarks(f"<b>This run:</b> {_named(job.spec)}") + (failure(events) or explained(status(events))),
        "said": _answers(events),
        **charts_of(job, max(points, default=0)),
    }


def loss_curve(events: Sequence[Event], steps: int, theme: str) -> go.Figure:
    """Training loss by step. Only points are added between calls, so the page keeps its reader's zoom."""
    done = [e["step"] for e in events if e["type"] == "step"]
    losses = [e["loss"] for e in events if e["type"] == "step"]
    figure = blank(theme, 300, title="Training loss, nats per answer token", uirevision="loss")
    figure.add_scatter(
        x=done, y=losses, mode="lines+markers", line={"color": PALETTE[theme]["trained"], "width": 3}, marker={"size": 5},
        hovertemplate="step %{x}: %{y:.3f}<extra></extra>",
    )  # fmt: skip
    if done:
        last = f"<b>{losses[-1]:.2f}</b>"
        figure.add_annotation(x=done[-1], y=losses[-1], text=last, showarrow=False, yshift=16, font={"size": 17})
    figure.update_xaxes(range=[0, steps * 1.05], title_text="step")
    return figure.update_yaxes(range=[0, max(losses, default=4) * 1.12])


def metric_curve(events: Sequence[Event], steps: int, name: str, theme: str) -> go.Figure:
    """The held-out metric each time it was measured, in percent."""
    c = PALETTE[theme]
    measured = [e for e in events if e["type"] == "eval"]
    values = [100 * next(iter(e["metrics"].values())) for e in measured]
    colours = [c["frozen"]] + [c["trained"]] * (len(measured) - 1)
    figure = blank(theme, 300, title=f"{name} on held-out items, %", uirevision="metric")
    figure.add_scatter(
        x=[e["step"] for e in measured], y=values, mode="lines+markers+text", line={"color": c["trained"], "width": 3},
        marker={"size": 13, "color": colours}, text=[f"<b>{value:.0f}%</b>" for value in values],
        textposition="top center", textfont={"size": 18, "color": colours}, cliponaxis=False,
        hovertemplate="step %{x}: %{y:.1f}%<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(range=[-0.06 * steps, steps * 1.08], title_text="step", zeroline=False)
    return figure.update_yaxes(range=[0, 118], tickvals=QUARTERS)
