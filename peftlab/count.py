"""How many parameters a method trains: exact, from the architecture's shapes and the registry's terms."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from . import methods
from .base import architecture as architectures
from .base import models
from .base.architecture import Architecture, Module
from .errors import SpecError
from .methods import Method, Target
from .resolve import resolve
from .spec import Json, Resolved, RunSpec

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "amp": 4}  # of a parameter; AMP casts fp32 weights for each operation


@dataclass(frozen=True)
class ModuleCount:
    """One kind of module, and what a method trains in all the layers that have it."""

    module: Module
    adapted_layers: int
    trainable: int  # parameters, over all layers

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, as it is stored."""
        return next(iter(self.module.parameters.values()))


@dataclass(frozen=True)
class ParameterReport:
    spec: Resolved
    model_name: str
    method_name: str
    total_parameters: int  # of the base model
    trainable_parameters: int
    added_parameters: int  # trained ones that the base model does not have
    adapter_bytes: int  # of its file's tensors; a header adds about 100 bytes a tensor, and AdaLoRA prunes its own
    modules: tuple[ModuleCount, ...]
    places: tuple[tuple[Target, int], ...]  # what is trained, and the trained parameters of one of its modules
    frozen: tuple[str, ...] = ()  # sentences on what one may expect to be trained, or quantized, and is not

    @cached_property
    def names(self) -> tuple[tuple[str, int], ...]:
        """(full module name, trained parameters) of each trained module."""
        return tuple((name, each) for target, each in self.places for name in target.names())

    @property
    def frozen_parameters(self) -> int:
        """Parameters of the base model that are not trained."""
        return self.total_parameters + self.added_parameters - self.trainable_parameters

    @property
    def trainable_percent(self) -> float:
        """100 × trained parameters / the base model's total."""
        return 100 * self.trainable_parameters / self.total_parameters

    def to_dict(self) -> Json:
        shapes = {m.module.name: m.shape for m in self.modules}
        own = [(n, shapes.get(n) or shapes[re.sub(r"\.\d+\.", ".*.", n, count=1)], k) for n, k in self.names]
        return {
            "spec": self.spec.to_dict(),
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "trainable_percent": self.trainable_percent,
            "adapter_bytes": self.adapter_bytes,
            "frozen": list(self.frozen),
            "modules": [{"name": name, "shape": list(shape), "trainable": k} for name, shape, k in own],
        }


def count(spec: Resolved) -> ParameterReport:
    """Raises SpecError where the method has nothing to train, and for a model that is a bare count."""
    entry, method = models.find(spec.model), methods.find(spec.method)
    shape = architectures.of(spec.model)
    chosen = {id(t.module): t for t in methods.targets(shape, spec, entry.name)}
    modules, places, saved = [], [], 0
    for m in shape.modules:
        target = chosen.get(id(m))
        each = method.trained(m, spec) if target else 0
        layers = target.count if target and each else 0
        modules.append(ModuleCount(m, layers, each * layers))
        if target and layers:
            places.append((target, each))
            saved += layers * (each if method.saved is None else method.kept(m, spec))
    for name, sizes in method.shared.items():
        n, module = math.prod(sizes), Module(name, "other", {name: sizes})
        modules.append(ModuleCount(module, 1, n))
        places.append((Target(module, ()), n))
        saved += n
    trainable = sum(m.trainable for m in modules)
    borrowed = sum(m.trainable for m in modules if method.in_place and not m.module.tied)
    return ParameterReport(
        spec=spec,
        model_name=entry.name,
        method_name=method.name,
        total_parameters=shape.total_parameters,
        trainable_parameters=trainable,
        added_parameters=trainable - borrowed,
        adapter_bytes=saved * BYTES[spec.trained_precision],
        modules=tuple(modules),
        places=tuple(places),
        frozen=tuple(_left(shape, spec, method, [t.module for t in chosen.values()])),
    )


def _left(shape: Architecture, spec: Resolved, method: Method, trained: list[Module]) -> Iterator[str]:
    """What stays as it is though it is of the kind that `method` trains, or that `spec` quantizes, and why."""
    experts = [m for m in shape.modules if m.kind == "experts"]
    if experts and spec.quantization != "none":
        yield f"The experts stay 16-bit: they are one parameter, {_named(experts)}, and only linear maps are quantized."
    if method.in_place or method.before_layers or not any(m.is_linear and m.layers for m in trained):
        return
    everywhere = spec.target_modules == "all-linear" or "target_modules" not in method.settings
    if everywhere and experts and not any(m.kind == "experts" for m in trained):
        yield f"The experts stay frozen: they are one parameter, {_named(experts)}, which this method does not adapt."
    if spec.target_modules == "all-linear":
        left = [m for m in shape.linear() if m not in trained and (m.layers or spec.layers == "all")]
        if refused := [m for m in left if m.short_name in shape.refused]:
            yield f"{_named(refused)} stays frozen: peft attaches no LoRA there, because a fused kernel reads the weight."
        if renamed := [m for m in left if m.short_name in shape.rewritten]:
            yield f"{_named(renamed)} stay frozen: peft takes these names for the experts'."
        if routers := [
            m for m in shape.modules if experts and m.kind == "other" and m.short_name in ("gate", "router")
        ]:
            yield f"{_named(routers)}, which sends tokens to experts, stays frozen."
    elif "layers" in method.settings and "target_modules" not in method.settings and spec.layers == "all":
        for stack, depth in shape.depths.items():
            lacking = tuple(n for n in range(depth) if not any(m.stack == stack and n in m.layers for m in trained))
            if lacking and len(lacking) < depth:
                text = ",".join(f"{a}-{b}" if a < b else str(a) for a, b in architectures.runs(lacking))
                yield f"Layers {text} of {stack} stay as they are: they have nothing that this method adapts."


def _named(modules: list[Module]) -> str:
    """What the modules are called inside a layer, each once."""
    return ", ".join(dict.fromkeys(m.name.rpartition(".*.")[2] for m in modules))


def why_not(method: str, model: str) -> str:
    """Why `method` at its automatic settings does not suit `model`, in `count`'s words; empty where it does."""
    try:
        if models.find(model).config is not None:  # a bare count suits all
            count(resolve(RunSpec(model=model, method=method)))
    except SpecError as error:
        return str(error)
    return ""
