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
    products=0.6, exact_products=0.6, attention=0.4, memory=0.7, product=4e-6, elements=2e-6, tensor=3e-7, called=1e-5,
    derived=6e-6, looked=2e-6, updated=2e-6,
)  # fmt: skip
"""Where a fit begins, as from a data sheet and a profile."""
SHARES = ("products", "exact_products", "attention", "memory")
NEAR_START, BUSY = 1e-4, 0.5
"""How much it counts that a constant is far from its start, as one may that few rows tell of; and the seconds in which the GPU
computed, beside those of the step."""


@dataclass(frozen=True)
class Timed:
    """A recorded step."""

    name: str
    spec: Resolved
    gear: str
    operations: Step
    seconds: float
    busy: float | None

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
                found[i] = Timed(
                    rows[i]["name"], specs[i], rows[i]["gear"], operations, took["step_seconds"], took["busy_seconds"]
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
                own = (
                    o.kind == "attention",
                    o.kind != "attention" and o.bits == 16,
                    o.kind != "attention" and o.bits == 32,
                )
                rows.append(i)
                columns.append([
                    n, *(o.flops / (peak * 1e12) * is_own for is_own in own), o.moved / (gpu.bandwidth_gb_s * 1e9),
                    o.flops > 0, o.kind == "tensor", o.kind not in ("tensor", "host") and not o.flops, o.kind == "host",
                    o.kind not in ("tensor", "host") and o.driven, o.kind not in ("tensor", "host") and not o.driven,
                ])  # fmt: skip
        self.rows = torch.tensor(rows)
        self.columns = torch.tensor(columns, dtype=torch.float64).T
        self.eager = torch.tensor([step.gear == EAGER for step in steps])
        self.seconds = torch.tensor([step.seconds for step in steps], dtype=torch.float64)
        self.busy = torch.tensor([step.busy or math.nan for step in steps], dtype=torch.float64)

    def loss(self, c: Mapping[str, Tensor]) -> Tensor:
        n, attention, products, exact, moved, product, tensor, elements, host, called, derived = self.columns
        share = {name: c[name].clamp(max=1) for name in SHARES}
        computing = attention / share["attention"] + products / share["products"] + exact / share["exact_products"]
        begun = product * c["product"] + tensor * c["tensor"] + elements * c["elements"]
        busy = self._sum(n * (torch.maximum(computing, moved / share["memory"] * (1 - host)) + begun))
        launch = self._sum(
            n * (called * c["called"] + derived * c["derived"] + host * c["looked"] + tensor * c["updated"])
        )
        step = torch.where(self.eager, seconds.joined(busy, launch), busy)  # type: ignore[arg-type]
        known = ~self.busy.isnan()
        loss = (step / self.seconds).log().square().mean()
        return loss + BUSY * (busy[known] / self.busy[known]).log().square().mean() if known.any() else loss

    def _sum(self, each: Tensor) -> Tensor:
        return torch.zeros(len(self.seconds), dtype=torch.float64).index_add(0, self.rows, each)
