"""What an adapter did to a model: the update of each linear map it changes, and all that `lowrank` has to say of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from .. import adapters, methods
from ..adapters import Adapter
from ..base import architecture, weights
from ..base.architecture import Module
from ..errors import AdapterError, SpecError
from ..resolve import resolve
from . import lowrank
from .lowrank import Amplification, Directions, Intruders, Spectrum

if TYPE_CHECKING:
    from torch import Tensor

AMPLIFIED = 8
"""Directions of ΔW that a study looks for in W, or fewer where ΔW has fewer. Adapters compare only over as many of them."""
FILE = "study.json"
"""Its name in an adapter's folder."""
IN_PLACE = "query,value"
"""What is studied by default where a method trains the base's own weights: all of them would take minutes and gigabytes."""


@dataclass(frozen=True)
class Update:
    """What an adapter does to one linear map."""

    name: str
    """Full dotted name of the module."""
    layer: int | None
    """None for a module outside the layers."""
    module: Module
    """The kind of module that it is."""
    weight: Tensor
    """W in fp32, d_out × d_in, however the model stores it."""
    delta: Tensor
    """ΔW in fp32, d_out × d_in."""


@dataclass(frozen=True)
class MatrixStudy:
    """What there is to see in one adapted matrix."""

    name: str
    """Full dotted name of the module."""
    short_name: str
    role: str
    """query, down, …, by `architecture.ROLES`; empty where unknown."""
    layer: int | None
    shape: tuple[int, int]
    """d_out, d_in."""
    weight: Spectrum
    delta: Spectrum
    amplification: Amplification
    intruders: Intruders
    directions: Directions | None = None
    """None where none were kept."""

    @property
    def relative_size(self) -> float | None:
        """‖ΔW‖_F / ‖W‖_F; None where W is zero."""
        return self.delta.norm / self.weight.norm if self.weight.values else None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MatrixStudy:
        parts = {
            "shape": tuple(data["shape"]),
            "weight": Spectrum(tuple(data["weight"]["values"])),
            "delta": Spectrum(tuple(data["delta"]["values"])),
            "amplification": Amplification(**data["amplification"]),
            "intruders": Intruders(tuple(data["intruders"]["cosines"]), data["intruders"]["threshold"]),
            "directions": Directions(**data["directions"]) if data["directions"] else None,
        }
        return cls(**{**data, **parts})


@dataclass(frozen=True)
class Study:
    """Every matrix of one adapter."""

    adapter: str
    model: str
    method: str | None
    """None for an adapter saved elsewhere."""
    matrices: tuple[MatrixStudy, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON, numbers to four digits: a chart shows three."""
        return _rounded(asdict(self))

    def to_json(self) -> str:
        """`to_dict` as a small file, a matrix a line."""
        data = self.to_dict()
        matrices = ",\n".join(_compact(m) for m in data.pop("matrices"))
        return f'{_compact(data)[:-1]},"matrices":[\n{matrices}\n]}}\n'

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        return cls(**{**data, "matrices": tuple(MatrixStudy.from_dict(m) for m in data["matrices"])})


def names(adapter: Adapter, targets: str | None = None) -> list[str]:
    """Full names of the linear maps to study: those that `targets` names, as `Architecture.targets` takes it.

    By default those that the adapter adapts, never the head; query and value for a method that trains the base's own
    weights; and all where the method is not known. Raises SpecError that lists what the model has.
    """
    shapes = architecture.of(adapter.spec.model or "")
    method = methods.METHODS.get(adapter.spec.method or "")
    if targets is None and method and not method.in_place:
        chosen = methods.targets(shapes, resolve(adapter.spec))
        return [name for t in chosen if t.module.is_linear and not t.module.head for name in t.names()]
    wanted = (IN_PLACE if method else "all-linear") if targets is None else targets
    if not wanted.strip(" ,"):
        raise SpecError("targets is empty; leave it out for what the adapter trained")
    try:
        return [name for kind in shapes.targets(wanted) for _, name in kind.names()]
    except SpecError as error:
        raise SpecError(str(error).replace("target-modules", "targets", 1)) from None


def recorded(adapter: Adapter) -> Study | None:
    """The study kept in the adapter's folder; None where there is none. Raises AdapterError for one that cannot be read."""
    file = adapter.folder / FILE
    if not file.exists():
        return None
    try:
        return Study.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{file}: cannot be read ({error}); write it again with python -m peftlab study --adapter {adapter.folder} "
            f"--out {file}"
        ) from None


def updates(base: weights.Base, adapter: Adapter, names: Collection[str] | None = None) -> Iterator[Update]:
    """Each linear map that the adapter changes; with `names`, only those of these full names.

    ΔW is the merged weight minus the base's, so that any method that merges will do. Both are in fp64, because an fp32 sum
    would round a ΔW of rank 8 to full rank. This takes 16 bytes of main memory for each number of the named maps. Raises
    what `adapters.merge` does, and SpecError for a name that is no linear map.
    """
    found = _changed(base, adapter, names)
    while found:
        yield _update(*found.pop(0))


def study(
    base: weights.Base, adapter: Adapter, names: Collection[str] | None = None, keep: int = 0
) -> Generator[float, None, Study]:
    """Studies what `updates` gives and keeps the top `keep` directions of each. Yields the share done, from 0 to 1.

    Returns the study. Raises what `updates` does.
    """
    yield 0.0
    found, done = _changed(base, adapter, names), []
    total = len(found)
    while found:
        done.append(_studied(_update(*found.pop(0)), keep))
        yield len(done) / total
    return Study(adapter.label, adapter.spec.model or "", adapter.spec.method, tuple(done))


Changed: TypeAlias = "tuple[str, int | None, Module, Tensor, Tensor]"
"""A linear map's name, layer and kind, and its weight before and after, in fp64 and as the model stores it."""


def _changed(base: weights.Base, adapter: Adapter, names: Collection[str] | None) -> list[Changed]:
    import torch

    kinds = [m for m in architecture.describe(base.model).modules if m.is_linear]
    places = {name: (layer, kind) for kind in kinds for layer, name in kind.names()}
    for name in sorted(set(names or ()) - set(places)):
        raise SpecError(f"{name} is no linear map of {base.entry.name}; its first is {next(iter(places))}")
    wanted = [name for name in places if names is None or name in names]
    model = weights.share(base.model)
    wide = {id(model.get_parameter(f"{name}.weight")) for name in wanted}
    for parameter in model.parameters():  # the rest in fp32: peft would round BA to a base in bf16
        if parameter.is_floating_point():
            parameter.data = parameter.data.to("cpu", torch.float64 if id(parameter) in wide else torch.float32)
    merged = adapters.merge(replace(base, model=model, device="cpu"), adapter)
    pairs = {name: tuple(m.get_parameter(f"{name}.weight").data for m in (model, merged)) for name in wanted}
    return [(name, *places[name], before, after) for name, (before, after) in pairs.items() if not before.equal(after)]


def _update(name: str, layer: int | None, kind: Module, before: Tensor, after: Tensor) -> Update:
    weight, delta = before.float(), (after - before).float()
    if kind.kind == "conv1d":
        weight, delta = weight.T, delta.T
    return Update(name, layer, kind, weight, delta)


def _studied(update: Update, keep: int) -> MatrixStudy:
    weight, delta = lowrank.factors(update.weight), lowrank.factors(update.delta)
    return MatrixStudy(
        name=update.name,
        short_name=update.module.short_name,
        role=update.module.role,
        layer=update.layer,
        shape=(update.module.d_out, update.module.d_in),
        weight=lowrank.spectrum(weight),
        delta=lowrank.spectrum(delta),
        amplification=lowrank.amplification(weight, delta, min(AMPLIFIED, delta.rank)),
        intruders=lowrank.intruders(weight, update.weight + update.delta),
        directions=lowrank.directions(delta, keep) if keep else None,
    )


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _rounded(value: Any) -> Any:
    """JSON with every float to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
