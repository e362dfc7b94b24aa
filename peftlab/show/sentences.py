"""Findings as people read them: each tab's opening sentence, and what a reader would not expect.

Sentences are small HTML in which `<b class="frozen">` and the like carry the palette's meaning; everything that is not
ours (a model's name, an answer) is escaped.
"""

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean

from .. import units
from ..base import architecture as architectures
from ..catalog import GPUS
from ..compare import BASE, ComparisonReport
from ..compare.lowrank import Spectrum
from ..data import tasks
from ..memory import MemoryReport, Moment
from ..race import Line
from ..run.events import Event
from .marks import bold
from .settings import gpu_name, method_name

SENTENCES = {
    "full": "Full fine-tuning of {model} needs {full}.",
    "chosen": "{method} needs {chosen}: {ratio}× {less}{where}.",
    "one": "{it} one {gpu}",
    "several": "{it_takes} {n} × {gpu}",
}
"""The parts of Memory's opening sentence. The page fills the same words on every move of a slider."""


def memory_sentence(full: MemoryReport, chosen: MemoryReport) -> str:
    """What full fine-tuning needs, what the chosen method needs, and which GPUs hold that.

    An estimate is marked as one and names no GPU: the exact figure, which follows it on the page, may name another.
    """
    estimated = chosen.peak is not None and chosen.source == "closed-form"
    about = "about " if estimated else ""
    begin = SENTENCES["full"].format(model=bold(full.model_name), full=about + bold(units.size(full.needed)))
    where = "" if estimated else _where(chosen)
    if chosen.spec.method == "full":
        return begin + (f" {where[0].upper()}{where[1:]}." if where else "")
    ratio = full.needed / chosen.needed
    return f"{begin} " + SENTENCES["chosen"].format(
        method=bold(method_name(chosen), "trained"),
        chosen=about + bold(units.size(chosen.needed), "trained"),
        ratio=about + units.significant(max(ratio, 1 / ratio)),
        less="less" if ratio >= 1 else "more",
        where=f", and {where}" if where else "",
    )


def it(report: MemoryReport) -> dict[str, str]:
    """What the sentence says of the run: that it fits as a whole, or that its states alone do."""
    if report.process is None:
        return {"it": "these alone fit", "it_takes": "these alone take"}
    return {"it": "it fits", "it_takes": "it takes"}


def _where(report: MemoryReport) -> str:
    """The smallest GPU that holds the run, or how many of the largest one do."""
    *_, largest = GPUS.values()
    if one := next((g for g in GPUS.values() if report.needed <= g.memory_bytes), None):
        return SENTENCES["one"].format(**it(report), gpu=gpu_name(one))
    n = -(-report.needed // largest.memory_bytes)
    return SENTENCES["several"].format(**it(report), n=f"{n:,}", gpu=gpu_name(largest))


def memory_surprises(full: MemoryReport, chosen: MemoryReport) -> list[str]:
    """What a reader would not expect of these two predictions, the most surprising first; none where a convention counts."""
    peak, spec = chosen.peak, chosen.spec
    if full.peak is None or peak is None:
        return []
    logits, batch, facts = peak.bytes["logits"], _batch(peak), architectures.of(spec.model).facts
    found = _against_full(full, chosen, full.peak, peak)
    if logits > 0.25 * peak.total:
        found.append(
            f"The logits alone take {units.size(logits)}: a number for each of {spec.batch_size * spec.sequence_length:,} "
            "tokens and every word of the vocabulary, in fp32, then its softmax, then its gradient."
        )
    if batch > 0.5 * peak.total:
        found.append(
            f"Activations and logits are {units.percent(batch / peak.total)} of the peak. They follow batch × length, not "
            "the number of trained parameters."
        )
    if spec.rank and spec.precision == "bf16" and spec.adapter_precision == "fp32" and not spec.gradient_checkpointing:
        found.append(
            "A frozen linear layer keeps nothing for the backward pass. An adapted one keeps its input a second time, cast "
            "to the adapter's fp32."
        )
    if facts.experts:
        each = f"All {facts.experts} experts of every layer weigh"
        found.append(f"{each}, though a token meets {facts.experts_per_token} of them.")
    if chosen.outside:
        paged = f"{units.size(chosen.outside)} of optimizer states are paged"
        found.append(f"{paged}: they move to the CPU when the GPU is full.")
    return found


def _batch(peak: Moment) -> int:
    """Bytes that follow the batch."""
    return peak.bytes["activations"] + peak.bytes["logits"]


def _against_full(full: MemoryReport, chosen: MemoryReport, a: Moment, b: Moment) -> list[str]:
    """That a method needs more at its peak `b` than full fine-tuning does at its peak `a`, or hardly less."""
    saved = full.gradients + full.optimizer - chosen.gradients - chosen.optimizer
    more = _batch(b) - _batch(a)
    spared = more - (b.total - a.total)
    if chosen.spec.method == "full" or b.total <= 0.75 * a.total or (saved <= 0 and b.total <= a.total):
        return []
    if b.total <= a.total:
        return [
            f"{units.size(saved)} of gradients and optimizer states are gone, and memory is only "
            f"{units.percent(1 - b.total / a.total)} lower: the rest does not depend on how much is trained."
        ]
    reason = (
        f"at the peak it spares {units.size(spared)} of weights, gradients and optimizer states, and keeps "
        f"{units.size(more)} more for the backward pass."
        if spared > 0
        else f"it trains {chosen.trainable_parameters:,} numbers, beside a model of {chosen.total_parameters:,}."
    )
    return [f"{chosen.method_name} needs more memory than full fine-tuning here. The reason: {reason}"]


def study_sentence(role: str, layer: int, weight: Spectrum, deltas: Mapping[str, Spectrum], share: float) -> str:
    """How many directions hold `share` of the energy of W, and of each update by name."""
    most = weight.rank_for(share)
    needs = {name: delta.rank_for(share) for name, delta in deltas.items()}
    said = ", ".join(f"of {escape(name)} {bold(str(n), 'trained')}" for name, n in needs.items())
    widest = max(needs.values())
    end = (
        f"Only the updates are low-rank: W needs {units.significant(most / widest, 2)} times as many as the widest of them."
        if widest < most / 2
        else "Not every update here is low-rank."
    )
    return (
        f"{units.percent(share)} of the energy of layer {layer}'s {escape(role)} matrix needs {bold(str(most), 'frozen')} of "
        f"its {len(weight.values)} directions; of the update {said}. {end}"
    )


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


def last_of(events: Sequence[Event], kind: str) -> Event | None:
    """The last event of a kind, None where there is none."""
    return next((e for e in reversed(events) if e["type"] == kind), None)


def live_sentence(events: Sequence[Event]) -> str:
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


def compare_sentence(report: ComparisonReport) -> str:
    """On how many items the last adapter is better than the base, and on how many worse, and how much it forgot."""
    adapted = [s for s in report.scores if s.model != BASE][-1]
    scores = [{r.model: r.score or 0 for r in e.replies} for e in report.exchanges]
    wins = sum(score[adapted.model] > score[BASE] for score in scores)
    losses = sum(score[adapted.model] < score[BASE] for score in scores)
    text = f"{bold('The adapter', 'trained')} wins {bold(str(wins))} of {len(scores)}, loses {bold(str(losses))}"
    change = adapted.forgetting
    if change is None:
        return f"{text}."
    if change <= 0:
        return f"{text}, and reads ordinary text no worse than before."
    # nats per token: 0.05 is a 5% and 0.3 a 35% rise of perplexity
    much = "almost nothing" if change < 0.05 else "a little" if change < 0.3 else "a lot"
    return f"{text}, and on ordinary text is {units.significant(change, 2)} nats a token worse: it forgot {much}."
