"""RunSpec: what a fine-tuning run is. Every setting exists once, here, with its meaning, range and default."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from operator import gt, le, lt
from typing import Any
from urllib.parse import urlencode

from .errors import SpecError

Json = dict[str, Any]
"""A JSON object as Python reads and writes it."""


@dataclass(frozen=True)
class Setting:
    """What a field of RunSpec means and which values it takes."""

    meaning: str
    automatic: str  # what `None` becomes, in words
    type: type = str  # taken from the field's annotation
    low: float | None = None
    high: float | None = None
    above: float | None = None  # an open lower limit: the value must be larger than this
    choices: tuple[str, ...] = ()
    example: str = ""  # a value that works, named when another one is refused; the automatic one where that is a number


def setting(meaning: str, automatic: str, **rest: Any) -> Any:
    """A field of RunSpec; `rest` are fields of Setting."""
    example = automatic if automatic.isdigit() else ""
    return field(default=None, metadata={"setting": Setting(meaning, automatic, **{"example": example} | rest)})


@dataclass(frozen=True)
class RunSpec:
    """A fine-tuning run. A field left at `None` is automatic: `resolve` fills it. Raises SpecError for a value out of range."""

    model: str | None = setting(
        "base model: a catalogue key, Hub id, folder, config.json, or a bare count such as 100B",
        "smollm2-135m-instruct",
    )
    method: str | None = setting("fine-tuning method", "lora")
    rank: int | None = setting("rank r of the update ΔW = BA", "8", low=1, high=65536)
    alpha: float | None = setting(
        "scale of the update: ΔW is multiplied by alpha / rank", "2 × rank", above=0, high=1e6, example="16"
    )
    dropout: float | None = setting(
        "share of the adapter's inputs zeroed while training", "0", low=0, high=0.9, example="0.05"
    )
    target_modules: str | None = setting(
        "modules that get an adapter: all-linear, or names by comma", "the method's own, by role"
    )
    layers: str | None = setting("layers that are adapted: all, first:4, last:4 or 0-3,7", "all")
    virtual_tokens: int | None = setting("learned vectors put before the prompt", "20", low=1, high=4096)
    bottleneck: int | None = setting("width of a bottleneck adapter", "16", low=1, high=65536)
    block_size: int | None = setting("block size of OFT", "16", low=1, high=65536)
    lr_ratio: float | None = setting("LoRA+: B's learning rate over A's", "16", above=0, high=1e4)
    train_norms: bool | None = setting("BitFit: train the norms' parameters too", "no")
    precision: str | None = setting(
        "number format of the base model",
        "bf16 on CUDA and on CPUs that multiply it, else fp32; where its weights are trained, amp and fp32",
        choices=("bf16", "fp16", "fp32", "amp"),
    )
    adapter_precision: str | None = setting("number format of the trained adapter", "fp32", choices=("bf16", "fp32"))
    quantization: str | None = setting("quantization of the frozen base", "none", choices=("none", "nf4", "int8"))
    double_quantization: bool | None = setting("quantize NF4's scales too", "yes")
    optimizer: str | None = setting(
        "optimizer",
        "adamw",
        choices=("adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "lion", "sgd", "sgd-momentum"),
    )
    optimizer_precision: str | None = setting(
        "number format of the optimizer's states", "the parameters'", choices=("parameters", "fp32")
    )
    batch_size: int | None = setting("examples in one forward pass", "the task's", low=1, high=65536, example="4")
    accumulation: int | None = setting("forward passes before one optimizer step", "1", low=1, high=65536)
    sequence_length: int | None = setting(
        "longest example; longer ones are refused", "the task's", low=8, high=10_000_000, example="128"
    )
    gradient_checkpointing: bool | None = setting("recompute activations instead of keeping them", "no")
    attention: str | None = setting(
        "attention implementation", "sdpa, or eager for a family that has no other", choices=("sdpa", "eager")
    )
    hold_outputs: bool | None = setting("keep the logits alive through the backward pass", "no")
    learning_rate: float | None = setting("peak learning rate", "the method's own", above=0, high=10, example="0.002")
    steps: int | None = setting("optimizer steps", "the task's", low=1, high=1_000_000, example="40")
    task: str | None = setting("what is learned", "ticket")
    training_rows: int | None = setting(
        "how many of the task's training rows are used, drawn by the seed", "all", low=1, high=10_000_000, example="32"
    )
    seed: int | None = setting("seed of data order, initialization and dropout", "0", low=0, high=2**31 - 1)
    gpu: str | None = setting("GPU the memory is compared with", "what is there")
    n_gpus: int | None = setting("number of GPUs", "1", low=1, high=65536)
    sharding: str | None = setting(
        "how several GPUs share the states", "none", choices=("none", "ddp", "zero1", "zero2", "zero3", "fsdp")
    )
    offload: str | None = setting("what moves to CPU memory", "none", choices=("none", "optimizer", "parameters"))

    def __post_init__(self) -> None:
        for name, value in self.to_dict().items():
            is_short = isinstance(value, (str, int, float)) and not (isinstance(value, str) and len(value) > KNOWN)
            object.__setattr__(self, name, (_known if is_short else _checked)(name, value))
        if self.layers:
            parse_layers(self.layers, None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSpec:
        """The run that parsed JSON or strings describe. Raises SpecError for an unknown name, with the closest known one."""
        for name in values:
            if name not in SETTINGS:
                raise SpecError(f"{name}: no such setting; {closest(name, SETTINGS)}")
        return cls(**{name: value for name, value in values.items() if value not in (None, "")})

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """The run that a JSON object describes. Raises SpecError."""
        try:
            values = json.loads(text.lstrip("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise SpecError(f'this is not JSON ({error}); write an object such as {{"rank": 8}}') from None
        if not isinstance(values, dict):
            raise SpecError(f'a spec is a JSON object, not a {type(values).__name__}; write one such as {{"rank": 8}}')
        return cls.from_dict(values)

    def to_dict(self) -> Json:
        """The settings that were set; automatic fields are left out."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}

    def to_query(self) -> str:
        """The settings that were set as the query part of a link."""
        given = self.to_dict().items()
        return urlencode({n: str(v).lower() if isinstance(v, bool) else str(v).removesuffix(".0") for n, v in given})

    def but(self, **changes: Any) -> RunSpec:
        """This run with other settings; None makes one automatic again. Raises SpecError for a value out of range."""
        return RunSpec(**self.to_dict() | changes)


@dataclass(frozen=True)
class Resolved(RunSpec):
    """A run as it is counted, predicted and trained: `resolve` makes it, and no setting is None.

    What the run does not read is 0, empty or False. `but` gives a RunSpec again, since one setting may decide others;
    `dataclasses.replace` changes a number and nothing else.
    """

    model: str = ""
    method: str = ""
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    target_modules: str = ""
    layers: str = ""
    virtual_tokens: int = 0
    bottleneck: int = 0
    block_size: int = 0
    lr_ratio: float = 0.0
    train_norms: bool = False
    precision: str = ""
    adapter_precision: str = ""
    quantization: str = ""
    double_quantization: bool = False
    optimizer: str = ""
    optimizer_precision: str = ""
    batch_size: int = 0
    accumulation: int = 0
    sequence_length: int = 0
    gradient_checkpointing: bool = False
    attention: str = ""
    hold_outputs: bool = False
    learning_rate: float = 0.0
    steps: int = 0
    task: str = ""
    training_rows: int = 0
    seed: int = 0
    gpu: str = ""
    n_gpus: int = 0
    sharding: str = ""
    offload: str = ""
    unread: frozenset[str] = frozenset()  # names of the settings that the run does not read

    @property
    def trained_precision(self) -> str:
        """Number format of the trained parameters: the adapter's, or the base's where its own are trained."""
        return self.adapter_precision or self.precision

    def to_dict(self) -> Json:
        """The settings that the run reads."""
        return {name: getattr(self, name) for name in SETTINGS if name not in self.unread}


_TYPES = {f"{kind.__name__} | None": kind for kind in (str, int, float, bool)}
SETTINGS: dict[str, Setting] = {
    f.name: replace(f.metadata["setting"], type=_TYPES[str(f.type)]) for f in fields(RunSpec)
}


KNOWN = 64
"""Letters of a value that is kept with what `_checked` made of it: one question of the page's makes ten specs."""


def _checked(name: str, value: object) -> object:
    """`value` as the field's type. Raises SpecError, with the value, the limit and the fix, where it is out of range."""
    about = SETTINGS[name]
    shown = f"{name.replace('_', '-')}={value}"
    fix = f"; try {about.example}" if about.example else ""
    if about.type is bool:
        if (word := str(value).lower()) not in ("true", "yes", "1", "false", "no", "0"):
            raise SpecError(f"{shown}: this is yes or no; write true or false")
        return word in ("true", "yes", "1")
    if about.type is str:
        if not isinstance(value, str) or not value.strip():
            raise SpecError(f"{shown}: this is a name; {about.meaning}")
        if about.choices and value not in about.choices:
            raise SpecError(f"{shown}: {closest(value, about.choices)}")
        return value.strip()
    try:
        number = float(str(value))
        if isinstance(value, bool) or not math.isfinite(number) or (about.type is int and number != int(number)):
            raise ValueError
    except ValueError:
        kind = "a whole number" if about.type is int else "a number"
        raise SpecError(f"{shown}: {about.meaning} is {kind}{fix}") from None
    for said, limit, beyond in ("at least", about.low, lt), ("more than", about.above, le), ("at most", about.high, gt):
        if limit is not None and beyond(number, limit):
            raise SpecError(f"{shown}: {about.meaning} must be {said} {limit:g}{fix}")
    return int(number) if about.type is int else number


_known = lru_cache(maxsize=4096, typed=True)(_checked)


def closest(value: str, known: Iterable[str]) -> str:
    """'did you mean …?' with the nearest names; else the first 30 that would have worked, or eight of more than that."""
    names = list(known)
    if near := difflib.get_close_matches(value, names, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(near)}?"
    more = f" or {len(names) - 8} others." if len(names) > 30 else ""
    return f"choose one of {', '.join(names[:8] if more else names)}{more}"


def parse_layers(text: str, n_layers: int | None) -> tuple[int, ...]:
    """Layer indices of `all`, `first:4`, `last:4` or `0-3,7`. Without `n_layers` only the form is checked. Raises SpecError."""
    if text == "all":
        return tuple(range(n_layers or 0))
    limit = 10**6 if n_layers is None else n_layers
    side, _, number = text.partition(":")
    has, fix = f"layers 0 to {limit - 1}", f"0-{limit - 1}"
    try:
        if side in ("first", "last"):
            has, fix, count = f"{limit} layers", f"{side}:{limit}", int(number)
            runs = [(0, count - 1) if side == "first" else (limit - count, limit - 1)]
        else:
            parts = [part.partition("-") for part in text.split(",")]
            runs = [(int(first), int(last or first)) for first, _, last in parts]
        if any(low > high for low, high in runs):
            raise ValueError
    except ValueError:
        raise SpecError(f"layers={text}: not a selection of layers; write all, first:4, last:4 or 0-3,7") from None
    if any(low < 0 or high >= limit for low, high in runs):  # before ranges are made: a link may ask for any number
        raise SpecError(f"layers={text}: the model has {has}; try {fix}")
    return tuple(sorted({n for low, high in runs for n in range(low, high + 1)})) if n_layers else ()
