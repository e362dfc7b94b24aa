"""Fine-tuning methods: one registry. To add one, write an entry and list its file in `_FILES`.

An entry counts by data: for each adapted module, its trainable parameters are a sum of terms, each the product of a
coefficient, sizes of the module (`d_in`, `d_out`, `weight`, `bias`) and settings of the run (`rank`, …). Python
evaluates them here; the page evaluates the same terms in the browser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ..architecture import Architecture, Module
from ..errors import SpecError
from ..spec import RunSpec, closest, parse_layers

_FILES = ("lora", "selective")


@dataclass(frozen=True)
class Term:
    factors: tuple[str, ...]
    coefficient: int = 1

    def value(self, module: Module, spec: RunSpec) -> int:
        product = self.coefficient
        for name in self.factors:
            product *= getattr(module, name) if name in SIZES else getattr(spec, name)
        return product


SIZES = ("d_in", "d_out", "weight", "bias")


@dataclass(frozen=True)
class Target:
    """A kind of module and the layers of it that a method trains."""

    module: Module
    layers: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.layers) if self.module.layers else 1

    def names(self) -> list[str]:
        return [name for layer, name in self.module.names() if layer is None or layer in self.layers]


@dataclass(frozen=True)
class Method:
    key: str
    name: str
    family: str
    """full, additive, selective or prompt-based: the lectures' three families and their yardstick."""
    hypothesis: str
    """Why it should work, in one sentence."""
    trains: str
    """What is trained and where."""
    terms: tuple[Term, ...]
    select: Callable[[Architecture, RunSpec], list[Target]]
    """The modules it trains or adapts. Raises SpecError for names the model lacks."""
    attach: Callable[[Any, list[Target], RunSpec], Any]
    """Changes a private copy of the model so that just these parameters require gradients; returns the model to train."""
    papers: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    """The RunSpec fields that this method reads, besides those that every run has."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    in_place: bool = False
    """Trains the base model's own parameters instead of new ones."""
    merges: bool = False
    """Whether the result can be folded into the base's weights."""
    if_nothing: str = ""
    """Why there may be nothing to train, and what to do about it."""


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    METHODS[method.key] = method
    return method


def find(key: str) -> Method:
    if key not in METHODS:
        raise SpecError(f"method={key}: no such method; {closest(key, METHODS)}")
    return METHODS[key]


def targets(architecture: Architecture, spec: RunSpec, model_name: str = "the model") -> list[Target]:
    """What `spec.method` trains. Raises SpecError where that is nothing, in the words of the method's entry."""
    method = find(spec.method or "")
    chosen = method.select(architecture, spec)
    if not any(term.value(t.module, spec) for t in chosen for term in method.terms):
        raise SpecError(f"method={method.key}: {model_name} {method.if_nothing or 'has nothing for it to train'}")
    return chosen


def in_layers(modules: list[Module], architecture: Architecture, layers: str | None) -> list[Target]:
    """`modules` within the chosen layers; ones outside any layer only when all layers are chosen."""
    numbers = parse_layers(layers or "all", architecture.n_layers)
    whole = len(numbers) == architecture.n_layers
    found = [Target(m, tuple(n for n in m.layers if n in numbers)) for m in modules if m.layers or whole]
    return [t for t in found if t.layers or not t.module.layers]


for _name in _FILES:
    import_module(f".{_name}", __name__)
