"""Fine-tuning methods: one registry. To add one, write an entry in a file here, and its words in `catalog/methods.json`.

An entry counts by data: for each adapted module, its trainable parameters are a sum of terms, each the product of a
coefficient, sizes of the module (`d_in`, `d_out`, `weight`, `bias`) and settings of the run (`rank`, …). Python
evaluates them here; the page evaluates the same terms in the browser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..base.architecture import Architecture, Module
from ..catalog.methods import ABOUT, About
from ..errors import SpecError
from ..spec import Resolved, closest, parse_layers


@dataclass(frozen=True)
class Term:
    factors: tuple[str, ...]
    coefficient: float = 1
    roles: tuple[str, ...] = ()
    """Holds only for modules of these roles; for all when empty."""

    def value(self, module: Module, spec: Resolved) -> float:
        if self.roles and module.role not in self.roles:
            return 0
        product = self.coefficient
        for name in self.factors:
            product *= getattr(module, name) if name in SIZES else getattr(spec, name)
        return product


SIZES = ("d_in", "d_out", "weight", "bias")
USUAL_RANK = 8


@dataclass(frozen=True)
class Keep(Term):
    """Numbers that a method makes at one adapted module and that stay until the backward pass."""

    of: str = "adapter"
    """What they are: `adapter`, made by the adapter's products; `base`, by the base's; `input`, a copy of the module's input
    in the adapter's format, which is no copy where the base has that format too; `factor`, the same but for multiplying
    number by number, which autocast leaves in fp32; `weight`, a copy of the base's weight in the adapter's format, if that
    is another one; `mask`, one byte each."""
    each: str = "token"
    """How often: for each token, once for each `module`, once in the `model` and for ever, as large as the largest module
    asks, or only while the module runs (`pass`)."""
    dropout: bool | None = None
    """Only with the run's dropout (True) or only without it (False)."""


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
class Drawing:
    """The path of the data through one adapted place, left to right.

    A box whose text starts with `*` is trained, with `~` an operation without parameters; the others are frozen.
    Gaps are numbered: 0 before the first box of `main`, 1 after it, and so on.
    """

    main: tuple[str, ...]
    branch: tuple[str, ...] = ()
    """Boxes of a second line; with none it is a plain line, a skip connection."""
    leaves: int | None = None
    """Gap where the second line starts; None where it starts from nothing, as learned vectors do."""
    joins: int | None = None
    """Gap where it joins; None where there is no second line."""
    how: str = "+"


@dataclass(frozen=True)
class Method:
    key: str
    terms: tuple[Term, ...]
    """Trained parameters of one target module."""
    select: Callable[[Architecture, Resolved], list[Target]]
    """The modules it trains or adapts. Raises SpecError for names the model lacks and for models it does not suit."""
    attach: Callable[[Any, list[Target], Resolved], Any]
    """Changes a private copy of the model so that just these parameters require gradients; returns the model to train."""
    drawing: Drawing
    merge: Callable[[Any], Any] | None = None
    """The model with the method folded into its weights; None where that cannot be."""
    settings: tuple[str, ...] = ()
    """The Resolved fields that this method reads, besides those that every run has."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of automatic fields; a function of the others' values where it depends on them."""
    keeps: tuple[Keep, ...] = ()
    """What it holds at each adapted module beside its parameters, as peft's or our code lets autograd save it."""
    in_place: bool = False
    """Trains the base model's own parameters instead of new ones."""
    starts_as_base: bool = True
    """Before the first step, the model with it computes what the base does."""
    shared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name and shape of trained parameters that all targets share."""
    saved: tuple[Term, ...] | None = None
    """Parameters a module in the saved adapter, where they are not those that were trained."""
    rate: Callable[[str, Resolved], float] = lambda name, spec: 1.0
    """Learning rate of a parameter, by name, over the run's."""
    penalty: Callable[[Any], Any] | None = None
    """A term to add to the loss, from the model."""
    after_step: Callable[[Any, int], None] | None = None
    """What to do to the model once the optimizer has taken step n, from 1, while the gradients are still there."""
    rank_limit: str = ""
    """A key of RANK_LIMITS: which of the adapted matrices' own ranks the run's may not exceed; empty for none."""
    before_layers: bool = False
    """It makes tensors for all layers before the first of them runs."""
    if_nothing: str = ""
    """Why there may be nothing to train, and what to do about it."""

    @property
    def about(self) -> About:
        return ABOUT[self.key]

    @property
    def name(self) -> str:
        return self.about.name

    def trained(self, module: Module, spec: Resolved) -> int:
        """Trainable parameters in one of `module`."""
        return round(sum(term.value(module, spec) for term in self.terms))

    def kept(self, module: Module, spec: Resolved) -> int:
        """Parameters for one of `module` in the saved adapter."""
        return round(sum(term.value(module, spec) for term in self.saved or self.terms))


RANK_LIMITS: dict[str, tuple[Callable[[Iterable[int]], int], str]] = {
    "largest": (max, "no adapted matrix has a rank above"),
    "smallest": (min, "the smallest adapted matrix has rank"),
}
RANK_REFUSAL = "rank={rank}: {which} {limit}, so a larger update is wasted; try {usual}, or {limit} at most"
"""The page fills the same words."""

METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    METHODS[method.key] = method
    return method


def find(key: str) -> Method:
    if key not in METHODS:
        raise SpecError(f"method={key}: no such method; {closest(key, METHODS)}")
    return METHODS[key]


def targets(architecture: Architecture, spec: Resolved, model_name: str = "the model") -> list[Target]:
    """What `spec.method` trains. Raises SpecError that says why where it does not suit the model or the settings."""
    method = find(spec.method)
    if method.in_place and spec.quantization != "none":
        raise SpecError(
            f"quantization={spec.quantization}: {method.name} trains the base's own parameters, and those of a quantized "
            "base cannot be trained; set it to none, or use qlora"
        )
    try:
        chosen = method.select(architecture, spec)
    except Unsuited as error:
        raise SpecError(f"method={method.key}: {model_name} {error}") from None
    if not any(method.trained(t.module, spec) for t in chosen):
        raise SpecError(f"method={method.key}: {model_name} {method.if_nothing or 'has nothing for it to train'}")
    _check_rank(method, chosen, spec.rank)
    return chosen


def _check_rank(method: Method, chosen: list[Target], rank: int) -> None:
    if not method.rank_limit:
        return
    extreme, which = RANK_LIMITS[method.rank_limit]
    limit = extreme(min(t.module.d_in, t.module.d_out) for t in chosen)
    if rank > limit:
        raise SpecError(RANK_REFUSAL.format(rank=rank, which=which, limit=limit, usual=min(limit, USUAL_RANK)))


class Unsuited(SpecError):
    """Raised by `select`: what the model has or lacks, and the fix, to be read after the model's name."""


def in_layers(modules: list[Module], architecture: Architecture, layers: str | None) -> list[Target]:
    """`modules` within the chosen layers; ones outside any layer only when all layers are chosen."""
    numbers = parse_layers(layers or "all", architecture.n_layers)
    whole = len(numbers) == architecture.n_layers
    found = [Target(m, tuple(n for n in m.layers if n in numbers)) for m in modules if m.layers or whole]
    return [t for t in found if t.layers or not t.module.layers]


def linear_targets(architecture: Architecture, spec: Resolved) -> list[Target]:
    """The linear maps named by the spec, in its layers."""
    return in_layers(architecture.targets(spec.target_modules), architecture, spec.layers)


def once_a_layer(architecture: Architecture, *roles: str) -> list[Module]:
    """The modules that play `roles`, each once in every layer. Raises Unsuited where one is missing, or not alone."""
    for role in roles:
        layers = sorted(n for m in architecture.with_role(role) for n in m.layers)
        if layers != list(range(architecture.n_layers)):
            many = len(layers) > architecture.n_layers
            found = f"several {role} projections in a layer" if many else f"no {role} projection under a known name"
            raise Unsuited(f"has {found}; use lora, which takes any linear map")
    return architecture.with_role(*roles)


def _discover() -> None:
    """Every file of this folder, then the catalogue's order."""
    for file in iter_modules(__path__):
        import_module(f".{file.name}", __name__)
    if odd := set(METHODS) ^ set(ABOUT):
        raise LookupError(
            f"{min(odd)} needs both an entry in a file of peftlab/methods and one in catalog/methods.json"
        )
    for key in ABOUT:
        METHODS[key] = METHODS.pop(key)


_discover()
