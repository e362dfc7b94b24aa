"""Methods that train some of the model's own parameters: all of them, the head, the last block, the biases, the norms."""

from __future__ import annotations

from typing import Any

from ..base.architecture import Architecture
from ..spec import Resolved
from . import METHODS, Drawing, Method, Target, Term, in_layers, register, through_peft


def attach(model: Any, targets: list[Target], spec: Resolved) -> Any:
    """Unfreezes clones of the targets' parameters; the storage shared with the base model stays as it was.

    A parameter that several modules share stays shared where all of them are meant. A head tied to the embedding, trained
    alone, gets a weight of its own.
    """
    import torch

    terms = METHODS[spec.method].terms
    wanted = {
        name: {f for term in terms if term.value(t.module, spec) for f in term.factors}
        for t in targets
        for name in t.names()
    }
    alone = len(wanted) == 1
    memo: dict[int, torch.nn.Parameter] = {}
    for name, module in model.named_modules():
        for own, parameter in list(module.named_parameters(recurse=False)):
            if name in wanted and wanted[name] & ({"bias"} if own == "bias" else {"weight", "d_in"}):
                new = memo.setdefault(id(parameter), torch.nn.Parameter(parameter.detach().clone()))
                if alone:
                    setattr(module, own, new)
    if not alone:
        for module in model.modules():  # tied modules hold the same parameter: every holder gets the one clone
            for own, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if id(parameter) in memo:
                    setattr(module, own, memo[id(parameter)])
    return model


def as_it_is(model: Any) -> Any:
    """What was trained are the model's weights: there is nothing to fold."""
    return model


def everything(architecture: Architecture, spec: Resolved) -> list[Target]:
    return in_layers(list(architecture.modules), architecture, "all")


def head(architecture: Architecture, spec: Resolved) -> list[Target]:
    return in_layers([m for m in architecture.modules if m.head], architecture, "all")


def last_block(architecture: Architecture, spec: Resolved) -> list[Target]:
    return in_layers(list(architecture.modules), architecture, "last:1")


def biases(architecture: Architecture, spec: Resolved) -> list[Target]:
    chosen = [m for m in architecture.modules if m.bias or (spec.train_norms and m.kind == "norm")]
    return in_layers(chosen, architecture, "all")


def norms(architecture: Architecture, spec: Resolved) -> list[Target]:
    return in_layers(architecture.with_role("norm"), architecture, spec.layers)


def attach_norms(model: Any, targets: list[Target], spec: Resolved) -> Any:
    from peft import LNTuningConfig

    return through_peft.attach(
        model, LNTuningConfig(task_type="CAUSAL_LM", target_modules=through_peft.names(targets)), spec
    )


def _register(key: str, **rest: Any) -> None:
    usual: dict[str, Any] = {
        "terms": (Term(("weight",)), Term(("bias",))),
        "attach": attach,
        "merge": as_it_is,
        "in_place": True,
    }
    register(Method(key, **{**usual, **rest}))


_register(
    "full",
    select=everything,
    drawing=Drawing(("*embedding", "*every block", "*head")),
    defaults={"learning_rate": 1e-4},
)
_register(
    "head",
    terms=(Term(("d_in", "d_out")), Term(("bias",))),  # a tied head's `weight` counts as the embedding's
    select=head,
    drawing=Drawing(("embedding", "every block", "*head")),
    defaults={"learning_rate": 1e-3},
    if_nothing="has no vocabulary head of its own; use last-block, or a model that writes text",
)
_register(
    "last-block",
    select=last_block,
    drawing=Drawing(("embedding", "blocks", "*last block", "head")),
    defaults={"learning_rate": 3e-3},
)
_register(
    "bitfit",
    terms=(Term(("bias",)), Term(("weight", "train_norms"), roles=("norm",))),
    select=biases,
    drawing=Drawing(("W", "*+ b")),
    settings=("train_norms",),
    defaults={"learning_rate": 5e-3},
    if_nothing="has no bias to train, as most models since 2022; use ln, which trains its norms' scales (the same as to "
    "set train-norms here), or a model with biases: gpt2, opt-125m",
)
_register(
    "ln",
    terms=(Term(("weight",)), Term(("bias",))),
    select=norms,
    attach=attach_norms,
    merge=through_peft.merge,
    in_place=False,
    drawing=Drawing(("~÷ deviation", "*× scale", "W")),
    settings=("layers", "adapter_precision"),
    defaults={"learning_rate": 3e-3},
    if_nothing="has no norm with parameters of its own; use lora",
)
