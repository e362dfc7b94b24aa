"""Facts of a method on a model, each in a line: its count, its file, the time of a token, the memory that it needs."""

import math
from dataclasses import dataclass
from functools import lru_cache

from .. import units
from ..base.models import find
from ..catalog import FAMILIES
from ..count import ParameterReport, count, why_not
from ..errors import SpecError
from ..memory import MemoryReport, exact, predict
from ..methods import METHODS
from ..race import Line, recordings
from ..resolve import resolve
from ..room import worker
from ..spec import Resolved, RunSpec

SAME_TIME = 1.05
"""Times of a token within this ratio count as the same."""
LEAST = 0.0001
"""The percent at which the map's bars begin."""
TASKS = 50
"""The number of tasks that kiit-tutorial reckons with."""
STEP = RunSpec(model="smollm2-135m", precision="bf16", batch_size=4, sequence_length=512)
"""A step of a small model, one of those that the bench measured."""
GPU = "h100-80gb"
"""The GPU for which the Memory tab predicts, unless another one is chosen."""


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
        """The length of the bar for the trained percent: on a log scale, 0 at LEAST and 1 at 100%."""
        if self.report is None:
            return 0
        return max(0.02, math.log10(self.report.trainable_percent / LEAST) / math.log10(100 / LEAST))


@lru_cache(maxsize=64)
def places(model: str) -> list[Place]:
    """Every method of the registry. Raises SpecError where the model has no shapes to count by."""
    count(resolve(RunSpec(model=model, method=FAMILIES[0])))
    found = []
    for key in METHODS:
        reason = why_not(key, model)
        found.append(Place(key, None if reason else count(resolve(RunSpec(model=model, method=key))), reason))
    return found


def timed_race() -> recordings.Recording | None:
    """The fullest recorded race of all methods, in which the time of a token was measured; None before there is one."""
    return next(iter(recordings.of("methods")), None)


def race_lines() -> dict[str, Line]:
    """The line of each method whose token was timed in that race."""
    race = timed_race()
    lines = race.lines if race else ()
    return {line.spec["method"]: line for line in reversed(lines) if not line.error and line.apart}


def token_time(key: str) -> str:
    """How long a token takes with a method, as recorded; in the registry's words where it is not."""
    line = race_lines().get(key)
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
    """A method's count, its time and whether it merges."""
    folds = "" if METHODS[key].in_place else f" It {merging(key)}."
    return f"{counted(key, model)} {token_time(key)}{folds}"


def merging(key: str) -> str:
    return "merges into the weights" if METHODS[key].merge else "cannot be merged"


def small() -> tuple[Resolved, Resolved]:
    """A small model's step with full fine-tuning, and with LoRA."""
    return resolve(STEP.but(method="full", gpu=GPU)), resolve(STEP.but(method="lora", rank=16, gpu=GPU))


def automatic(model: str, *keys: str) -> tuple[Resolved, ...]:
    """Methods at their automatic settings, on the GPU of the Memory tab."""
    return tuple(resolve(RunSpec(model=model, method=key, gpu=GPU)) for key in keys)


def predicted(*specs: Resolved) -> tuple[MemoryReport, ...]:
    """Memory of runs that are compared with each other: traced where every trace is known, else by the closed form."""
    traces = [trace for spec in specs if (trace := worker.known(exact, spec))]
    return tuple(traces if len(traces) == len(specs) else map(predict, specs))


def needed(report: MemoryReport) -> str:
    """What a run needs, as the Memory tab says it: `about` before the closed form's number, states alone where it has none."""
    about = "" if report.source == "trace" or report.process is None else "about "
    return about + units.size(report.needed) + (" and its activations" if report.unknown else "")
