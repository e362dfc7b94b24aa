"""What the registry holds of a method; what it trains is a sum of terms, which Python counts and the page in the browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ..base.architecture import Architecture, Module
from ..catalog import ABOUT, About
from ..spec import Resolved
from .selection import Target

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SIZES = ("d_in", "d_out", "width", "cached", "stacks", "elements", "weight", "bias")
"""Factors of a term that are sizes of a module; its others are settings of the run."""
Select: TypeAlias = Callable[[Architecture, Resolved], list[Target]]
Attach: TypeAlias = "Callable[[PreTrainedModel, list[Target], Resolved], nn.Module]"


@dataclass(frozen=True)
class Term:
    """A number of parameters in one module: the coefficient times all factors."""

    factors: tuple[str, ...]  # names out of SIZES, and of settings such as `rank`
    coefficient: float = 1
    roles: tuple[str, ...] = ()  # of the modules that have this term; empty for all modules

    def value(self, module: Module, spec: Resolved) -> float:
        if self.roles and module.role not in self.roles:
            return 0
        product = self.coefficient
        for name in self.factors:
            product *= getattr(module, name) if name in SIZES else getattr(spec, name)
        return product


@dataclass(frozen=True)
class Keep(Term):
    """Numbers that a method makes at one adapted module and that stay until the backward pass."""

    of: str = "adapter"
    """What makes them: `adapter`, the adapter's products; `base`, the base's products; `input`, a copy of the module's
    input in the adapter's format, made only where the base has another; `factor`, the same for a product number by number,
    which autocast leaves in fp32; `weight`, a copy of the base's weight in the adapter's format, made only where that is
    another; `mask`, dropout's mask of one byte each."""
    each: str = "token"
    """How often they are made: for each `token`; once for each `module`; once for the whole `model`, as large as its
    largest module asks, and never freed; or, for `pass`, at each module, which frees them when it has run."""
    dropout: bool | None = None  # True: made only in a run with dropout; False: only without; None: in both


@dataclass(frozen=True)
class Drawing:
    """The path of the data through one adapted place, left to right. Gap 0 comes before the first box of `main`.

    A box whose text starts with `*` is trained, one with `~` an operation without parameters; the others are frozen.
    """

    main: tuple[str, ...]
    branch: tuple[str, ...] = ()  # boxes of a second line; one without boxes is a skip connection
    leaves: int | None = None  # gap where the second line starts; None where from nothing, as learned vectors do
    joins: int | None = None  # gap where it joins; None where there is no second line
    how: str = "+"


@dataclass(frozen=True)
class Method:
    key: str
    terms: tuple[Term, ...]  # trained parameters of one target module
    select: Select
    """The modules it trains or adapts. Raises SpecError for names the model lacks and for models it does not suit."""
    attach: Attach
    """Changes a private copy of the model so that just these parameters require gradients; returns the model to train."""
    drawing: Drawing
    merge: Callable[[nn.Module], nn.Module] | None = None
    """The model with the method folded into its weights; None where that cannot be."""
    settings: tuple[str, ...] = ()  # the fields of a spec that this method reads, besides those that every run has
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of automatic fields; or functions of all defaults
    keeps: tuple[Keep, ...] = ()  # what autograd saves at each adapted module beside its parameters
    in_place: bool = False  # trains the base model's own parameters instead of new ones
    shared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of parameters that all targets share
    saved: tuple[Term, ...] | None = None  # a module's in the saved adapter, where they are not those that were trained
    rate: Callable[[str, Resolved], float] = lambda name, spec: 1.0  # factor of a parameter's learning rate, by name
    penalty: Callable[[nn.Module], Tensor] | None = None  # a term to add to the loss, from the model
    after_step: Callable[[nn.Module, int], None] | None = None
    """What to do to the model once the optimizer has taken step n, from 1, while the gradients are still there."""
    rank_limit: str = ""
    """A key of RANK_LIMITS: which of the adapted matrices' own ranks the run's may not exceed; empty for none."""
    low_rank: bool = False  # it is LoRA in peft, whose targets `Architecture.adaptable` tells from those of others
    before_layers: bool = False  # it makes tensors for all layers before the first of them runs
    if_nothing: str = ""  # why there may be nothing to train, and what to do about it

    @property
    def about(self) -> About:
        return ABOUT[self.key]

    @property
    def name(self) -> str:
        return self.about.name

    def trained(self, module: Module, spec: Resolved) -> int:
        """Trainable parameters in one of `module`. A classifier is new, and is trained whole beside whatever is."""
        if module.classifier:
            return module.weight + module.bias
        return round(sum(term.value(module, spec) for term in self.terms))

    def kept(self, module: Module, spec: Resolved) -> int:
        """Parameters for one of `module` in the saved adapter."""
        if module.classifier:
            return module.weight + module.bias
        return round(sum(term.value(module, spec) for term in self.saved or self.terms))
