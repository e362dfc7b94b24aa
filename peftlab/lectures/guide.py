"""Which method, and whether any: what the lectures advise and weigh up, and what is found of it here, with computed numbers."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial

from .. import memory, units
from ..base.models import MODELS
from ..catalog import FAMILIES
from ..count import count, why_not
from ..errors import SpecError
from ..methods import METHODS
from ..race import recordings
from ..resolve import resolve
from ..spec import RunSpec
from . import data, facts
from .lessons import finding
from .published import of_benchmark
from .statements import STATEMENTS

GROUPS = {
    "none": "Before any training",
    "full": "Where PEFT may be the wrong tool",
    "peft": "What matters most",
    "gemma": "What lecture 11.2 says of Gemma 3 270M",
}


@dataclass(frozen=True)
class Family:
    key: str
    idea: str
    """Its idea in a word."""
    says: str

    def __post_init__(self) -> None:
        if self.key not in FAMILIES:
            raise LookupError(f"family={self.key}: guide.json has a family that is none of {', '.join(FAMILIES)}")


@dataclass(frozen=True)
class Case:
    """A situation, and what to do in it."""

    key: str
    group: str
    when: str
    advice: str
    why: str
    source: str
    methods: tuple[str, ...] = ()
    """The methods to use, the first one first; none where the advice is not to train."""
    here: str = ""
    """The sentence of OF_MODEL or of `of_benchmark` that stands beside it; empty where there is nothing to compute."""
    raced: str = ""
    """The id of the statement whose recorded race stands beside it too; empty for none."""
    model: str = ""
    """The model whose counts are shown; empty for the run's own."""
    differs: bool = False
    """What is found here is not what the lecture says."""
    ticked: bool = False
    """It is ticked when the page opens."""


@dataclass(frozen=True)
class Sides:
    """Pros and cons of an aspect of PEFT or of a kind of method."""

    source: str
    of: str
    pros: tuple[str, ...]
    cons: tuple[str, ...]
    methods: tuple[str, ...] = ()
    """The methods whose counts and times stand beside them."""
    here: str = ""
    raced: str = ""
    """Both as for a Case."""


_entries = data("guide.json")
SPECTRUM = tuple(Family(**entry) for entry in _entries["families"])
"""The families, in the order of how deep they reach."""
CASES = {entry["key"]: Case(**entry) for entry in _entries["cases"]}
SIDES = tuple(Sides(**entry) for entry in _entries["sides"])


def small_memory(model: str) -> str:
    full, lora = facts.predicted(*facts.small())
    return (
        f"{full.model_name}, 16-bit, {facts.STEP.batch_size} × {facts.STEP.sequence_length} tokens: full fine-tuning is "
        f"predicted to need {facts.needed(full)}, LoRA of rank 16 on every linear layer {facts.needed(lora)}."
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
    found = f"LoRA {facts.needed(lora)}, QLoRA {facts.needed(qlora)}"
    return f"Predicted for {lora.model_name} at automatic settings: {found}."


def latency(model: str) -> str:
    return " ".join(f"{METHODS[key].name}: {facts.token_time(key)}" for key in ("lora", "houlsby"))


def storage(model: str) -> str:
    report = memory.predict(resolve(RunSpec(model=model, method="lora")))
    of = memory.storage(report, facts.TASKS)
    return (
        f"{facts.TASKS} tasks on {report.model_name}, 16-bit: {units.size(of.full)} as full copies; as LoRA adapters "
        f"{units.size(of.adapters)} beside one base of {units.size(of.base)}."
    )


def smallest(model: str) -> str:
    reports = [count(resolve(RunSpec(model=model, method=key))) for key in METHODS if not why_not(key, model)]
    least = sorted(reports, key=lambda r: r.adapter_bytes)[:4]
    return f"Smallest files here: {', '.join(f'{r.method_name} {units.size(r.adapter_bytes)}' for r in least)}."


def beside_adapters(model: str) -> str:
    prefix, houlsby = (count(resolve(RunSpec(model=model, method=key))) for key in ("prefix", "houlsby"))
    relation = "fewer" if prefix.trainable_parameters < houlsby.trainable_parameters else "no fewer"
    return (
        f"Prefix tuning trains {prefix.trainable_parameters:,} numbers here, {relation} than the Houlsby adapter's "
        f"{houlsby.trainable_parameters:,}; a wide adapter or a long prefix turns that round."
    )


OF_MODEL: Mapping[str, Callable[[str], str]] = {
    sentence.__name__: sentence
    for sentence in (small_memory, suits, quantized, latency, storage, smallest, beside_adapters)
} | {"no_bias": partial(facts.counted, "bitfit")}
"""Sentences by name. Each takes a catalogue key, or whatever else has shapes, and raises SpecError where it has none."""


def beside(piece: Case | Sides, model: str) -> str:
    """What stands beside a piece of advice, for a model; empty where there is nothing to say."""
    said = []
    if piece.here in OF_MODEL:
        with suppress(SpecError):  # the model has no shapes to count by
            said.append(OF_MODEL[piece.here](model))
    elif piece.here:
        said.append(of_benchmark()[piece.here])
    if piece.raced:
        hardware = recordings.of(STATEMENTS[piece.raced].lesson)[0].hardware
        said.append(f"In the race recorded here on {hardware}: {finding(piece.raced).words}.")
    return " ".join(said)
