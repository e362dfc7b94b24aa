"""Who races: a run for each of the values that are held against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from .. import methods
from ..base import models
from ..count import count
from ..errors import SpecError
from ..methods.selection import where
from ..resolve import resolve_here
from ..spec import SETTINGS, Resolved, RunSpec, closest


@dataclass(frozen=True)
class Racer:
    name: str
    spec: Resolved


def along(spec: RunSpec, axes: Mapping[str, Sequence[str]]) -> list[Racer]:
    """A racer for each combination of values; for `method` without any, all that suit. Raises SpecError for fewer than two."""
    values: dict[str, Sequence[str]] = {}
    for setting, given in axes.items():
        name = setting.replace("-", "_")
        if name not in SETTINGS:
            raise SpecError(f"vary={setting}: no such setting; {closest(name, SETTINGS)}")
        suiting = not given and name == "method"
        values[name] = [key for key in methods.METHODS if _suits(spec.but(method=key))] if suiting else given
    racers = [_racer(spec, dict(zip(values, chosen, strict=True))) for chosen in product(*values.values())]
    different = {racer.spec: racer for racer in racers}
    if len(different) < 2:
        asked = "; ".join(" ".join([setting, *given]) for setting, given in axes.items())
        raise SpecError(f"vary={asked}: a race takes at least 2 different racers; name more values")
    return list(different.values())


def _racer(spec: RunSpec, chosen: Mapping[str, str]) -> Racer:
    resolved = resolve_here(RunSpec.from_dict({**spec.to_dict(), **chosen}))
    named = {
        "method": methods.find(resolved.method).name,
        "model": models.find(resolved.model).name,
        "target_modules": where(resolved),
    }
    parts = [named.get(name, f"{name.replace('_', ' ')} {value}") for name, value in chosen.items()]
    return Racer(", ".join(parts), resolved)


def _suits(spec: RunSpec) -> bool:
    try:
        count(resolve_here(spec))
    except SpecError:
        return False
    return True
