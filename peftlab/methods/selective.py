"""Methods that train some of the model's own parameters: all of them, the last block, the biases."""

from __future__ import annotations

from typing import Any

from ..architecture import Architecture
from ..spec import RunSpec
from . import METHODS, Method, Target, Term, in_layers, register


def attach(model: Any, targets: list[Target], spec: RunSpec) -> Any:
    """Unfreezes clones of the targets' parameters; the storage shared with the base model stays as it is."""
    import torch

    trained = {factor for term in METHODS[spec.method or ""].terms for factor in term.factors}
    wanted = {name for t in targets for name in t.names()}
    memo: dict[int, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        if name not in wanted:
            continue
        for own, parameter in list(module.named_parameters(recurse=False)):
            if ("bias" if own == "bias" else "weight") in trained:
                memo.setdefault(id(parameter), torch.nn.Parameter(parameter.detach().clone()))
    for module in model.modules():  # tied modules hold the same parameter: every holder gets the one clone
        for own, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in memo:
                setattr(module, own, memo[id(parameter)])
    return model


def everything(architecture: Architecture, spec: RunSpec) -> list[Target]:
    return in_layers(list(architecture.modules), architecture, "all")


def last_block(architecture: Architecture, spec: RunSpec) -> list[Target]:
    return in_layers(list(architecture.modules), architecture, "last:1")


def biases(architecture: Architecture, spec: RunSpec) -> list[Target]:
    return in_layers([m for m in architecture.modules if m.bias], architecture, "all")


OWN = (Term(("weight",)), Term(("bias",)))

register(
    Method(
        key="full",
        name="Full fine-tuning",
        family="full",
        hypothesis="Every parameter may need to move; this is what the others are measured against.",
        trains="Every parameter of the model.",
        terms=OWN,
        select=everything,
        attach=attach,
        defaults={"learning_rate": 1e-4},
        in_place=True,
    )
)
register(
    Method(
        key="last-block",
        name="Last block",
        family="selective",
        hypothesis="Lower layers hold general features; the last one is enough to redirect them.",
        trains="Every parameter of the last transformer block; gradients stop below it.",
        terms=OWN,
        select=last_block,
        attach=attach,
        papers=("ulmfit",),
        defaults={"learning_rate": 1e-3},
        in_place=True,
    )
)
register(
    Method(
        key="bitfit",
        name="BitFit",
        family="selective",
        hypothesis="Fine-tuning exposes what the model already knows; its biases are knobs enough for that.",
        trains="The bias vectors, and nothing else.",
        terms=(Term(("bias",)),),
        select=biases,
        attach=attach,
        papers=("bitfit",),
        defaults={"learning_rate": 1e-2},
        in_place=True,
        if_nothing="has no bias to train, as most models since 2022; use lora, or a model with biases: gpt2, opt-125m",
    )
)
