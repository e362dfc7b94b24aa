"""The PEFT project's published benchmark: runs of many methods on one model and task, read from its CSV."""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .. import units
from ..catalog import FAMILIES, entry_of
from ..methods import METHODS
from ..places import ASSETS

SOURCE = (
    "the PEFT project's own method comparison: Llama-3.2-3B on MetaMathQA and GSM8K, one run each on an NVIDIA L40S"
)
URL = "https://github.com/huggingface/peft/tree/main/method_comparison"


@dataclass(frozen=True)
class Run:
    experiment: str
    kind: str
    """The benchmark's name for the method: LORA, PROMPT_TUNING, …"""
    trainable_parameters: int
    accuracy: float
    """Share of GSM8K's test questions answered right."""
    seconds: float
    """How long the training took."""
    peak_bytes: int
    """The most GPU memory that PyTorch reserved."""
    file_bytes: int
    """The size of the saved adapter."""
    forgetting: float
    """How much the cross-entropy on a sample of Wikipedia rose, in nats per token."""
    date: str

    @property
    def variant(self) -> str:
        """The part of the experiment's name after the method and the model."""
        return self.experiment.split("3B-", 1)[-1]

    @property
    def method(self) -> str | None:
        """The registry's key of the method; None where it has no such method. The registry may list a variant as a method."""
        plain = self.kind.lower().replace("_", "-")
        names = (*reversed(self.variant.split("-")), plain, plain.removesuffix("-tuning"))
        return next((name for name in names if name in METHODS), None)

    @property
    def family(self) -> str | None:
        return METHODS[self.method].about.family if self.method else None

    @property
    def name(self) -> str:
        """The method's name: ours where the app has the method, else the benchmark's."""
        return METHODS[self.method].name if self.method else self.kind.replace("_", " ")

    @property
    def label(self) -> str:
        """The run's name for people: `LoRA rank 32`."""
        parts = [p for p in self.variant.split("-") if p not in ("default", self.method)]
        said = re.sub(r"-(?=[a-z])", " ", re.sub(r"\brank(\d+)", r"rank \1", "-".join(parts))).replace("_", " ")
        return f"{self.name} {said}" if said and self.family != FAMILIES[0] else self.name


@dataclass(frozen=True)
class Metric:
    title: str
    of: Callable[[Run], float]
    show: Callable[[float], str]
    scale: float = 1
    """The size of the unit that `title` names."""
    high_is_good: bool = False
    log: bool = False

    def told(self, run: Run) -> str:
        """A run's value, as people read it."""
        return self.show(self.of(run))


METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy, %", lambda r: r.accuracy, lambda v: f"{100 * v:.1f}%", 0.01, high_is_good=True),
    "parameters": Metric("trained parameters", lambda r: r.trainable_parameters, "{:,.0f}".format, log=True),
    "memory": Metric("peak memory, GB", lambda r: r.peak_bytes, units.size, 1e9),
    "time": Metric("training time, minutes", lambda r: r.seconds, units.seconds, 60),
    "file": Metric("adapter file, MB", lambda r: r.file_bytes, units.size, 1e6, log=True),
    "forgetting": Metric("forgetting, nats per token", lambda r: r.forgetting, units.significant, log=True),
}


def metric(key: str) -> Metric:
    """Raises SpecError where there is none."""
    return entry_of("metric", key, METRICS)


@lru_cache
def runs() -> tuple[Run, ...]:
    """Every run that succeeded, in the file's order."""
    with (ASSETS / "published" / "peft_benchmark.csv").open(encoding="utf-8", newline="") as rows:
        return tuple(
            Run(
                row["experiment"], row["peft_type"], int(row["trainable"]), float(row["test_accuracy"]),
                float(row["train_seconds"]), int(row["peak_reserved_bytes"]), int(row["file_bytes"]),
                float(row["forgetting"]), row["date"],
            )
            for row in csv.DictReader(rows)
            if row["status"] == "success"
        )  # fmt: skip


def plain() -> Run:
    """The run that the others are compared with: LoRA as its paper has it."""
    return next(r for r in runs() if r.experiment == "lora/llama-3.2-3B-rank32")


def full() -> Run:
    """Full fine-tuning."""
    return of_method("full")[0]


def best(of: Sequence[Run]) -> Run:
    """The most accurate run."""
    return max(of, key=METRICS["accuracy"].of)


def of_method(key: str) -> list[Run]:
    return [r for r in runs() if r.method == key]


def front(x: Metric, y: Metric) -> list[Run]:
    """The runs in the order of x that no other beats: none is as good in both metrics and better in one."""
    costs = {run: [-m.of(run) if m.high_is_good else m.of(run) for m in (x, y)] for run in runs()}

    def beaten(a: float, b: float) -> bool:
        return any(p <= a and q <= b and [p, q] != [a, b] for p, q in costs.values())

    return sorted((run for run, cost in costs.items() if not beaten(*cost)), key=x.of)


def notable() -> list[tuple[str, Run]]:
    """The runs that a chart names, each with the name it has there."""
    top, prompt = best(runs()), best(of_method("prompt"))
    return [(f"best: {top.name}", top), (full().name, full()), (plain().label, plain()), (prompt.name, prompt)]


def front_said(x: Metric, y: Metric) -> str:
    """The front in words."""
    named = [f"{r.label} ({x.told(r)}; {y.told(r)})" for r in front(x, y)]
    if len(named) == 1:
        return f"One run is the best in both: {named[0]}."
    return f"On the line, {len(named)} of {len(runs())} runs, which no other run beats in both: {'; '.join(named)}."


def not_memory() -> str:
    """A sentence with two of the runs, in which fewer trained parameters take more memory."""
    few, many = min(of_method("prompt"), key=lambda r: r.peak_bytes), plain()
    relation = "more" if few.peak_bytes > many.peak_bytes else "less"
    return (
        f"Parameters are not memory: {few.name} trains {few.trainable_parameters:,} numbers and peaks at "
        f"{units.size(few.peak_bytes)}, {relation} than {many.label} with {many.trainable_parameters:,} at "
        f"{units.size(many.peak_bytes)}."
    )


@lru_cache
def of_benchmark() -> dict[str, str]:
    """The benchmark in sentences, by name."""
    whole, lora, others = full(), plain(), [r for r in runs() if r.family != FAMILIES[0]]
    top, prompt, worst = best(others), best(of_method("prompt")), max(others, key=lambda r: r.forgetting)
    better = sum(r.accuracy > whole.accuracy for r in others)
    slower, more = sum(r.seconds > whole.seconds for r in others), sum(r.forgetting > whole.forgetting for r in others)
    score, lost = METRICS["accuracy"].told, METRICS["forgetting"].told
    return {
        "beats_full": f"In the published benchmark {better} of {len(others)} PEFT runs score above full fine-tuning "
        f"({score(whole)}); the best, {top.label}, reaches {score(top)}.",
        "near_full": f"In the published benchmark {lora.label} scores {score(lora)}, full fine-tuning {score(whole)}.",
        "forgetting": f"In the published benchmark full fine-tuning, at its low learning rate, forgets {lost(whole)} nats "
        f"per token, {lora.label} forgets {lost(lora)}, and {more} of {len(others)} PEFT runs more than full; "
        f"the most is {lost(worst)}, {worst.label}.",
        "quick": f"In the published benchmark {lora.label} trains in {units.seconds(lora.seconds)}, full fine-tuning in "
        f"{units.seconds(whole.seconds)}, and {slower} of {len(others)} PEFT runs take longer than full.",
        "steering": f"On Llama-3.2-3B, in the published benchmark, the best prompt-tuning run scores {score(prompt)}, "
        f"{lora.label} {score(lora)}.",
        "not_memory": not_memory(),
    }
