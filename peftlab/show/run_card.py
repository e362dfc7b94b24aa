"""What is known of a run beside its curves: figures while it goes on; then what changed, what it cost and forgot, what next."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from math import exp
from statistics import fmean

from .. import measured, units
from ..compare import wilson
from ..count import count
from ..data import tasks
from ..race import recordings
from ..run.events import Event, last_of
from ..spec import Resolved
from .marks import bold, explained, forgot, how, sentence, term
from .run_charts import losses_of, small_line, smoothed, weight
from .suggestions import buttons, suggestions

NOTHING = "–"
TITLES = ("What changed", "What it cost", "What it forgot", "What to try next")
AHEAD = (
    "The held-out score before and after, and how sure it is.",
    "Seconds, tokens per second and, on a GPU, peak memory.",
    "How much worse it reads ordinary prose than the base.",
    "Advice from this run's own numbers.",
)
"""What stands in the card of a run that goes on, so that it has its place."""


def figures(events: Sequence[Event]) -> str:
    """The newest numbers of a run, each with its name, in a row that keeps its size."""
    start, told = last_of(events, "start"), [e for e in events if e["type"] == "step"]
    spec = start["spec"] if start else {}
    steps, losses = spec.get("steps", 0), losses_of(events)
    norms, rates = ([e[name] for e in told if name in e] for name in ("gradient_norm", "learning_rate"))
    highest = f" to {spec['learning_rate']:g}" if "learning_rate" in spec else ""
    cells = (
        _cell(
            "Loss", f"A moving average of the steps' losses, in which the newest weighs {weight(steps):.2g}",
            _number(smoothed(losses, steps)), f"last step {_number(losses)}",
        ),
        _cell(
            "Learning rate", f"It rises{highest} over the first tenth of the steps, then falls evenly towards zero",
            _number(rates), small_line(rates, steps, "trained"),
        ),
        _cell(
            "Gradient norm", "Length of the gradient of all trained parameters, before it is clipped to at most 1",
            _number(norms), small_line(norms, steps, "gradients"),
        ),
        _cell(
            "Tokens/s", "Tokens of the training rows, without padding, over the seconds of the steps",
            _number([e["tokens_per_second"] for e in events if "tokens_per_second" in e]), "in training",
        ),
        _cell("Memory", "Most bytes of the GPU that steps have allocated, and the same by a trace of the step", *_peak(events)),
    )  # fmt: skip
    return f'<dl class="totals run-figures">{"".join(cells)}</dl>'


def _cell(name: str, tip: str, value: str, below: str) -> str:
    return f"<div><dt>{term(name, tip)}</dt><dd>{value}<small>{below}</small></dd></div>"


def _number(values: Sequence[float]) -> str:
    """The last of `values`, of which there may be none."""
    return units.significant(values[-1], 2 if abs(values[-1]) < 1 else 3) if values else NOTHING


def _peak(events: Sequence[Event]) -> tuple[str, str]:
    """The peak memory and what there is to say of it. Nobody counts it on a CPU, where other work is in the process too."""
    done, known = last_of(events, "done"), [e["peak_bytes"] for e in events if "peak_bytes" in e]
    if done and (peak := done.get("measured_peak_bytes")):
        said = done.get("predicted_peak_bytes")
        return units.size(peak), f"{units.size(said)} predicted" if said else "measured"
    if known:
        return units.size(known[-1]), "so far"
    return NOTHING, "on a GPU only"


def card(events: Sequence[Event], spec: Resolved, adapter: str = "") -> str:
    """What came of a run, in four parts. `adapter` is the id by which its owner may compare it."""
    last = events[-1] if events else None
    if last and last["type"] == "error":
        return ""
    parts = tuple(f"<p>{text}</p>" for text in AHEAD)
    kind = "run-card ahead"
    if last and last["type"] == "done":
        if not last["steps"]:
            return ""
        told = suggestions(events, spec, adapter)
        parts, kind = (changed(last, spec), cost(last, events), forgetting(last, spec), buttons(told)), "run-card"
    sections = "".join(f"<section><h4>{title}</h4>{part}</section>" for title, part in zip(TITLES, parts, strict=True))
    return explained(f'<div class="{kind}">{sections}</div>')


def changed(done: Event, spec: Resolved) -> str:
    """The metric before and after with its interval, and how many numbers of the model changed."""
    return f"<p>{_score(done)}</p><p>{_trained(spec)}</p>"


def _score(done: Event) -> str:
    measured = done.get("eval") or {}
    before, after, items = measured.get("before"), measured.get("after"), measured.get("items", 0)
    if not before or not after:
        return "The held-out score was not measured after the run, because it was stopped."
    (metric, first), now = next(iter(before.items())), next(iter(after.values()))
    (low, high), (least, most) = wilson(now * items, items), wilson(first * items, items)
    name = tasks.METRICS[metric].name
    said = f"{name}: {bold(units.score(first), 'frozen')} → {bold(units.score(now), 'trained')} on {items} held-out items, "
    said += f"95% interval {units.score(low)} to {units.score(high)}."
    return said + (" That may be chance." if low <= most and least <= high else "")


def _trained(spec: Resolved) -> str:
    report = count(spec)
    mark = how("exact", "Counted from the shapes of the model's modules. The file has a short header besides")
    share = units.percent(report.trainable_percent / 100)
    return f"{report.trainable_parameters:,} numbers trained, {share}; a file of {units.size(report.adapter_bytes)}. {mark}"


def cost(done: Event, events: Sequence[Event]) -> str:
    """Time, speed and memory of a run. Nothing here measures energy, so nothing is said of it."""
    training = done.get("training_seconds") or sum(e["seconds"] for e in events if e["type"] == "step")
    speed = f"{units.significant(done['tokens_per_second'])} tokens/s" if "tokens_per_second" in done else ""
    time = f"<b>{units.seconds(training)}</b> of training, {units.seconds(done['seconds'])} with loading and measuring"
    return f"<p>{'; '.join(filter(None, (time, speed)))}.</p><p>{_memory(done)} {sentence(gear(events))}</p>"


def _memory(done: Event) -> str:
    peak, said = done.get("measured_peak_bytes"), done.get("predicted_peak_bytes")
    where = f"on {escape(done['device'])}" if "device" in done else ""
    if not peak:
        return f"Trained {where}." if where else ""
    beside = ""
    if said:
        off = said / peak - 1
        beside = f"; {units.size(said)} predicted, {units.significant(100 * abs(off), 2)}% {'above' if off > 0 else 'below'} it"
    return f"Peak memory <b>{units.size(peak)}</b> {where}{beside}."


def gear(events: Sequence[Event]) -> str:
    """How the steps of a run are launched, and why, and which operations are not fused, from its events."""
    said = [e for e in events if "gear" in e]
    if not said:
        return "steps launched one operation at a time"
    apart = [name for e in events for name in e.get("not_fused", ())]
    rest = f"; not fused: {escape(', '.join(apart))}" if apart else ""
    if said[-1]["gear"] == "graph":
        return "each step one CUDA graph" + rest
    return f"steps launched one operation at a time ({escape(said[-1]['why_eager'])}){rest}"


def forgetting(done: Event, spec: Resolved) -> str:
    """How much worse the model reads ordinary prose, in nats and in words, and beside recorded runs."""
    change = done.get("forgetting")
    if change is None:
        return "<p>Not measured, because the run was stopped.</p>"
    worse = "costs it no more nats a token than before"
    if change > 0:
        nats, times = bold(units.significant(change, 2)), exp(change)
        higher = (
            f"{units.significant(times, 2)} times as high"
            if times > 2
            else f"{units.significant(100 * (times - 1), 2)}% higher"
        )
        worse = f"costs it {nats} nats a token more than the base, a perplexity {higher}"
    beside = beside_recorded(change, spec)
    return f"<p>{bold(forgot(change).capitalize())}: ordinary prose {worse}.</p><p>{beside}</p>"


def beside_recorded(change: float, spec: Resolved) -> str:
    """Whether a forgetting of `change` is little or much beside that of other runs, which were recorded."""
    of, known = recorded_forgetting(str(spec.model), str(spec.task))
    others = [value for value in known if value != change]  # a recording is not beside itself
    if not others:
        return ""
    more = sum(other > change for other in others)
    said = "none" if not more else "all" if more == len(others) else str(more)
    return f"Of {len(others)} recorded runs of {of}, {said} forgot more."


@lru_cache(maxsize=32)
def recorded_forgetting(model: str, task: str) -> tuple[str, tuple[float, ...]]:
    """What was recorded, in words, and its forgetting in nats a token: the race of methods, else the model's runs."""
    lines = [line for race in recordings.of("methods")[:1] for line in race.lines if line.forgetting]
    raced = [fmean(line.forgetting) for line in lines if (line.spec["model"], line.spec["task"]) == (model, task)]
    if raced:
        return "this task, one for each method", tuple(raced)
    ended = [run["events"][-1]["forgetting"] for run in measured.runs() if run["spec"]["model"] == model]
    return "this model, one for each task and machine", tuple(value for value in ended if value is not None)
