"""Findings as people read them: each tab's opening sentence, and what a reader would not expect.

Sentences are small HTML in which `<b class="frozen">` and the like carry the palette's meaning; everything that is not
ours (a model's name, an answer) is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ..base import architecture as architectures
from ..base import models
from ..catalog.gpus import GPU, GPUS
from ..compare import BASE, ComparisonReport
from ..compare.lowrank import Spectrum
from ..count import ParameterReport
from ..data import tasks
from ..memory import MemoryReport
from ..methods.where import where
from ..units import percent, score, seconds, significant, size

if TYPE_CHECKING:
    from ..race import Line


def bold(text: str, meaning: str = "") -> str:
    return f'<b class="{meaning}">{escape(text)}</b>' if meaning else f"<b>{escape(text)}</b>"


SENTENCES = {
    "full": "Full fine-tuning of {model} needs {full}.",
    "chosen": "{method} needs {chosen}: {ratio}× {less}{where}.",
    "one": "{it} one {gpu}",
    "several": "{it_takes} {n} × {gpu}",
    "lora": "{what} on {where} trains {trained} of {total} numbers: {percent}. The adapter is {size}.",
}
"""Opening sentences. The page fills the same words on every move of a slider."""


def memory_sentence(full: MemoryReport, chosen: MemoryReport) -> str:
    """What full fine-tuning needs, what the chosen method needs, and what holds it.

    An estimate is marked as one and names no GPU: the exact figure, which follows it on the page, may name another.
    """
    estimated = chosen.peak is not None and chosen.source == "closed-form"
    about = "about " if estimated else ""
    begin = SENTENCES["full"].format(model=bold(full.model_name), full=about + bold(size(full.needed)))
    where = "" if estimated else _where(chosen)
    if chosen.spec.method == "full":
        return begin + (f" {where[0].upper()}{where[1:]}." if where else "")
    ratio = full.needed / chosen.needed
    return f"{begin} " + SENTENCES["chosen"].format(
        method=bold(method_name(chosen), "trained"),
        chosen=about + bold(size(chosen.needed), "trained"),
        ratio=about + significant(max(ratio, 1 / ratio)),
        less="less" if ratio >= 1 else "more",
        where=f", and {where}" if where else "",
    )


def it(report: MemoryReport) -> dict[str, str]:
    """How the sentence speaks of the run: whole, or of its states alone."""
    whole = report.process is not None
    return (
        {"it": "it fits", "it_takes": "it takes"}
        if whole
        else {"it": "these alone fit", "it_takes": "these alone take"}
    )


def _where(report: MemoryReport) -> str:
    if one := next((g for g in GPUS.values() if report.needed <= g.memory_bytes), None):
        return SENTENCES["one"].format(**it(report), gpu=escape(gpu_name(one)))
    largest = list(GPUS.values())[-1]
    n = -(-report.needed // largest.memory_bytes)
    return SENTENCES["several"].format(**it(report), n=f"{n:,}", gpu=escape(gpu_name(largest)))


def memory_surprises(full: MemoryReport, chosen: MemoryReport) -> list[str]:
    """What a reader would not expect of these two predictions, the most surprising first; none without a step."""
    a, b = full.peak, chosen.peak
    if a is None or b is None:
        return []
    spec, name = chosen.spec, escape(chosen.method_name)
    tokens = spec.batch_size * spec.sequence_length
    batch = b.bytes["activations"] + b.bytes["logits"]
    saved = full.gradients + full.optimizer - chosen.gradients - chosen.optimizer
    found = []
    if spec.method != "full" and b.total > a.total:
        more = batch - a.bytes["activations"] - a.bytes["logits"]
        spared = more - (b.total - a.total)
        found.append(
            f"{name} needs more memory than full fine-tuning here. The reason: "
            + (
                f"at the peak it spares {size(spared)} of weights, gradients and optimizer states, and keeps {size(more)} more "
                "for the backward pass."
                if spared > 0
                else f"it trains {chosen.trainable_parameters:,} numbers, beside a model of {chosen.total_parameters:,}."
            )
        )
    elif spec.method != "full" and saved > 0 and b.total > 0.75 * a.total:
        found.append(
            f"{size(saved)} of gradients and optimizer states are gone, and memory is only {percent(1 - b.total / a.total)} "
            "lower: the rest does not depend on how much is trained."
        )
    if b.bytes["logits"] > 0.25 * b.total:
        found.append(
            f"The logits alone take {size(b.bytes['logits'])}: a number for each of {tokens:,} tokens and every word of the "
            "vocabulary, in fp32, then its softmax, then its gradient."
        )
    if batch > 0.5 * b.total:
        found.append(
            f"Activations and logits are {percent(batch / b.total)} of the peak. They follow batch × length, not the number of "
            "trained parameters."
        )
    if spec.rank and spec.precision == "bf16" and spec.adapter_precision == "fp32" and not spec.gradient_checkpointing:
        found.append(
            "A frozen linear layer keeps nothing for the backward pass. An adapted one keeps its input a second time, cast to "
            "the adapter's fp32."
        )
    experts = architectures.of(spec.model).facts
    if experts.experts:
        found.append(
            f"All {experts.experts} experts of every layer weigh, though a token meets {experts.experts_per_token} of them."
        )
    if chosen.outside:
        found.append(
            f"{size(chosen.outside)} of optimizer states are paged: they move to the CPU when the GPU is full."
        )
    return found


def gpu_name(gpu: GPU) -> str:
    """Without the vendor and the socket: V100 16 GB, RTX 4090."""
    return " ".join(w for w in gpu.name.split() if w not in ("NVIDIA", "GeForce") and not w.startswith("SXM"))


def method_name(report: MemoryReport | ParameterReport) -> str:
    """A method with the size that it was given; without one where the model is a number and has no layers to give it to."""
    spec = report.spec
    if models.find(spec.model).config is None:
        return report.method_name
    sizes = (("rank", spec.rank), ("width", spec.bottleneck), ("blocks of", spec.block_size))
    named = [f"{name} {size}" for name, size in sizes if size]
    named += [f"{spec.virtual_tokens} virtual tokens"] if spec.virtual_tokens else []
    return ", ".join((report.method_name, *named))


def lora_sentence(report: ParameterReport) -> str:
    rank = report.spec.rank
    return SENTENCES["lora"].format(
        what=f"Rank {rank}" if report.spec.method == "lora" else f"{escape(report.method_name)}, rank {rank},",
        where=escape(where(report.spec)),
        trained=bold(f"{report.trainable_parameters:,}", "trained"),
        total=bold(f"{report.total_parameters:,}", "frozen"),
        percent=bold(percent(report.trainable_percent / 100), "trained"),
        size=size(report.adapter_bytes),
    )


def study_sentence(role: str, layer: int, weight: Spectrum, deltas: Mapping[str, Spectrum], share: float) -> str:
    """How many directions hold `share` of the energy of W, and of each update by name."""
    most = weight.rank_for(share)
    needs = {name: delta.rank_for(share) for name, delta in deltas.items()}
    said = ", ".join(f"of {escape(name)} {bold(str(n), 'trained')}" for name, n in needs.items())
    widest = max(needs.values())
    end = (
        f"Only the updates are low-rank: W needs {significant(most / widest, 2)} times as many as the widest of them."
        if widest < most / 2
        else "Not every update here is low-rank."
    )
    return (
        f"{percent(share)} of the energy of layer {layer}'s {escape(role)} matrix needs {bold(str(most), 'frozen')} of its "
        f"{len(weight.values)} directions; of the update {said}. {end}"
    )


def gear(events: Sequence[dict[str, Any]]) -> str:
    """How the steps of a run are launched, and why, and what of them is not fused, from its events."""
    said = [e for e in events if "gear" in e]
    if not said:
        return "steps launched one operation at a time"
    apart = [name for e in events for name in e.get("not_fused", ())]
    rest = f"; not fused: {escape(', '.join(apart))}" if apart else ""
    if said[-1]["gear"] == "graph":
        return "each step one CUDA graph" + rest
    return f"steps launched one operation at a time ({escape(said[-1]['why_eager'])}){rest}"


def live_sentence(events: Sequence[dict[str, Any]]) -> str:
    """What a run has achieved so far, from its events."""
    start = next((e for e in events if e["type"] == "start"), None)
    last = events[-1] if events else {"type": "idle"}
    if last["type"] == "error":
        steps = sum(e["type"] == "step" for e in events)
        return f"The run ended after {steps} steps." if steps else "The run ended before it had learned anything."
    if last["type"] == "queued":
        ahead = last["ahead"]
        return f"Waiting: {ahead} run{'s' if ahead != 1 else ''} ahead of yours." if ahead else "Starting the run."
    if start is None:
        return f"Loading {escape(last.get('model', 'the model'))}."
    metric = tasks.METRICS[start["metric"]].name
    scores = [next(iter(e["metrics"].values())) for e in events if e["type"] == "eval"]
    step = next((e for e in reversed(events) if e["type"] == "step"), None)
    name = bold(start["model"], "frozen")
    if last["type"] == "done" and not last["steps"]:
        return escape(last["message"])
    if step is None:
        return f"{name} answers {start['heldout']} held-out items before it has learned anything."
    total = sum(e["seconds"] for e in events if e["type"] == "step")
    read = f"{name} has read {step['examples']} examples in {seconds(total)}."
    if not scores:
        return read
    before = bold(score(scores[0]), "frozen")
    if len(scores) == 1:
        return f"{read} {metric} before: {before}."
    return f"{read} {metric}: {before} → {bold(score(scores[-1]), 'trained')} on items it has never seen."


def race_sentence(lines: Sequence[Line]) -> str:
    """Who scores highest and lowest of a race's lines, so far."""
    finished = sorted((line for line in lines if line.scores), key=lambda line: -line.score)
    if not finished:
        return f"{len(lines)} racers, the same rows in the same order. None has finished yet."
    best, last = finished[0], finished[-1]
    base = sum(best.base_scores) / len(best.base_scores)
    early = sum(line.error is not None for line in lines if not line.scores)
    counts = {"ended early": early, "to come": len(lines) - len(finished) - early}
    rest = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    who = f"{len(lines)} racers" + (f" ({rest})" if rest else "")
    text = (
        f"Of {who}, {bold(best.name, 'trained')} scores highest: {bold(score(best.score), 'trained')} of held-out items "
        f"(the base {bold(score(base), 'frozen')})."
    )
    return text if last is best else f"{text} Lowest: {escape(last.name)}, {bold(score(last.score))}."


def compare_sentence(report: ComparisonReport) -> str:
    adapted = [s for s in report.scores if s.model != BASE][-1]
    rows = [
        (
            next(r.score or 0 for r in e.replies if r.model == BASE),
            next(r.score or 0 for r in e.replies if r.model == adapted.model),
        )
        for e in report.exchanges
    ]
    wins, losses = sum(a > b for b, a in rows), sum(a < b for b, a in rows)
    text = f"{bold('The adapter', 'trained')} wins {bold(str(wins))} of {len(rows)}, loses {bold(str(losses))}"
    if adapted.forgetting is None:
        return text + "."
    change = adapted.forgetting
    verdict = (
        "it forgot almost nothing" if change < 0.05 else "it forgot a little" if change < 0.3 else "it forgot a lot"
    )  # nats per token: 0.05 is a 5% and 0.3 a 35% rise of perplexity
    if change <= 0:
        return f"{text}, and reads ordinary text no worse than before."
    return f"{text}, and on ordinary text is {significant(change, 2)} nats a token worse: {verdict}."
