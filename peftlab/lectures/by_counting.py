"""Tests of statements that count, predict or look up: each takes the `given` of a statement and returns a finding."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from .. import units
from ..base import architecture, models
from ..catalog import PAPERS, PRESETS, entry_of
from ..count import BYTES, ParameterReport, count
from ..memory import predict, storage
from ..methods import METHODS
from ..resolve import resolve
from ..spec import RunSpec
from . import facts
from .statements import FAILS, HOLDS, OPEN, STATEMENTS, Finding, decided

UNITS: dict[str, Callable[[float], str]] = {
    "bytes": units.size,
    "parameters": "{:,.0f}".format,
    "percent": lambda value: units.percent(value / 100),
    "times": "{:,.0f} times".format,
}
"""How a number is written in each unit; percent are of the model's parameters."""


@dataclass(frozen=True)
class Number:
    """A number that a lecture gives, and the same quantity here."""

    value: float
    """What the lecture gives; the upper end of a range."""
    unit: str
    """A key of UNITS."""
    quantity: str
    """Which of our numbers it is: an attribute of ParameterReport, Storage (`storage_full`, `storage_adapters`) or
    MemoryReport; or `times_fewer`, all parameters over the trainable ones."""
    spec: Mapping[str, object]
    """The run that it is about."""
    convention: str = "exact"
    trainable: int | None = None
    """Trainable parameters, where the lecture gives them and names no method's settings."""
    tasks: int = 1
    matrix: Sequence[int] | None = None
    """(outputs, inputs) of the one matrix that it is about; None where it is about a model."""
    least: float | None = None
    """The lower end of a range, 0 where the lecture gives only the upper; None where it gives one number."""

    def computed(self) -> float:
        """Our number, in `unit`. Raises SpecError for a run that cannot be."""
        spec = resolve(RunSpec.from_dict(self.spec))
        if self.matrix:
            matrix = architecture.Module("the matrix", "linear", {"weight": tuple(self.matrix)})
            return matrix.weight if self.quantity == "weights" else METHODS["lora"].trained(matrix, spec)
        if self.quantity == "times_fewer":
            return 100 / count(spec).trainable_percent
        if self.convention == "exact" and self.trainable is None:
            return getattr(count(spec), self.quantity)
        report = predict(spec, self.convention, self.trainable)
        if self.quantity == "trainable_percent":
            return 100 * report.trainable_parameters / report.total_parameters
        if self.quantity.startswith("storage_"):
            return getattr(storage(report, self.tasks), self.quantity.removeprefix("storage_"))
        return getattr(report, self.quantity)


def percents() -> list[tuple[float, RunSpec]]:
    """Each percent that a lecture gives as one number, and the run that it is about."""
    found = [Number(**s.given) for s in STATEMENTS.values() if s.test == "number"]
    return [
        (n.value, RunSpec.from_dict(n.spec)) for n in found if n.quantity == "trainable_percent" and n.least is None
    ]


def number(**given: Any) -> Finding:
    """Our number is within the lecture's range, or rounds to its one number at as many digits as that has."""
    stated = Number(**given)
    found = stated.computed()
    digits = len(Decimal(str(stated.value)).normalize().as_tuple().digits)
    rounded = float(f"{found:.{digits - 1}e}")
    so = rounded == stated.value if stated.least is None else stated.least <= found <= stated.value
    return decided(so, UNITS[stated.unit](found))


def reading(method: str = "", of: str = "", words: str = "", holds: bool | None = True) -> Finding:
    """A person compared the lecture's words with these, or with the field `of` of what the registry says of a method."""
    verdict = OPEN if holds is None else HOLDS if holds else FAILS
    return Finding(verdict, words or getattr(METHODS[method].about, of), read=True)


def family(method: str, wanted: str) -> Finding:
    about = METHODS[method].about
    return decided(about.family == wanted, about.family + (", reparameterized" if about.reparameterized else ""))


def paper(method: str, authors: str, year: int) -> Finding:
    papers = [PAPERS[key] for key in METHODS[method].about.papers]
    cited = next((p for p in papers if p.authors.startswith(authors) and p.year == year), None)
    return decided(cited is not None, (cited or papers[0]).citation)


def preset(key: str, **wanted: float) -> Finding:
    """The published settings that the app offers are the lecture's."""
    found = entry_of("preset", key, PRESETS)
    own = {**found.settings, "alpha_over_rank": found.alpha_over_rank, "epochs": found.epochs}
    return decided(all(own.get(name) == value for name, value in wanted.items()), f"{found.name}: {found.says}")


def merges(method: str, can: bool) -> Finding:
    return decided((METHODS[method].merge is not None) == can, f"{METHODS[method].name} {facts.merging(method)}")


def place(method: str, wanted: str) -> Finding:
    """The trained parts stand in the data's path in series with the frozen ones, or in parallel."""
    drawing = METHODS[method].drawing
    places = {"series": drawing.main, "parallel": drawing.branch}
    found = [name for name, boxes in places.items() if any(box.startswith("*") for box in boxes)]
    return decided(found == [wanted], f"in {' and '.join(found)}: {METHODS[method].about.inference}")


def time(method: str, wanted: str) -> Finding:
    """The added time of a token is `zero`, `slight` (less than a Houlsby adapter's) or one that `adds`.

    Without a recorded time, a method that merges counts as zero and any other as not.
    """
    lines = facts.race_lines()
    line, adapters = lines.get(method), lines.get("houlsby")
    if line is None or line.apart is None:
        return decided((METHODS[method].merge is not None) == (wanted == "zero"), METHODS[method].about.inference)
    final = line.merged or line.apart
    slight = adapters is not None and adapters.apart is not None and final < adapters.apart
    so = {"zero": final <= facts.SAME_TIME, "adds": final > facts.SAME_TIME, "slight": slight}[wanted]
    return decided(so, facts.token_time(method))


def _counts(model: str, *methods: str) -> list[ParameterReport]:
    """The parameters of methods at their automatic settings."""
    return [count(resolve(RunSpec(model=model, method=method))) for method in methods]


def file(method: str, model: str, below: Sequence[str] = ()) -> Finding:
    """An adapter's file is smaller than each of `below` on a model; without any, than 5% of the model's own 16-bit file."""
    report, *others = _counts(model, method, *below)
    share = report.adapter_bytes / (report.total_parameters * BYTES["bf16"])
    beside = "".join(f"; {r.method_name} {units.size(r.adapter_bytes)}" for r in others)
    so = all(report.adapter_bytes < r.adapter_bytes for r in others) if others else share < 0.05
    size = f"{units.size(report.adapter_bytes)} on {report.model_name}"
    return decided(so, f"{size}, {units.percent(share)} of its own 16-bit file{beside}")


def fewer(method: str, than: Sequence[str], model: str) -> Finding:
    """A method trains fewer parameters than each of `than`."""
    found = {r.method_name: r.trainable_parameters for r in _counts(model, method, *than)}
    mine, *others = found.values()
    text = "; ".join(f"{name} {n:,}" for name, n in found.items())
    return decided(mine < min(others), f"{text} on {models.find(model).name}")


def same(method: str, other: str, model: str) -> Finding:
    a, b = (report.trainable_parameters for report in _counts(model, method, other))
    return decided(a == b, f"{a:,} and {b:,} on {models.find(model).name}")


def extra(method: str, over: str, model: str) -> Finding:
    """A method trains one number more than another for each output of the adapted maps."""
    mine, other = _counts(model, method, over)
    more = mine.trainable_parameters - other.trainable_parameters
    outputs = sum(m.module.d_out * m.adapted_layers for m in mine.modules if m.adapted_layers)
    text = f"{more:,} more than {other.method_name} on {mine.model_name}: one for each of {outputs:,} outputs"
    return decided(more == outputs, text)


def virtual(method: str, model: str, per_layer: bool) -> Finding:
    """Virtual tokens are vectors once at the input, or a key and a value in every layer."""
    (report,), shape = _counts(model, method), architecture.of(model)
    tokens, f = report.spec.virtual_tokens, shape.facts
    sizes = (2, tokens, shape.n_layers, f.kv_heads * f.head_size) if per_layer else (tokens, shape.hidden_size)
    text = f"{report.trainable_parameters:,} = {' × '.join(f'{size:,}' for size in sizes)} on {report.model_name}"
    return decided(report.trainable_parameters == math.prod(sizes), text)


def matrix(model: str, role: str, rank: int) -> Finding:
    """LoRA trains 2·d·r numbers for a weight, whichever of its sides d is."""
    module = architecture.of(model).targets(role)[0]
    found = rank * (module.d_in + module.d_out)
    sides = sorted({2 * d * rank for d in (module.d_in, module.d_out)})
    given = " or ".join(f"{n:,}" for n in sides)
    text = f"{models.find(model).name}, {role}, rank {rank}: r(d + k) = {found:,}; 2·d·r gives {given}"
    return decided(sides == [found], text)


def _states(spec: Mapping[str, object], convention: str, trainable: int | None = None) -> int:
    """Bytes of weights, gradients and optimizer states."""
    return predict(resolve(RunSpec.from_dict(spec)), convention, trainable).states


def reduced(
    spec: Mapping[str, object], than: Mapping[str, object], convention: str, trainable: int | None = None
) -> Finding:
    """Weights, gradients and optimizer states of one run are less than half of another's."""
    mine, other = _states(spec, convention, trainable), _states(than, convention)
    text = f"{units.size(mine)} of weights, gradients and optimizer states, against {units.size(other)}"
    return decided(2 * mine < other, text)


def gpus(spec: Mapping[str, object], convention: str, least: int, most: int, trainable: int | None = None) -> Finding:
    """At least `least` GPUs of 80 GB, as kiit-tutorial counts them and as the larger A100 is, hold a run; `most` are enough."""
    n = math.ceil(_states(spec, convention, trainable) / 80e9)
    return decided(least <= n <= most, f"{n} of 80 GB hold the weights, gradients and optimizer states")


def all_tasks(
    spec: Mapping[str, object], convention: str = "exact", trainable: int | None = None, tasks: int = facts.TASKS
) -> Finding:
    """One base and an adapter for each task take less room than copies of the model."""
    of = storage(predict(resolve(RunSpec.from_dict(spec)), convention, trainable), tasks)
    one = of.base + of.adapters
    text = f"{tasks:,} tasks: {units.size(one)} with the one base, {units.size(of.adapters / tasks)} a task"
    return decided(one < of.full, f"{text}, against {units.size(of.full)} of copies")


def cheaper(method: str, than: str, model: str) -> Finding:
    """A method is predicted to need less memory than another at their automatic settings."""
    mine, other = facts.predicted(*facts.automatic(model, method, than))
    text = f"{facts.needed(mine)} against {facts.needed(other)} predicted for {mine.model_name}"
    return decided(mine.needed < other.needed, text)


def registered(name: str) -> Finding:
    known = [m.name for m in METHODS.values()]
    near = ", ".join(n for n in known if n.startswith(name.rstrip("+")))
    return decided(name in known, name if name in known else f"no paper defines {name}; there are {near}")
