"""The model that a run trains: a private copy of its base, with the method attached and its operations fused."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from .. import fused, methods
from ..base import architecture as architectures
from ..base import weights
from ..seeded import seeded
from ..spec import Resolved

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

DROPOUTS = ("p", "dropout", "attention_dropout", "activation_dropout", "hidden_dropout")
"""Attributes in which modules keep their chance of dropping a number."""


def attached(base: weights.Base, spec: Resolved) -> PreTrainedModel:
    """A private copy of the base with the method attached; only the method's own parameters require gradients.

    peft wraps the copy in a module of its own, which passes on what it lacks itself. Raises SpecError for a method that
    does not suit the model.
    """
    targets = methods.targets(architectures.of(spec.model), spec, base.entry.name)
    with seeded(spec.seed):
        model = methods.find(spec.method).attach(weights.share(base.model), targets, spec)
    model = cast("PreTrainedModel", model)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def quickened(model: Module, spec: Resolved, plain: bool = False) -> fused.Fused:
    """Fuses the operations of a private copy and says which; none where it is to stay `plain`."""
    if why := "as asked" if plain else fused.why_not(spec):
        return fused.Fused(kept=(f"all operations ({why})",))
    return fused.quicken(model, spec.hold_outputs)


def draws(model: Module) -> bool:
    """Whether a training step draws random numbers, for a dropout of the method or of the model itself."""
    chances = (getattr(module, name, 0) for module in model.modules() for name in DROPOUTS)
    return any(isinstance(chance, float) and chance > 0 for chance in chances)
