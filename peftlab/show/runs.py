"""A training run in words and charts: how far it is, what it answers, and the recording that stands until there is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from html import escape

from .. import hardware, measured, units
from ..count import count
from ..data import tasks
from ..race import scores
from ..resolve import as_here, resolve, resolve_here
from ..room import jobs, rooms
from ..run.events import Event, last_of, standing
from ..spec import Json, Resolved, RunSpec
from . import run_card
from .figures import Chart
from .marks import bold, explained, graded, how, libraries, progress, remarks, sentence, table
from .refusals import failure
from .run_charts import charts
from .settings import label, method_name, short

Events = Sequence[Event]
BRIEF = 12
"""A task whose answers have at most so many tokens needs little room for them; style.css makes the rows below lower."""
SHOWN = 3
"""Held-out items whose answers are in sight: as many as an `eval` event has."""


def card(task: str) -> str:
    """What a task teaches, how many rows it has, and what its default run comes to."""
    t = tasks.TASKS[task]
    said = f"<b>{escape(t.name)}.</b> {escape(t.teaches)} {len(t.train)} training rows, {len(t.heldout)} held out."
    if one := _reliability(t):
        scores = [run["score"] for run in one["runs"]]
        low, high, mean = (units.score(score) for score in (min(scores), max(scores), one["mean"]))
        tip = f"{one['hardware']}, {one['date']}, {libraries(one['versions'])}. Command: {one['command']}"
        said += (
            f" {len(scores)} runs as they begin here, made on {escape(brief(one['hardware']))} and each scored on "
            f"{one['items']} held-out items, had {low} to {high} of them right, {mean} on average. {how('measured', tip)}"
        )
    return said


@lru_cache(maxsize=len(tasks.TASKS))
def _reliability(task: tasks.Task) -> Json | None:
    """The recording of many seeds of a task's default run as it is here, one of this kind of device first; None without one."""
    usual, machine = resolve(as_here(RunSpec(task=task.key))), hardware.here().device
    own = [one for one in measured.documents("reliability") if one["spec"]["task"] == task.key]
    for one in sorted(own, key=lambda one: one["device"] != machine):
        if all(one["spec"][name] == getattr(usual, name) for name in ("model", "method", "steps", "batch_size")):
            return one
    return None


def live_sentence(events: Events) -> str:
    """What a run has achieved so far, from its events."""
    if not events:
        return "Loading the model."
    start, step, last = last_of(events, "start"), last_of(events, "step"), events[-1]
    if last.get("cancelled"):
        return "The run was cancelled."
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
    time = units.seconds(total).replace(" ", "\N{NO-BREAK SPACE}")
    read = f"{name} has read {step['examples']} examples in {time}."
    measured = [e for e in events if e["type"] == "eval"]
    scores = [units.score(next(iter(e["metrics"].values()))) for e in measured]
    if not scores:
        return read
    metric, before = tasks.METRICS[start["metric"]].name, bold(scores[0], "frozen")
    if len(scores) == 1:
        return f"{read} {metric} before: {before}."
    items = measured[-1].get("items", 0)
    few = f"{items} " if items < measured[0].get("items", 0) else ""  # midway, on a CPU
    return f"{read} {metric}: {before} → {bold(scores[-1], 'trained')} on {few}items it has never seen."


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
        time = f"about {units.seconds(last['eta_seconds'])} of training left"
        left = time if done < steps else "it answers the held-out items next"
    elif last and last["type"] == "done" and last["steps"]:
        ended = last.get("message") or ("Stopped early; what it learned is kept." if last["stopped"] else "Done.")
        what = f"{ended} {units.seconds(last['seconds'])} in all."
        done = last["steps"]
    far = f"step {step['step']} of {steps}" if step else "before the first step" if start else ""
    return remarks(*filter(None, (far, escape(what), left, *_noted(events)))) + progress("training", done / steps)


def _noted(events: Events) -> list[str]:
    """What was said of a run beside its numbers: that it went on after an interruption, and what it notes."""
    said = []
    if resumed := last_of(events, "resumed"):
        said.append(resumed.get("message") or f"It went on after step {resumed['step']}.")
    if note := last_of(events, "note"):
        said.append(sentence(note["message"].rstrip(".")))
    return [escape(text) for text in said]


def _answers(events: Events, task: str = "") -> str:
    """What the model says to a few held-out items: before, and at the last measurement. Until then their places are empty."""
    seen = [e for e in events if e["type"] == "eval" and "examples" in e]
    of = tasks.TASKS.get(task)
    kind = "answers kept brief" if of and of.max_new_tokens <= BRIEF else "answers kept"
    if not seen:
        rows = of.heldout[:SHOWN] if of else ()
        return _answer_table([(row.prompt, None, None) for row in rows], "later", kind) if rows else ""
    first, last = seen[0], seen[-1]
    learned = last["step"] > 0
    when = f"at step {last['step']}" if learned else "later"
    pairs = zip(first["examples"], last["examples"], strict=True)
    told = [(before["prompt"], before, now if learned else None) for before, now in pairs]
    return _answer_table(told, when, kind, "wrong" if last["when"] == "after" else "not yet")


def _answer_table(
    rows: Iterable[tuple[str, Json | None, Json | None]], when: str, kind: str, wrong: str = "not yet"
) -> str:
    """Prompts with two answers each, in cells that keep their height and scroll. `wrong` is said of a later wrong answer."""

    def said(answer: Json | None, mark: str) -> str:
        return f'<td class="said"><div>{mark}<br>{escape(answer["text"])}</div></td>' if answer else "<td></td>"

    def row(prompt: str, before: Json | None, now: Json | None) -> str:
        mark = graded(now["score"], wrong) if now else ""
        first = graded(before["score"]) if before else ""
        return f"<tr><td><div>{escape(prompt)}</div></td>{said(before, first)}{said(now, mark)}</tr>"

    return table(["never seen in training", "before", when], (row(*one) for one in rows), kind)


@lru_cache(maxsize=32)
def charts_of(job: jobs.Job, seen: int) -> dict[str, dict[str, Chart]]:
    """The charts of a job's first `seen` events."""
    return charts(standing(job.events[:seen]))


@lru_cache(maxsize=len(tasks.TASKS) + 8)
def recording(task: str) -> dict[str, object]:
    """What stands here until there is a run of one's own: a recorded one of this task, fastest hardware first, by panel."""
    run = next((r for r in measured.runs() if r["spec"]["task"] == task), None)
    if run is None:
        return {
            "sentence": "The model learns while you watch.",
            "bar": "",
            **shown_of([], resolve(RunSpec(task=task))),
            **charts([]),
        }
    events, recorded = run["events"], scores.of_run(run)
    older = " The task had other training rows then." if run["date"] < tasks.TASKS[task].rows_since else ""
    tip = f"{run['hardware']}, {run['date']}, {libraries(run['versions'])}.{older} Command: {run['command']}"
    about = f"{how('measured', tip)} A recording, seed {recorded.spec['seed']}: {recorded.settings()}."
    more = explained(escape(scores.elsewhere(recorded)))
    return {
        "sentence": f"Recorded on {escape(brief(run['hardware']))}: {live_sentence(events)}",
        "bar": remarks(about),
        **shown_of(events, resolve(RunSpec.from_dict(run["spec"]))),
        **charts(events),
        "said": f'{_answers(events, task)}<div class="note">{more}</div>',
    }


def shown_of(events: Events, spec: Resolved, adapter: str = "") -> dict[str, object]:
    """What the panels below the bar show of a run, by name; `adapter` as in `run_card.card`."""
    return {
        "figures": run_card.figures(events),
        "card": run_card.card(events, spec, adapter),
        "said": _answers(events, str(spec.task)),
    }


def brief(hardware: str) -> str:
    """Hardware without its vendor and the kind of its memory, as a sentence names it: H100 80GB."""
    return " ".join(word for word in hardware.split() if word != "NVIDIA" and not word.startswith("HBM"))


def _named(spec: RunSpec) -> str:
    """Which task a run learns, on which model, and by which method."""
    report = count(resolve(spec))
    return f"{escape(tasks.find(report.spec.task).name)}, {escape(report.model_name)}, {method_name(report)}"


def waiting(job: jobs.Job | None, spec: RunSpec) -> str:
    """What is said while the recording stands: what `spec` would begin, how many are before it, or what it is loading."""
    if job is None:
        if not rooms.here().settings.train:
            return remarks("<b>This host shows everything and trains nothing.</b>")
        used = resolve_here(spec)
        steps = f"{used.steps} steps of {used.batch_size * used.accumulation}"
        takes = rooms.here().takes(used)
        time = f", about {units.seconds(takes)}, as the last such runs took" if takes else ""
        return remarks(f"<b>Press Train to run it here:</b> {_named(spec)}, {steps}{time}.")
    last, before = job.events[-1], rooms.here().ahead(job)
    what = "The run begins"
    if last["type"] == "queued" and before:
        wait = rooms.here().wait(job)
        what = f"The run waits{' to go on' if job.again else ''}: {before} ahead of it" + (
            f", about {units.seconds(wait)}" if wait else ""
        )
    if last["type"] == "loading":
        what += f": loading {escape(last['model'])}, which is fetched first where it is not here yet"
    return remarks(f"<b>{what}.</b>")


def shown(job: jobs.Job | None, spec: RunSpec, mine: bool = False) -> dict[str, object]:
    """What the panels of a run show, by name. Until it has begun, the recording of the task stays.

    `spec` is what Train would begin now; the run's owner, to whom it is `mine`, is offered to compare its adapter.
    """
    if job is None or not (job.over or last_of(job.events, "start")):
        old = recording(str(job.spec.task) if job else spec.task or tasks.DEFAULT)
        bar = {"bar": f"{waiting(job, spec)}{old['bar']}"}
        return old | bar | ({"sentence": live_sentence(job.events)} if job else {})
    told = list(job.events)
    events = standing(told)
    points = [n for n, e in enumerate(told, 1) if e["type"] in ("step", "eval")]  # drawn anew for a new one only
    adapter = job.id if mine and job.over and (job.folder / "adapter").exists() else ""
    return {
        "sentence": live_sentence(events),
        "bar": ("" if job.begun else waiting(job, spec))
        + remarks(*filter(None, (f"<b>This run:</b> {_named(job.spec)}", _next(job, spec))))
        + (failure(events) or explained(status(events))),
        **shown_of(events, job.spec, adapter),
        **charts_of(job, max(points, default=0)),
    }


def _next(job: jobs.Job, spec: RunSpec) -> str:
    """What is different in the run that Train would begin; empty where nothing is."""
    old, new = job.spec.to_dict(), resolve_here(spec).to_dict()
    unlike = [name for name, value in new.items() if value != old.get(name) and name not in job.spec.unread]
    if "task" in unlike:  # then its own rows, steps and batch follow
        said = escape(tasks.find(str(new["task"])).name)
    else:
        said = ", ".join(f"{label(name).lower()} {escape(short(new[name]))}" for name in unlike)
    return f"<b>Your next run, as set here: {said}.</b>" if unlike else ""
