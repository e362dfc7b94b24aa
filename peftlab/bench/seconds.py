"""Fits the constants of `memory.seconds` to the recorded steps, and predicts each family with those of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
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
from ..memory.trace import trace
from ..resolve import resolve
from ..spec import Json, Resolved, RunSpec
from . import Say, write
from .memory import AT_ONCE, processes

START = Constants(
    products=0.6, exact_products=0.7, attention=0.4, memory=0.7, product=4e-6, exact_product=8e-6, elements=2e-6,
    tensor=3e-7, called=1.5e-5, derived=1.5e-5, viewed=5e-6, derived_view=1e-5, library=1e-4,
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
    recordings = [d for d in documents("memory") if any("launch_seconds" in r.get("measured", {}) for r in d["rows"])]
    steps = [step for document in recordings for step in timed(document, say)]
    if not steps:
        raise RunError("no recording has the seconds of steps; run bench memory on a machine with a GPU first")
    rows: list[Json] = []
    for family in sorted({step.family for step in steps}):
        others = fit([step for step in steps if step.family != family])
        for step in (step for step in steps if step.family == family):
            predicted = seconds.of_step(step.operations, GPUS[step.spec.gpu], step.gear, others)
            rows.append({
                "name": step.name, "family": family, "gear": step.gear, "spec": step.spec.to_dict(),
                "measured": step.seconds, "predicted": predicted,
            })  # fmt: skip
            say(f"{step.name} {step.spec.method}, {step.gear}: {predicted / step.seconds - 1:+.0%}")
    errors = [row["predicted"] / row["measured"] - 1 for row in rows]
    return write({
        "kind": "seconds", "command": "python -m peftlab bench seconds", "recordings": [d["file"] for d in recordings],
        "hardware": sorted({d["hardware"] for d in recordings}), "constants": asdict(fit(steps)),
        "mean": sum(map(abs, errors)) / len(errors), "worst": max(errors, key=abs), "rows": rows,
    }, out)  # fmt: skip


def timed(document: Json, say: Say) -> list[Timed]:
    """The steps of a recording whose seconds are known, with their operations as traced now."""
    rows = [
        row
        for row in (*document["rows"], *document.get("graph_rows", ()))
        if "launch_seconds" in row.get("measured", {})
    ]
    found: dict[int, Timed] = {}
    with processes(AT_ONCE) as pool:
        specs = [resolve(RunSpec.from_dict(row["spec"])) for row in rows]
        asked = {pool.submit(trace, spec, None, rows[i]["gear"] == GRAPH): i for i, spec in enumerate(specs)}
        for done in as_completed(asked):
            i = asked[done]
            took = rows[i]["measured"]
            try:
                operations = done.result().operations
                waits = took["launch_seconds"] < BOUND * took["step_seconds"]
                forward = None if waits else took.get("forward_launch_seconds")
                found[i] = Timed(
                    rows[i]["name"],
                    specs[i],
                    rows[i]["gear"],
                    operations,
                    took["step_seconds"],
                    took["busy_seconds"],
                    forward,
                )
            except PeftlabError as error:
                say(f"{rows[i]['name']} {specs[i].method}: {error}")
    return [found[i] for i in sorted(found)]


def fit(steps: Sequence[Timed]) -> Constants:
    """The constants with the least squares of log(predicted / measured) over `steps`."""
    problem = _Problem(steps)
    names = [field.name for field in fields(Constants)]
    start = torch.tensor([math.log(getattr(START, name)) for name in names], dtype=torch.float64)
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(dict(zip(names, theta.exp(), strict=True))) + NEAR_START * (theta - start).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = dict(zip(names, theta.detach().exp().tolist(), strict=True))
    return Constants(**{name: min(value, 1.0) if name in SHARES else value for name, value in found.items()})


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
                launched = o.kind not in ("tensor", "library", "view")
                computing = (o.flops / (peak * 1e12) * is_own for is_own in own)
                rows.append(i)
                columns.append([
                    n, o.phase == "forward", *computing, o.moved / (gpu.bandwidth_gb_s * 1e9),
                    o.flops and o.bits == 16, o.flops and o.bits != 16, not o.flops and o.kind in ("elements", "library"),
                    o.kind == "tensor", launched and o.driven, launched and not o.driven, o.kind == "view" and o.driven,
                    o.kind == "view" and not o.driven, o.kind == "library",
                ])  # fmt: skip
        self.rows = torch.tensor(rows)
        self.columns = torch.tensor([[*map(float, column)] for column in columns], dtype=torch.float64).T
        self.eager = torch.tensor([step.gear == EAGER for step in steps])
        self.seconds = torch.tensor([step.seconds for step in steps], dtype=torch.float64)
        self.busy = torch.tensor([step.busy or math.nan for step in steps], dtype=torch.float64)
        self.forward = torch.tensor([step.forward or math.nan for step in steps], dtype=torch.float64)

    def loss(self, c: Mapping[str, Tensor]) -> Tensor:
        n, forward, attention, products, exact, moved, *rest = self.columns
        times = dict(zip([name for name in c if name not in SHARES], rest, strict=True))  # in the order of the fields
        share = {name: c[name].clamp(max=1) for name in SHARES}
        computing = attention / share["attention"] + products / share["products"] + exact / share["exact_products"]
        begun = sum(times[name] * c[name] for name in ON_GPU)
        busy = self._sum(n * (torch.maximum(computing, moved / share["memory"]) + begun))
        each = n * sum(column * c[name] for name, column in times.items() if name not in ON_GPU)
        step = torch.where(self.eager, seconds.joined(busy, self._sum(each)), busy)  # type: ignore[arg-type]
        parts = _squares(busy, self.busy) + _squares(self._sum(each * forward), self.forward)
        return _squares(step, self.seconds) + PARTS * parts

    def _sum(self, each: Tensor) -> Tensor:
        return torch.zeros(len(self.seconds), dtype=torch.float64).index_add(0, self.rows, each)


def _squares(predicted: Tensor, measured: Tensor) -> Tensor:
    """The mean square of log(predicted / measured) where it was measured."""
    known = ~measured.isnan()
    return (predicted[known] / measured[known]).log().square().sum() / max(1, int(known.sum()))
