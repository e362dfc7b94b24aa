"""Fits the constants of `memory.seconds` to the recorded steps, and predicts each family with those of the others.

The steps are those of `bench memory`, and those of recordings `seconds-*.json`, timed once more on other hosts. How fast a host
launches is fitted too, beside that of the first recording."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ..base import models
from ..catalog.gpus import GPUS
from ..errors import PeftlabError, RunError
from ..measured import documents
from ..memory import seconds
from ..memory.seconds import EAGER, GRAPH, Constants, Step
from ..memory.trace import Trace, trace
from ..resolve import resolve
from ..spec import Json, Resolved, RunSpec
from . import Say, write
from .memory import AT_ONCE, processes

START = Constants(
    products=0.6, exact_products=0.7, attention=0.4, memory=0.7, product=4e-6, exact_product=8e-6, elements=2e-6,
    tensor=3e-7, called=1.5e-5, derived=1.5e-5, viewed=5e-6, derived_view=1e-5, recorded=5e-6, library=1e-4, module=5e-6,
)  # fmt: skip
"""Where a fit begins, as from a data sheet and a profile."""
SHARES = ("products", "exact_products", "attention", "memory")
ON_GPU = ("product", "exact_product", "elements", "tensor")
"""Constants by what they are: shares, and times on the GPU; the others are times of launching."""
NEAR_START, PARTS = 3e-3, 0.5
"""How much it counts that a constant is far from its start, for those that few rows tell of; and the seconds in which the GPU
computed, and those of launching the forward pass, beside those of the step."""
BOUND = 0.97
"""A step of whose seconds launching takes this share waits for no GPU."""


@dataclass(frozen=True)
class Timed:
    """A recorded step."""

    file: str
    """The recording, each of which is of one host."""
    name: str
    spec: Resolved
    gear: str
    operations: Step
    seconds: float
    busy: float | None
    """Seconds in which the GPU computed."""
    forward: float | None
    """Seconds in which the forward pass was launched, where the step is as long as all launches."""

    @property
    def family(self) -> str:
        config = models.find(self.spec.model).config
        assert config is not None  # or it would have no operations
        return str(config["model_type"])


def record_seconds(out: Path, say: Say) -> Json:
    """Writes to `out` the constants that fit every recorded step, and the error for each one where its family was left out.

    Raises RunError where no recording has seconds of steps.
    """
    first, again = ([d for d in documents(kind) if any(map(_is_timed, _rows(d)))] for kind in ("memory", "seconds"))
    if not first:
        raise RunError("no recording has the seconds of steps; run bench memory on a machine with a GPU first")
    steps = timed(first + again, say)
    files = {document["file"] for document in first}
    rows: list[Json] = []
    for family in sorted({step.family for step in steps}):
        others, _ = fit([step for step in steps if step.family != family])
        for step in (step for step in steps if step.family == family and step.file in files):
            predicted = seconds.of_step(step.operations, GPUS[step.spec.gpu], step.gear, others)
            rows.append({
                "name": step.name, "family": family, "gear": step.gear, "spec": step.spec.to_dict(),
                "measured": step.seconds, "predicted": predicted,
            })  # fmt: skip
            say(f"{step.name} {step.spec.method}, {step.gear}: {predicted / step.seconds - 1:+.0%}")
    errors = [row["predicted"] / row["measured"] - 1 for row in rows]
    constants, hosts = fit(steps)
    return write({
        "kind": "seconds", "command": "python -m peftlab bench seconds", "recordings": [d["file"] for d in first + again],
        "hardware": sorted({d["hardware"] for d in first}), "constants": asdict(constants), "hosts": hosts,
        "elsewhere": _elsewhere(steps, files), "mean": sum(map(abs, errors)) / len(errors), "worst": max(errors, key=abs),
        "rows": rows,
    }, out)  # fmt: skip


def _elsewhere(steps: Sequence[Timed], files: Collection[str]) -> Json:
    """How many times as long as in the recordings `files` the same steps took in the others, in the eager gear."""
    known = {step.spec: step.seconds for step in steps if step.file in files and step.gear == EAGER}
    others = (step for step in steps if step.file not in files and step.gear == EAGER)
    ratios = [step.seconds / known[step.spec] for step in others if step.spec in known]
    if not ratios:
        return {"steps": 0}
    return {"steps": len(ratios), "median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def _rows(document: Json) -> list[Json]:
    return [*document["rows"], *document.get("graph_rows", ())]


def _is_timed(row: Json) -> bool:
    return "launch_seconds" in row.get("measured", {})


def timed(recordings: Sequence[Json], say: Say) -> list[Timed]:
    """The steps of recordings whose seconds are known, with their operations as traced now."""
    rows = [(document["file"], row) for document in recordings for row in _rows(document) if _is_timed(row)]
    asked: dict[Future[Trace], list[int]] = {}
    alike: dict[tuple[Resolved, str], Future[Trace]] = {}
    found: dict[int, Timed] = {}
    with processes(AT_ONCE) as pool:
        specs = [resolve(RunSpec.from_dict(row["spec"])) for _, row in rows]
        for i, (spec, (_, row)) in enumerate(zip(specs, rows, strict=True)):
            key = spec, row["gear"]
            if key not in alike:
                alike[key] = pool.submit(trace, spec, None, row["gear"] == GRAPH)
            asked.setdefault(alike[key], []).append(i)
        for done in as_completed(asked):
            try:
                operations = done.result().operations
            except PeftlabError as error:
                say(f"{rows[asked[done][0]][1]['name']} {specs[asked[done][0]].method}: {error}")
                continue
            for i in asked[done]:
                found[i] = _step(*rows[i], specs[i], operations)
    return [found[i] for i in sorted(found)]


def _step(file: str, row: Json, spec: Resolved, operations: Step) -> Timed:
    took = row["measured"]
    waits = took["launch_seconds"] < BOUND * took["step_seconds"]
    forward = None if waits else took.get("forward_launch_seconds")
    return Timed(file, row["name"], spec, row["gear"], operations, took["step_seconds"], took["busy_seconds"], forward)


def fit(steps: Sequence[Timed]) -> tuple[Constants, dict[str, float]]:
    """The constants with the least squares of the steps' errors, as they are reported, and of the log of their parts' errors.

    And for each recording how many times as long as in the first one launching takes.
    """
    problem = _Problem(steps)
    names = [field.name for field in fields(Constants)]
    n = len(names)
    start = torch.tensor(
        [math.log(getattr(START, name)) for name in names] + [0.0] * (len(problem.files) - 1), dtype=torch.float64
    )
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        values = theta.exp()
        loss = problem.loss(dict(zip(names, values[:n], strict=True)), values[n:])
        loss = loss + NEAR_START * (theta - start)[:n].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = theta.detach().exp().tolist()
    values = dict(zip(names, found[:n], strict=True))
    constants = Constants(**{name: min(value, 1.0) if name in SHARES else value for name, value in values.items()})
    return constants, dict(zip(problem.files, [1.0, *found[n:]], strict=True))


class _Problem:
    """The steps' operations as columns, so that all are predicted at once."""

    def __init__(self, steps: Sequence[Timed]) -> None:
        rows, columns = [], []
        for i, step in enumerate(steps):
            gpu = GPUS[step.spec.gpu]
            for o, n in step.operations.items():
                peak = (gpu.bf16_tflops or math.inf) if o.bits == 16 else gpu.fp32_tflops
                products = o.kind != "attention", o.bits == 16
                own = (not products[0], products == (True, True), products == (True, False))
                launched, view = o.kind not in ("tensor", "library", "view", "module"), o.kind == "view"
                computing = (o.flops / (peak * 1e12) * is_own for is_own in own)
                rows.append(i)
                columns.append([
                    n, o.phase == "forward", *computing, o.moved / (gpu.bandwidth_gb_s * 1e9),
                    o.flops and o.bits == 16, o.flops and o.bits != 16, not o.flops and o.kind in ("elements", "library"),
                    o.kind == "tensor", launched and o.driven, launched and not o.driven, view and o.driven,
                    view and not o.driven, (launched or view) and o.recorded, o.kind == "library", o.kind == "module",
                ])  # fmt: skip
        self.files = list(dict.fromkeys(step.file for step in steps))
        self.host = torch.tensor([self.files.index(step.file) for step in steps])
        self.rows = torch.tensor(rows)
        self.columns = torch.tensor([[*map(float, column)] for column in columns], dtype=torch.float64).T
        self.eager = torch.tensor([step.gear == EAGER for step in steps])
        self.seconds = torch.tensor([step.seconds for step in steps], dtype=torch.float64)
        self.busy = torch.tensor([step.busy or math.nan for step in steps], dtype=torch.float64)
        self.forward = torch.tensor([step.forward or math.nan for step in steps], dtype=torch.float64)

    def loss(self, c: Mapping[str, Tensor], others: Tensor) -> Tensor:
        """For these constants, and times of launching on the hosts of the `others`, beside the first recording's."""
        host = torch.cat([others.new_ones(1), others])[self.host]
        n, forward, attention, products, exact, moved, *rest = self.columns
        times = dict(zip([name for name in c if name not in SHARES], rest, strict=True))  # in the order of the fields
        share = {name: c[name].clamp(max=1) for name in SHARES}
        computing = attention / share["attention"] + products / share["products"] + exact / share["exact_products"]
        begun = sum(times[name] * c[name] for name in ON_GPU)
        busy = self._sum(n * (torch.maximum(computing, moved / share["memory"]) + begun))
        each = n * sum(column * c[name] for name, column in times.items() if name not in ON_GPU)
        step = torch.where(self.eager, seconds.joined(busy, host * self._sum(each)), busy)  # type: ignore[arg-type]
        parts = _squares(busy, self.busy) + _squares(host * self._sum(each * forward), self.forward)
        return (step / self.seconds - 1).square().mean() + PARTS * parts

    def _sum(self, each: Tensor) -> Tensor:
        return torch.zeros(len(self.seconds), dtype=torch.float64).index_add(0, self.rows, each)


def _squares(predicted: Tensor, measured: Tensor) -> Tensor:
    """The mean square of log(predicted / measured) where it was measured."""
    known = ~measured.isnan()
    return (predicted[known] / measured[known]).log().square().sum() / max(1, int(known.sum()))
