"""What is found here of a lecture's words: counts, predictions, published runs and recorded times, said in a line.

`HERE` holds sentences about a model; none has a number of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .. import units
from ..base.models import MODELS, find
from ..catalog.methods import FAMILIES
from ..count import ParameterReport, count, why_not
from ..errors import SpecError
from ..memory import MemoryReport, exact, predict
from ..memory import storage as stored
from ..methods import METHODS
from ..places import ASSETS
from ..resolve import resolve
from ..room import worker
from ..spec import Resolved, RunSpec
from . import published
from .lessons import LESSONS

if TYPE_CHECKING:
    from ..race import Line

RACE = ASSETS / "measured" / "race-methods-h100.json"
LEAST = 0.0001
"""Percent where the map's bars begin."""
TASKS = 50
"""As kiit-tutorial has it."""
STEP = RunSpec(model="smollm2-135m", precision="bf16", batch_size=4, sequence_length=512)
"""A step of a small model, one of those that the bench measured."""
GPU = "h100-80gb"
"""For which the Memory tab predicts, unless another one is chosen."""


@dataclass(frozen=True)
class Place:
    """A method on the map, at its automatic settings."""

    key: str
    report: ParameterReport | None
    """None where the method does not suit the model."""
    reason: str = ""
    """Why it does not."""

    @property
    def length(self) -> float:
        """Of the bar that stands for the trained percent: on a log scale, 0 at LEAST and 1 at 100%."""
        if self.report is None:
            return 0
        return max(0.02, math.log10(self.report.trainable_percent / LEAST) / math.log10(100 / LEAST))


def places(model: str) -> list[Place]:
    """Every method of the registry. Raises SpecError where the model has no shapes to count by."""
    count(resolve(RunSpec(model=model, method=FAMILIES[0])))
    reasons = {key: why_not(key, model) for key in METHODS}
    return [
        Place(key, None if why else count(resolve(RunSpec(model=model, method=key))), why)
        for key, why in reasons.items()
    ]


@lru_cache
def race_lines(file: Path = RACE) -> dict[str, Line]:
    """The recorded race's line of each method that finished; none where there is no recording."""
    from ..race import Line

    if not file.exists():
        return {}
    lines = [Line(**line) for line in json.loads(file.read_text(encoding="utf-8"))["lines"]]
    return {line.spec["method"]: line for line in reversed(lines) if not line.error and line.apart}


def race_source(file: Path = RACE) -> str:
    """Hardware, date, versions and command of the recorded race; empty where there is none."""
    if not file.exists():
        return ""
    of = json.loads(file.read_text(encoding="utf-8"))
    libraries = ", ".join(f"{name} {version}" for name, version in of["versions"].items())
    return f"{of['hardware']}, {of['date']}, {libraries}. Command: {of['command']}"


def token_time(key: str) -> str:
    """How long a token takes with a method, as recorded; in the registry's words where it is not."""
    line = race_lines(RACE).get(key)
    if line is None or line.apart is None:
        return METHODS[key].about.inference
    whole = line.merged if METHODS[key].in_place and line.merged else line.apart
    merged = f" apart, {line.merged:.2f}× merged" if line.merged and whole == line.apart else ""
    return f"Measured on {find(line.spec['model']).name}, a token takes {whole:.2f}× the base's time{merged}."


def counted(key: str, model: str) -> str:
    """What a method trains on a model and how large its file is, or why it does not suit it."""
    try:
        report = count(resolve(RunSpec(model=model, method=key)))
    except SpecError as error:
        return told(str(error))
    return (
        f"{report.method_name} trains {report.trainable_parameters:,} of {report.total_parameters:,} numbers "
        f"({units.percent(report.trainable_percent / 100)}); its file has {units.size(report.adapter_bytes)}."
    )


def told(reason: str) -> str:
    """A refusal as a sentence, without the name of the setting."""
    text = reason.split(": ", 1)[-1]
    return f"{text[0].upper()}{text[1:]}."


def of_method(key: str, model: str) -> str:
    """Its count, its time and whether it merges."""
    folds = "" if METHODS[key].in_place else f" It {merging(key)}."
    return f"{counted(key, model)} {token_time(key)}{folds}"


def merging(key: str) -> str:
    return "merges into the weights" if METHODS[key].merge else "cannot be merged"


def small() -> tuple[Resolved, Resolved]:
    """A small model's step, whole and with LoRA."""
    return resolve(STEP.but(method="full", gpu=GPU)), resolve(STEP.but(method="lora", rank=16, gpu=GPU))


def automatic(model: str, *keys: str) -> tuple[Resolved, ...]:
    """Methods at their automatic settings, on the GPU of the Memory tab."""
    return tuple(resolve(RunSpec(model=model, method=key, gpu=GPU)) for key in keys)


def predicted(*specs: Resolved) -> tuple[MemoryReport, ...]:
    """Of runs that are held against each other: traced where every trace is known, else by the closed form."""
    traces = tuple(worker.known(exact, spec) for spec in specs)
    return traces if all(traces) else tuple(map(predict, specs))


def needed(report: MemoryReport) -> str:
    """What a run needs, as the Memory tab says it; a closed form is about right."""
    is_about = report.source != "trace" and report.process is not None
    return ("about " if is_about else "") + units.size(report.needed)


def raced(says: str) -> str:
    """What the race recorded here says to a lecture's claim."""
    for lesson in LESSONS.values():
        record = lesson.recordings()[0]
        for claim, found in lesson.findings(record.lines):
            if claim.says == says and found:
                return f" In the race recorded here on {record.hardware}: {found.text}."
    raise LookupError(f"claim={says}: no recorded race says anything to it")


def _beats_full(model: str) -> str:
    full, others = published.full(), published.adapted()
    better, best = sum(r.accuracy > full.accuracy for r in others), published.best(others)
    return (
        f"In the published benchmark {better} of {len(others)} PEFT runs score above full fine-tuning "
        f"({_accuracy(full)}); the best, {best.label}, reaches {_accuracy(best)}."
    )


def _accuracy(run: published.Run) -> str:
    return published.METRICS["accuracy"].show(run.accuracy)


def _near_full(model: str) -> str:
    plain, full = published.plain(), published.full()
    return (
        f"In the published benchmark {plain.label} scores {_accuracy(plain)}, full fine-tuning {_accuracy(full)}."
        + raced("LoRA comes near full fine-tuning")
    )


def _small_memory(model: str) -> str:
    full, lora = predicted(*small())
    return (
        f"{full.model_name}, 16-bit, {STEP.batch_size} × {STEP.sequence_length} tokens: full fine-tuning is predicted to "
        f"need {needed(full)}, LoRA of rank 16 on every linear layer {needed(lora)}."
    )


@lru_cache
def _suits(model: str) -> str:
    known = [key for key, entry in MODELS.items() if entry.config is not None]
    suited = {key: sum(not why_not(key, m) for m in known) for key in METHODS}
    least = min(suited, key=lambda key: suited[key])
    everywhere = sum(n == len(known) for n in suited.values())
    return (
        f"Of the {len(known)} architectures in this app's catalogue, {everywhere} of {len(METHODS)} methods suit all, LoRA "
        f"{suited['lora']} and {METHODS[least].name}, the most particular, {suited[least]}."
    )


def _quantized(model: str) -> str:
    lora, qlora = predicted(*automatic(model, "lora", "qlora"))
    return f"Predicted for {lora.model_name} at automatic settings: LoRA {needed(lora)}, QLoRA {needed(qlora)}."


def _latency(model: str) -> str:
    return " ".join(f"{METHODS[key].name}: {token_time(key)}" for key in ("lora", "houlsby"))


def _storage(model: str) -> str:
    report = predict(resolve(RunSpec(model=model, method="lora")))
    of = stored(report, TASKS)
    return (
        f"{TASKS} tasks on {report.model_name}, 16-bit: {units.size(of.full)} as full copies; as LoRA adapters "
        f"{units.size(of.adapters)} beside one base of {units.size(of.base)}."
    )


def _smallest(model: str) -> str:
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
        f"the most is {show(worst.forgetting)}, {worst.label}." + raced("PEFT forgets less")
    )


def _quick(model: str) -> str:
    full, plain, others = published.full(), published.plain(), published.adapted()
    slower = sum(r.seconds > full.seconds for r in others)
    return (
        f"In the published benchmark {plain.label} trains in {units.seconds(plain.seconds)}, full fine-tuning in "
        f"{units.seconds(full.seconds)}, and {slower} of {len(others)} PEFT runs take longer than full."
        + raced("PEFT trains faster")
    )


def _steering(model: str) -> str:
    prompt, plain = published.best(published.of_method("prompt")), published.plain()
    return (
        f"On Llama-3.2-3B, in the published benchmark, the best prompt-tuning run scores {_accuracy(prompt)}, "
        f"{plain.label} {_accuracy(plain)}." + raced("Prompts score substantially lower on small models")
    )


def _no_bias(model: str) -> str:
    reason = why_not("bitfit", model)
    return told(reason) if reason else counted("bitfit", model)


def _beside_adapters(model: str) -> str:
    prefix, houlsby = (count(resolve(RunSpec(model=model, method=key))) for key in ("prefix", "houlsby"))
    relation = "fewer" if prefix.trainable_parameters < houlsby.trainable_parameters else "no fewer"
    return (
        f"Prefix tuning trains {prefix.trainable_parameters:,} numbers here, {relation} than the Houlsby adapter's "
        f"{houlsby.trainable_parameters:,}; a wide adapter or a long prefix turns that round."
    )


HERE: dict[str, Callable[[str], str]] = {
    "beats-full": _beats_full,
    "near-full": _near_full,
    "small-memory": _small_memory,
    "suits": _suits,
    "quantized": _quantized,
    "latency": _latency,
    "storage": _storage,
    "smallest": _smallest,
    "forgetting": forgetting,
    "quick": _quick,
    "steering": _steering,
    "no-bias": _no_bias,
    "beside-adapters": _beside_adapters,
    "gemma-best": lambda model: raced("For Gemma 3 270M LoRA is the best choice").strip(),
    "gemma-prompts": lambda model: raced("For Gemma 3 270M avoid prompts: too small").strip(),
    "not-memory": lambda model: published.not_memory(),
}
"""Sentences about a catalogue key or whatever else has shapes. They raise SpecError where it has none."""


def here(name: str, model: str) -> str:
    """The sentence `name` about `model`; empty for no name and where there is nothing to say of it."""
    try:
        return HERE[name](model) if name else ""
    except SpecError:
        return ""
