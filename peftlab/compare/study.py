"""What an adapter did to a model: the update of each linear map it changes, and all that `lowrank` has to say of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import adapters, methods
from ..adapters import Adapter
from ..base import architecture, weights
from ..errors import AdapterError, SpecError
from ..resolve import resolve
from . import lowrank
from .lowrank import Amplification, Directions, Intruders, Spectrum

if TYPE_CHECKING:
    from torch import Tensor

FILE = "study.json"
"""Its name in an adapter's folder."""


@dataclass(frozen=True)
class Update:
    """What an adapter does to one linear map."""

    name: str
    """Full dotted name of the module."""
    layer: int | None
    """None for a module outside the layers."""
    module: architecture.Module
    """The kind of module that it is."""
    before: Tensor
    after: Tensor
    """Its weight without and with the adapter, in fp64, as the model stores it."""

    @property
    def weight(self) -> Tensor:
        """W in fp32, d_out × d_in."""
        return self._turned(self.before)

    @property
    def delta(self) -> Tensor:
        """ΔW in fp32, d_out × d_in."""
        return self._turned(self.after - self.before)

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.float().T if self.module.kind == "conv1d" else matrix.float()


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
        return json.loads(json.dumps(asdict(self)), parse_float=lambda digits: float(f"{float(digits):.4g}"))

    def to_json(self) -> str:
        """`to_dict` as a small file, a matrix a line."""
        data, compact = self.to_dict(), json.JSONEncoder(separators=(",", ":")).encode
        matrices = ",\n".join(map(compact, data.pop("matrices")))
        return f'{compact(data)[:-1]},"matrices":[\n{matrices}\n]}}\n'

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        return cls(**{**data, "matrices": tuple(MatrixStudy.from_dict(m) for m in data["matrices"])})


def names(adapter: Adapter, targets: str | None = None) -> list[str]:
    """Full names of the linear maps to study: those that `targets` names, as `Architecture.targets` takes it.

    By default those that the adapter adapts, never the head; query and value for a method that trains the base's own
    weights, of which all would take minutes and gigabytes; and all where the method is not known. Raises SpecError that
    lists what the model has.
    """
    shapes = architecture.of(adapter.spec.model or "")
    method = methods.METHODS.get(adapter.spec.method or "")
    if targets is None and method and not method.in_place:
        chosen = methods.targets(shapes, resolve(adapter.spec))
        return [name for t in chosen if t.module.is_linear and not t.module.head for name in t.names()]
    wanted = ("query,value" if method else "all-linear") if targets is None else targets
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


def study(
    base: weights.Base, adapter: Adapter, names: Collection[str] | None = None, keep: int = 0
) -> Generator[float, None, Study]:
    """Studies `updates` and keeps the top `keep` directions of each. Yields the share done, 0–1. Raises what `updates` does."""
    yield 0.0
    found, done = updates(base, adapter, names), []
    total = len(found)
    while found:
        done.append(_studied(found.pop(0), keep))
        yield len(done) / total
    return Study(adapter.label, adapter.spec.model or "", adapter.spec.method, tuple(done))


def updates(base: weights.Base, adapter: Adapter, names: Collection[str] | None = None) -> list[Update]:
    """Each linear map that the adapter changes; with `names`, only those of these full names.

    ΔW is the merged weight minus the base's, so that any method that merges will do. Both are in fp64, because an fp32 sum
    would round a ΔW of rank 8 to full rank. This takes 16 bytes of main memory for each number of the named maps. Raises
    what `adapters.merge` does, and SpecError for a name that is no linear map.
    """
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
    found = []
    for name in wanted:
        before, after = (m.get_parameter(f"{name}.weight").data for m in (model, merged))
        if not before.equal(after):
            found.append(Update(name, *places[name], before, after))
    return found


def _studied(update: Update, keep: int) -> MatrixStudy:
    module, w, d = update.module, update.weight, update.delta
    weight, delta = lowrank.factors(w), lowrank.factors(d)
    return MatrixStudy(
        update.name, module.short_name, module.role, update.layer, (module.d_out, module.d_in),
        lowrank.spectrum(weight), lowrank.spectrum(delta),
        lowrank.amplification(weight, delta, min(8, delta.rank)),  # adapters compare over as many directions
        lowrank.intruders(weight, w + d), lowrank.directions(delta, keep) if keep else None,
    )  # fmt: skip
