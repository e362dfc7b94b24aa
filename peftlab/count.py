"""How many parameters a method trains: exact, from the architecture's shapes and the registry's terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from . import methods
from .base import architecture as architectures
from .base import models
from .errors import SpecError
from .resolve import resolve
from .spec import Resolved, RunSpec

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "amp": 4}
"""Bytes a parameter. AMP keeps fp32 weights and casts them for each operation."""


@dataclass(frozen=True)
class ModuleCount:
    """One kind of module and what a method trains on it, over all its layers."""

    name: str
    role: str
    kind: str
    shape: tuple[int, ...]
    """Of the weight, as stored."""
    d_in: int | None
    d_out: int | None
    """Features of a linear map; None for other modules."""
    layers: int
    """How many layers have it."""
    adapted_layers: int
    parameters: int
    """In the base model, over all layers."""
    trainable: int
    """Over all layers."""


@dataclass(frozen=True)
class ParameterReport:
    spec: Resolved
    """Resolved."""
    model_name: str
    method_name: str
    total_parameters: int
    """Of the base model."""
    trainable_parameters: int
    added_parameters: int
    """Of the trainable ones, those that the base model does not have."""
    adapter_bytes: int
    """Bytes of the tensors of the saved adapter; the safetensors header adds about 100 bytes a tensor. AdaLoRA saves less:
    what its pruning left."""
    modules: tuple[ModuleCount, ...]
    names: tuple[tuple[str, int], ...]
    """(full module name, trainable parameters) of each trained module."""

    @property
    def trainable_percent(self) -> float:
        """100 × trainable / the base model's total."""
        return 100 * self.trainable_parameters / self.total_parameters

    def to_dict(self) -> dict[str, Any]:
        shapes = {m.name: m.shape for m in self.modules}
        return {
            "spec": self.spec.to_dict(),
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "trainable_percent": self.trainable_percent,
            "adapter_bytes": self.adapter_bytes,
            "modules": [
                {"name": name, "shape": list(shapes[_pattern(name, shapes)]), "trainable": trainable}
                for name, trainable in self.names
            ],
        }


def _pattern(name: str, known: Any) -> str:
    import re

    return name if name in known else re.sub(r"\.\d+\.", ".*.", name, count=1)


def count(spec: Resolved) -> ParameterReport:
    """Raises SpecError where the method has nothing to train, or the model is a bare count."""
    spec = resolve(spec)
    entry = models.find(spec.model)
    method = methods.find(spec.method)
    shape = architectures.of(spec.model)
    chosen = {id(t.module): t for t in methods.targets(shape, spec, entry.name)}
    rows, names = [], []
    kept = borrowed = 0
    for m in shape.modules:
        target = chosen.get(id(m))
        each = method.trained(m, spec) if target else 0
        layers = target.count if target and each else 0
        kept += layers * method.kept(m, spec) if layers else 0
        borrowed += layers * each if method.in_place and not m.tied else 0
        if target and each:
            names += [(name, each) for name in target.names()]
        rows.append(
            ModuleCount(
                name=m.name,
                role=m.role,
                kind=m.kind,
                shape=next(iter(m.parameters.values())),
                d_in=m.d_in if m.is_linear else None,
                d_out=m.d_out if m.is_linear else None,
                layers=m.count,
                adapted_layers=layers,
                parameters=(m.weight + m.bias) * m.count,
                trainable=each * layers,
            )
        )
    for name, sizes in method.shared.items():
        n = math.prod(sizes)
        rows.append(ModuleCount(name, "shared", "other", sizes, None, None, 1, 1, 0, n))
        names.append((name, n))
        kept += n
    trainable = sum(r.trainable for r in rows)
    saved = BYTES[(spec.precision if method.in_place else spec.adapter_precision) or "fp32"]
    return ParameterReport(
        spec=spec,
        model_name=entry.name,
        method_name=method.name,
        total_parameters=shape.total_parameters,
        trainable_parameters=trainable,
        added_parameters=trainable - borrowed,
        adapter_bytes=kept * saved,
        modules=tuple(rows),
        names=tuple(names),
    )


def why_not(method: str, model: str) -> str:
    """Why `method` at its automatic settings does not suit `model`, in `count`'s words; empty where it does."""
    try:
        if models.find(model).config is not None:  # a bare count suits all
            count(resolve(RunSpec(model=model, method=method)))
    except SpecError as error:
        return str(error)
    return ""
