"""Methods that train some of the model's own parameters: all of them, the head, the last block, the biases, the norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..base.architecture import Module
from ..spec import Resolved
from . import METHODS, Drawing, Method, Select, Target, Term, in_layers, register, through_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, targets: list[Target], spec: Resolved) -> PreTrainedModel:
    """Unfreezes clones of the targets' parameters; the storage shared with the base model stays as it was.

    A parameter that several modules share stays shared where all of them are meant. A head tied to the embedding, trained
    alone, gets a weight of its own.
    """
    terms, wanted = METHODS[spec.method].terms, set()
    chosen = {name: t.module for t in targets for name in t.names()}
    for name, module in chosen.items():
        factors = {f for term in terms if term.value(module, spec) for f in term.factors}
        for own in module.own_names(name):
            if own == f"{name}.bias":
                trained = "bias" in factors
            else:  # a head's term counts its matrix alone
                trained = "weight" in factors or ("d_in" in factors and own == f"{name}.weight")
            if trained or module.classifier:
                wanted.add(own)
    alone = [model.get_submodule(name) for name, m in chosen.items() if m.head] if len(chosen) == 1 else None
    through_peft.own_tensors(model, wanted, train=True, only=alone)
    return model


def modules_that(suits: Callable[[Module, Resolved], bool], layers: str = "all") -> Select:
    """Selects the modules that suit, in these layers; in the spec's where `layers` is empty."""
    return lambda architecture, spec: in_layers(
        [m for m in architecture.modules if suits(m, spec)], architecture, layers or spec.layers
    )


FULL = Method(
    "full",
    terms=(Term(("weight",)), Term(("bias",))),
    select=modules_that(lambda module, spec: True),
    attach=attach,
    merge=lambda model: model,  # what was trained are its weights: there is nothing to fold
    in_place=True,
    drawing=Drawing(("*embedding", "*every block", "*head")),
    defaults={"learning_rate": 1e-4},
)
register(
    FULL,
    replace(
        FULL,
        key="head",
        terms=(Term(("d_in", "d_out")), Term(("bias",))),  # a tied head's `weight` counts as the embedding's
        select=modules_that(lambda module, spec: module.head or module.classifier),
        drawing=Drawing(("embedding", "every block", "*head")),
        defaults={"learning_rate": 1e-3},
        if_nothing="has no vocabulary head of its own; use last-block, or a model that writes text",
    ),
    replace(
        FULL,
        key="last-block",
        select=modules_that(lambda module, spec: True, "last:1"),
        drawing=Drawing(("embedding", "blocks", "*last block", "head")),
        defaults={"learning_rate": 3e-3},
    ),
    replace(
        FULL,
        key="bitfit",
        terms=(Term(("bias",)), Term(("weight", "train_norms"), roles=("norm",))),
        select=modules_that(lambda module, spec: bool(module.bias) or (spec.train_norms and module.kind == "norm")),
        drawing=Drawing(("W", "*+ b")),
        settings=("train_norms",),
        defaults={"learning_rate": 5e-3},
        if_nothing="has no bias to train, as most models since 2022; use ln, which trains its norms' scales (the same as "
        "to set train-norms here), or a model with biases: gpt2, opt-125m",
    ),
    replace(
        FULL,
        key="ln",
        terms=(Term(("elements",)), Term(("bias",))),  # peft copies a norm that two layers share for each of them
        select=modules_that(lambda module, spec: module.kind == "norm", layers=""),
        attach=lambda model, targets, spec: through_peft.attach(
            model, spec, "LNTuningConfig", target_modules=through_peft.names(model, targets)
        ),
        merge=through_peft.merge,
        in_place=False,
        drawing=Drawing(("~÷ deviation", "*× scale", "W")),
        settings=("layers", "adapter_precision"),
        defaults={"learning_rate": 3e-3},
        if_nothing="has no norm with parameters of its own; use lora",
    ),
)
