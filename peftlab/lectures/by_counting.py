"""Tests of statements that count, predict or look up: each takes the `given` of a statement and returns a finding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import units
from ..base import architecture
from ..base.models import find
from ..catalog import PAPERS, find_preset
from ..count import BYTES, ParameterReport, count
from ..memory import predict, storage
from ..methods import METHODS
from ..resolve import resolve
from ..spec import RunSpec
from . import facts
from .recomputed import Number
from .statements import FAILS, HOLDS, OPEN, Finding, decided

SAME_TIME = 1.05
"""Times a token within this ratio count as the same."""
SMALL = 0.05
"""An adapter's file is small below this share of the model's own 16-bit file."""
GPU_BYTES = 80e9
"""Memory of the GPUs that kiit-tutorial counts, and of the larger A100."""


def number(**given: Any) -> Finding:
    return Number(**given).finding()


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
    found = find_preset(key)
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
    so = {"zero": final <= SAME_TIME, "adds": final > SAME_TIME, "slight": slight}[wanted]
    return decided(so, facts.token_time(method))


def _counts(model: str, *methods: str) -> list[ParameterReport]:
    """The parameters of methods at their automatic settings."""
    return [count(resolve(RunSpec(model=model, method=method))) for method in methods]


def file(method: str, model: str, below: Sequence[str] = ()) -> Finding:
    """An adapter's file is smaller than each of `below` on the same model; without any, it is SMALL."""
    report, *others = _counts(model, method, *below)
    share = report.adapter_bytes / (report.total_parameters * BYTES["bf16"])
    beside = "".join(f"; {r.method_name} {units.size(r.adapter_bytes)}" for r in others)
    size, model_name = units.size(report.adapter_bytes), report.model_name
    so = all(report.adapter_bytes < r.adapter_bytes for r in others) if others else share < SMALL
    return decided(so, f"{size} on {model_name}, {units.percent(share)} of its own 16-bit file{beside}")


def fewer(method: str, than: Sequence[str], model: str) -> Finding:
    """A method trains fewer parameters than each of `than`."""
    reports = _counts(model, method, *than)
    text = "; ".join(f"{r.method_name} {r.trainable_parameters:,}" for r in reports)
    mine, *others = (r.trainable_parameters for r in reports)
    return decided(mine < min(others), f"{text} on {find(model).name}")


def same(method: str, other: str, model: str) -> Finding:
    a, b = (report.trainable_parameters for report in _counts(model, method, other))
    return decided(a == b, f"{a:,} and {b:,} on {find(model).name}")


def extra(method: str, over: str, model: str) -> Finding:
    """A method trains one number more than another for each output of the adapted maps."""
    mine, other = _counts(model, method, over)
    more = mine.trainable_parameters - other.trainable_parameters
    outputs = sum((m.d_out or 0) * m.adapted_layers for m in mine.modules)
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
    text = f"{find(model).name}, {role}, rank {rank}: r(d + k) = {found:,}; 2·d·r gives {given}"
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
    """At least `least` GPUs hold a run, and `most` are enough."""
    n = math.ceil(_states(spec, convention, trainable) / GPU_BYTES)
    text = f"{n} of {units.size(GPU_BYTES)} hold the weights, gradients and optimizer states"
    return decided(least <= n <= most, text)


def all_tasks(
    spec: Mapping[str, object], convention: str = "exact", trainable: int | None = None, tasks: int = facts.TASKS
) -> Finding:
    """One base and an adapter for each task take less room than copies of the model."""
    of = storage(predict(resolve(RunSpec.from_dict(spec)), convention, trainable), tasks)
    one, each = of.base + of.adapters, units.size(of.adapters / tasks)
    text = (
        f"{tasks:,} tasks: {units.size(one)} with the one base, {each} a task, against {units.size(of.full)} of copies"
    )
    return decided(one < of.full, text)


def cheaper(method: str, than: str, model: str) -> Finding:
    """A method is predicted to need less memory than another at their automatic settings."""
    mine, other = facts.predicted(*facts.automatic(model, method, than))
    text = f"{facts.needed(mine)} against {facts.needed(other)} predicted for {mine.model_name}"
    return decided(mine.needed < other.needed, text)


def registered(name: str) -> Finding:
    known = [m.name for m in METHODS.values()]
    near = ", ".join(n for n in known if n.startswith(name.rstrip("+")))
    return decided(name in known, name if name in known else f"no paper defines {name}; there are {near}")


TESTS: dict[str, Callable[..., Finding]] = {
    test.__name__: test
    for test in (
        number, reading, family, paper, preset, merges, place, time, file, fewer, same, extra, virtual, matrix, reduced, gpus,
        all_tasks, cheaper, registered,
    )
}  # fmt: skip
