"""The PEFT project's published benchmark: runs of many methods on one model and task, read from its CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .. import units
from ..catalog.methods import FAMILIES
from ..errors import SpecError
from ..methods import METHODS
from ..places import ASSETS
from ..spec import closest

FILE = ASSETS / "published" / "peft_benchmark.csv"
SOURCE = (
    "the PEFT project's own method comparison: Llama-3.2-3B on MetaMathQA and GSM8K, one run each on an NVIDIA L40S"
)
URL = "https://github.com/huggingface/peft/tree/main/method_comparison"
PLAIN = "lora/llama-3.2-3B-rank32"
"""The run that others are held against: LoRA as its paper has it."""


@dataclass(frozen=True)
class Run:
    experiment: str
    kind: str
    """Its name for the method: LORA, PROMPT_TUNING, …"""
    trainable_parameters: int
    accuracy: float
    """Share of GSM8K's test questions answered right."""
    seconds: float
    """Of training."""
    peak_bytes: int
    """GPU memory that PyTorch reserved, at the peak."""
    file_bytes: int
    """Of the saved adapter."""
    forgetting: float
    """Rise of the cross-entropy, in nats per token, on a sample of Wikipedia."""
    date: str

    @property
    def variant(self) -> str:
        """What the experiment's name says beside the method and the model."""
        return self.experiment.split("3B-", 1)[-1]

    @property
    def method(self) -> str | None:
        """The registry's key for what was trained; None where it has no such method. A variant may be one of its own."""
        plain = self.kind.lower().replace("_", "-")
        names = (*reversed(self.variant.split("-")), plain, plain.removesuffix("-tuning"))
        return next((name for name in names if name in METHODS), None)

    @property
    def family(self) -> str | None:
        return METHODS[self.method].about.family if self.method else None

    @property
    def name(self) -> str:
        """The method's, ours where it is ours."""
        return METHODS[self.method].name if self.method else self.kind.replace("_", " ")

    @property
    def label(self) -> str:
        """For people: `LoRA rank 32`."""
        parts = [p for p in self.variant.split("-") if p not in ("default", self.method)]
        said = re.sub(r"-(?=[a-z])", " ", re.sub(r"\brank(\d+)", r"rank \1", "-".join(parts))).replace("_", " ")
        return f"{self.name} {said}" if said and self.family != FAMILIES[0] else self.name


@dataclass(frozen=True)
class Metric:
    key: str
    title: str
    of: Callable[[Run], float]
    show: Callable[[float], str]
    scale: float = 1
    """What one of the axis's units is worth; the title names the unit."""
    high_is_good: bool = False
    log: bool = False


METRICS: dict[str, Metric] = {
    m.key: m
    for m in (
        Metric("accuracy", "accuracy, %", lambda r: r.accuracy, lambda v: f"{100 * v:.1f}%", 0.01, high_is_good=True),
        Metric("parameters", "trained parameters", lambda r: r.trainable_parameters, lambda v: f"{v:,.0f}", log=True),
        Metric("memory", "peak memory, GB", lambda r: r.peak_bytes, units.size, 1e9),
        Metric("time", "training time, minutes", lambda r: r.seconds, units.seconds, 60),
        Metric("file", "adapter file, MB", lambda r: r.file_bytes, units.size, 1e6, log=True),
        Metric("forgetting", "forgetting, nats per token", lambda r: r.forgetting, units.significant, log=True),
    )
}


def metric(key: str) -> Metric:
    """Raises SpecError where there is none."""
    if key not in METRICS:
        raise SpecError(f"metric={key}: no such metric; {closest(key, METRICS)}")
    return METRICS[key]


@lru_cache
def runs(file: Path = FILE) -> tuple[Run, ...]:
    """Every run that succeeded, in the file's order."""
    with file.open(encoding="utf-8", newline="") as rows:
        return tuple(
            Run(
                row["experiment"],
                row["peft_type"],
                int(row["trainable"]),
                float(row["test_accuracy"]),
                float(row["train_seconds"]),
                int(row["peak_reserved_bytes"]),
                int(row["file_bytes"]),
                float(row["forgetting"]),
                row["date"],
            )
            for row in csv.DictReader(rows)
            if row["status"] == "success"
        )


def plain() -> Run:
    return next(r for r in runs() if r.experiment == PLAIN)


def full() -> Run:
    """The yardstick: every parameter trained."""
    return next(r for r in runs() if r.family == FAMILIES[0])


def adapted() -> tuple[Run, ...]:
    """All the others."""
    return tuple(r for r in runs() if r.family != FAMILIES[0])


def best(of: Sequence[Run]) -> Run:
    return max(of, key=lambda r: r.accuracy)


def of_method(key: str) -> list[Run]:
    return [r for r in runs() if r.method == key]


def front(x: Metric, y: Metric) -> list[Run]:
    """The runs that no other beats in both, by x: another is as good in each and better in one."""

    def costs(run: Run) -> tuple[float, float]:
        """The smaller, the better."""
        return tuple(-m.of(run) if m.high_is_good else m.of(run) for m in (x, y))  # type: ignore[return-value]

    def beaten(run: Run) -> bool:
        a, b = costs(run)
        return any(p <= a and q <= b and (p, q) != (a, b) for p, q in map(costs, runs()))

    return sorted((r for r in runs() if not beaten(r)), key=x.of)


def notable() -> list[tuple[str, Run]]:
    """The runs that a chart names: what each is called, and it."""
    top, prompt = best(runs()), best(of_method("prompt"))
    return [(f"best: {top.name}", top), (full().name, full()), (plain().label, plain()), (prompt.name, prompt)]


def front_said(x: Metric, y: Metric) -> str:
    """The front in words."""
    named = [f"{r.label} ({x.show(x.of(r))}; {y.show(y.of(r))})" for r in front(x, y)]
    if len(named) == 1:
        return f"One run is the best in both: {named[0]}."
    return f"On the line, {len(named)} of {len(runs())} runs, which no other run beats in both: {'; '.join(named)}."


def not_memory() -> str:
    """Few parameters are not little memory, from the runs."""
    few, many = min(of_method("prompt"), key=lambda r: r.peak_bytes), plain()
    relation = "more" if few.peak_bytes > many.peak_bytes else "less"
    return (
        f"Parameters are not memory: {few.name} trains {few.trainable_parameters:,} numbers and peaks at "
        f"{units.size(few.peak_bytes)}, {relation} than {many.label} with {many.trainable_parameters:,} at "
        f"{units.size(many.peak_bytes)}."
    )
