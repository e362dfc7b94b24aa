"""Sentences that stand beside the lectures' advice: what is counted, predicted, published or raced here.

None has a number of its own: each is computed for a model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from .. import units
from ..base.models import MODELS
from ..count import count, why_not
from ..errors import SpecError
from ..memory import predict
from ..memory import storage as stored
from ..methods import METHODS
from ..race import recordings
from ..resolve import resolve
from ..spec import RunSpec
from . import facts, published
from .findings import finding
from .guide import Case, Sides
from .statements import STATEMENTS


def beats_full(model: str) -> str:
    full, others = published.full(), published.adapted()
    better, best = sum(r.accuracy > full.accuracy for r in others), published.best(others)
    return (
        f"In the published benchmark {better} of {len(others)} PEFT runs score above full fine-tuning "
        f"({_accuracy(full)}); the best, {best.label}, reaches {_accuracy(best)}."
    )


def _accuracy(run: published.Run) -> str:
    return published.METRICS["accuracy"].show(run.accuracy)


def near_full(model: str) -> str:
    plain, full = published.plain(), published.full()
    return f"In the published benchmark {plain.label} scores {_accuracy(plain)}, full fine-tuning {_accuracy(full)}."


def small_memory(model: str) -> str:
    full, lora = facts.predicted(*facts.small())
    tokens = f"{facts.STEP.batch_size} × {facts.STEP.sequence_length} tokens"
    return (
        f"{full.model_name}, 16-bit, {tokens}: full fine-tuning is predicted to need {facts.needed(full)}, "
        f"LoRA of rank 16 on every linear layer {facts.needed(lora)}."
    )


@lru_cache
def suits(model: str) -> str:
    known = [key for key, entry in MODELS.items() if entry.config is not None]
    suited = {key: sum(not why_not(key, m) for m in known) for key in METHODS}
    least = min(suited, key=lambda key: suited[key])
    everywhere = sum(n == len(known) for n in suited.values())
    return (
        f"Of the {len(known)} architectures in this app's catalogue, {everywhere} of {len(METHODS)} methods suit all, LoRA "
        f"{suited['lora']} and {METHODS[least].name}, the most particular, {suited[least]}."
    )


def quantized(model: str) -> str:
    lora, qlora = facts.predicted(*facts.automatic(model, "lora", "qlora"))
    memory = f"LoRA {facts.needed(lora)}, QLoRA {facts.needed(qlora)}"
    return f"Predicted for {lora.model_name} at automatic settings: {memory}."


def latency(model: str) -> str:
    return " ".join(f"{METHODS[key].name}: {facts.token_time(key)}" for key in ("lora", "houlsby"))


def storage(model: str) -> str:
    report = predict(resolve(RunSpec(model=model, method="lora")))
    of = stored(report, facts.TASKS)
    return (
        f"{facts.TASKS} tasks on {report.model_name}, 16-bit: {units.size(of.full)} as full copies; as LoRA adapters "
        f"{units.size(of.adapters)} beside one base of {units.size(of.base)}."
    )


def smallest(model: str) -> str:
    reports = [count(resolve(RunSpec(model=model, method=key))) for key in METHODS if not why_not(key, model)]
    least = sorted(reports, key=lambda r: r.adapter_bytes)[:4]
    return f"Smallest files here: {', '.join(f'{r.method_name} {units.size(r.adapter_bytes)}' for r in least)}."


def forgetting(model: str) -> str:
    full, plain, others = published.full(), published.plain(), published.adapted()
    worst, more = max(others, key=lambda r: r.forgetting), sum(r.forgetting > full.forgetting for r in others)
    show = published.METRICS["forgetting"].show
    return (
        f"In the published benchmark full fine-tuning, at its low learning rate, forgets {show(full.forgetting)} nats per "
        f"token, {plain.label} forgets {show(plain.forgetting)}, and {more} of {len(others)} PEFT runs more than full; "
        f"the most is {show(worst.forgetting)}, {worst.label}."
    )


def quick(model: str) -> str:
    full, plain, others = published.full(), published.plain(), published.adapted()
    slower = sum(r.seconds > full.seconds for r in others)
    return (
        f"In the published benchmark {plain.label} trains in {units.seconds(plain.seconds)}, full fine-tuning in "
        f"{units.seconds(full.seconds)}, and {slower} of {len(others)} PEFT runs take longer than full."
    )


def steering(model: str) -> str:
    prompt, plain = published.best(published.of_method("prompt")), published.plain()
    return (
        f"On Llama-3.2-3B, in the published benchmark, the best prompt-tuning run scores {_accuracy(prompt)}, "
        f"{plain.label} {_accuracy(plain)}."
    )


def no_bias(model: str) -> str:
    return facts.counted("bitfit", model)


def beside_adapters(model: str) -> str:
    prefix, houlsby = (count(resolve(RunSpec(model=model, method=key))) for key in ("prefix", "houlsby"))
    relation = "fewer" if prefix.trainable_parameters < houlsby.trainable_parameters else "no fewer"
    return (
        f"Prefix tuning trains {prefix.trainable_parameters:,} numbers here, {relation} than the Houlsby adapter's "
        f"{houlsby.trainable_parameters:,}; a wide adapter or a long prefix turns that round."
    )


def not_memory(model: str) -> str:
    return published.not_memory()


HERE: dict[str, Callable[[str], str]] = {
    sentence.__name__: sentence
    for sentence in (
        beats_full, near_full, small_memory, suits, quantized, latency, storage, smallest, forgetting, quick, steering, no_bias,
        beside_adapters, not_memory,
    )
}  # fmt: skip
"""Sentences by name. Each takes a catalogue key, or whatever else has shapes, and raises SpecError where it has none."""


def beside(piece: Case | Sides, model: str) -> str:
    """What stands beside a piece of advice, for a model; empty where there is nothing to say."""
    said = []
    if piece.here:
        with suppress(SpecError):  # the model has no shapes to count by
            said.append(HERE[piece.here](model))
    if piece.raced:
        hardware = recordings.of(STATEMENTS[piece.raced].lesson)[0].hardware
        said.append(f"In the race recorded here on {hardware}: {finding(piece.raced).words}.")
    return " ".join(said)
