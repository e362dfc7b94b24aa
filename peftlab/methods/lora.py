"""The low-rank family, through peft: a product of thin matrices beside frozen linear maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ..base.architecture import Architecture
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Keep, Method, Target, Term, Unsuited, linear_targets, maps_alone, register, through_peft
from .selection import only_maps

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from peft.tuners.adalora import AdaLoraModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SURVIVING = 2 / 3  # share of AdaLoRA's initial ranks that its final budget pays for: peft's 8 of 12
ORTHOGONALITY = 0.5  # weight of AdaLoRA's penalty on A and B that are not orthogonal: peft's default


def low_rank(architecture: Architecture, spec: Resolved) -> list[Target]:
    """LoRA's targets: linear maps, embeddings, and experts where peft adapts those. Raises SpecError for dropout there."""
    chosen = linear_targets(architecture, spec, low_rank=True)
    if spec.dropout and (experts := _experts(chosen)):
        raise SpecError(
            f"dropout={spec.dropout:g}: {experts} holds all experts in one parameter, whose input peft cannot drop; set it "
            f"to 0, or name other target-modules: {_others(architecture)}"
        )
    return chosen


def whole_maps(architecture: Architecture, spec: Resolved) -> list[Target]:
    """The same, for variants that peft has for linear maps alone. Raises Unsuited for experts in one parameter."""
    chosen = low_rank(architecture, spec)
    if experts := _experts(chosen):
        raise Unsuited(
            f"has its experts in one parameter, {experts}, for which peft has plain LoRA only; use lora, or name other "
            f"target-modules: {_others(architecture)}"
        )
    return chosen


def _experts(targets: list[Target]) -> str:
    return next((t.module.name for t in targets if t.module.kind == "experts"), "")


def _others(architecture: Architecture) -> str:
    """Names of the modules that are no experts."""
    able = [m for m in architecture.adaptable(low_rank=True) if m.is_linear]
    return ",".join(dict.fromkeys(m.short_name for m in able))


def quantized(architecture: Architecture, spec: Resolved) -> list[Target]:
    """Raises SpecError for a base that is not quantized."""
    if spec.quantization == "none":
        raise SpecError("quantization=none: QLoRA is LoRA on a quantized base; set it to nf4 or int8, or use lora")
    return low_rank(architecture, spec)


def unquantized(architecture: Architecture, spec: Resolved) -> list[Target]:
    """Raises SpecError for a quantized base, Unsuited for what is no linear map."""
    if spec.quantization != "none":
        raise SpecError(
            f"quantization={spec.quantization}: PiSSA takes W apart by its singular values, for which W must be whole; "
            "set it to none, or use qlora"
        )
    return only_maps(whole_maps(architecture, spec))


def unrefused(architecture: Architecture, spec: Resolved) -> list[Target]:
    """AdaLoRA's linear maps: peft refuses it where it refuses LoRA, and does not find experts for it."""
    return [t for t in maps_alone(architecture, spec) if t.module.short_name not in architecture.refused]


def attach(model: PreTrainedModel, targets: list[Target], spec: Resolved, **settings: object) -> PeftModel:
    settings |= {"r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout}
    settings |= {**through_peft.linear(model, targets), **through_peft.experts(model, targets, spec)}
    return through_peft.attach(model, spec, "LoraConfig", **settings)


def principal(model: PreTrainedModel, targets: list[Target], spec: Resolved) -> PeftModel:
    """PiSSA: A and B are the best approximation of W of that rank, and W keeps the rest."""
    adapted = attach(model, targets, spec)
    cast("LoraConfig", adapted.peft_config["default"]).init_lora_weights = "pissa"
    through_peft.leave_residual(adapted, start=True)
    return adapted


def adaptive(model: PreTrainedModel, targets: list[Target], spec: Resolved) -> PeftModel:
    """AdaLoRA over the run's steps: a tenth to warm up, three tenths at the final budget, the cuts in between."""
    steps = max(spec.steps, 2)  # the last cut needs a step before it, to judge by
    ranks = {"init_r": spec.rank, "target_r": max(1, round(spec.rank * SURVIVING))}
    times = {"total_step": steps, "tinit": steps // 10, "tfinal": 3 * steps // 10}
    settings = {
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        **through_peft.linear(model, targets),
        **ranks,
        **times,
    }
    adapted = through_peft.attach(model, spec, "AdaLoraConfig", **settings)
    for name, parameter in adapted.named_parameters():
        if "ranknum" in name:  # a count of ranks, which peft moves to a GPU as a copy that would be trained
            parameter.requires_grad_(False)
    return adapted


def shared_random(model: PreTrainedModel, targets: list[Target], spec: Resolved) -> PeftModel:
    """VeRA: A and B are random, drawn from the seed and shared by all maps; two vectors of each map are trained."""
    drawn = {"projection_prng_key": spec.seed, "save_projection": False}  # the seed makes them again
    settings = {"r": spec.rank, "vera_dropout": spec.dropout, **through_peft.linear(model, targets), **drawn}
    return through_peft.attach(model, spec, "VeraConfig", **settings)


def orthogonality(model: nn.Module) -> Tensor:
    """AdaLoRA, equation 4: the mean of ‖PPᵀ − I‖ over all A and B, a scalar."""
    import torch

    off = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = p @ p.T if "lora_A" in name else p.T @ p
            off.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=p.device, dtype=p.dtype)))
    return ORTHOGONALITY * torch.stack(off).mean()


def rate_of_rank(spec: Mapping[str, Any]) -> float:
    """The best learning rate for LoRA's rank at an α of twice the rank, by the recorded races (race-rank-*.json)."""
    return next(rate for most, rate in ((16, 3e-3), (64, 1e-3), (math.inf, 3e-4)) if spec["rank"] <= most)


DROPPED = Keep(("d_in",), of="mask", dropout=True)
LORA = Method(
    "lora",
    terms=(Term(("rank", "d_in")), Term(("rank", "d_out"))),
    keeps=(Keep(("d_in",), of="input"), DROPPED, Keep(("rank",))),  # for A's gradient and for B's
    select=low_rank,
    attach=attach,
    merge=through_peft.merge,
    drawing=Drawing(("W",), ("*A", "*B", "~× α/r"), leaves=0, joins=1),
    settings=("rank", "alpha", "dropout", "target_modules", "layers", "adapter_precision"),
    defaults={"learning_rate": rate_of_rank},
    rank_limit="largest",
    low_rank=True,
)
register(
    LORA,
    replace(
        LORA,
        key="qlora",
        select=quantized,
        drawing=replace(LORA.drawing, main=("W in NF4",)),
        defaults={"learning_rate": rate_of_rank, "quantization": "nf4"},
    ),
    replace(
        LORA,
        key="rslora",
        attach=partial(attach, use_rslora=True),
        drawing=replace(LORA.drawing, branch=("*A", "*B", "~× α/√r")),
        defaults={"learning_rate": 2e-3, "alpha": 8.0},
    ),
    replace(
        LORA,
        key="dora",
        terms=(*LORA.terms, Term(("d_out",))),
        keeps=(
            *LORA.keeps,
            Keep(("d_out",)),  # BAx and, below, Wx: for the magnitude's gradient
            Keep(("d_out",), of="base", dropout=False),
            Keep(("d_out",), dropout=True),  # W times the input that dropout left, and W in the adapter's format
            Keep(("d_in", "d_out"), of="weight", each="module", dropout=True),
            Keep(("d_out",), 3, each="module"),
            Keep(("d_in", "d_in"), each="pass"),  # an identity matrix, sent through A and B to see their product
            Keep(("d_in", "d_out"), 4, each="pass"),  # W, BA, α/r BA and their sum, for the norm of each row
        ),
        select=whole_maps,
        attach=partial(attach, use_dora=True),
        drawing=replace(LORA.drawing, main=("W", "~÷ norm", "*× m")),
    ),
    replace(
        LORA,
        key="lora-plus",
        rate=lambda name, spec: spec.lr_ratio if "lora_B" in name else 1.0,  # section 4
        settings=(*LORA.settings, "lr_ratio"),
        defaults={"learning_rate": 3e-4},
    ),
    replace(
        LORA,
        key="pissa",
        select=unquantized,
        attach=principal,
        rank_limit="smallest",
        drawing=replace(LORA.drawing, main=("W − BA at the start",)),
        defaults={"learning_rate": 1e-3, "alpha": lambda spec: float(spec["rank"])},
    ),
    replace(
        LORA,
        key="adalora",
        terms=(*LORA.terms, Term(("rank",))),
        keeps=(*LORA.keeps, Keep(("rank", "d_in"), each="module")),  # ΛA
        select=unrefused,
        low_rank=False,
        attach=adaptive,
        drawing=replace(LORA.drawing, branch=("*A", "*Λ, pruned", "*B", "~× α/r")),
        defaults={"learning_rate": 1e-2, "rank": 12},
        penalty=orthogonality,
        after_step=lambda model, step: cast("AdaLoraModel", model.base_model).update_and_allocate(step),
    ),
    replace(
        LORA,
        key="vera",
        terms=(Term(("rank",)), Term(("d_out",))),
        keeps=(
            DROPPED,
            Keep(("rank",)),
            Keep(("d_out",)),
            Keep(("rank", "d_in"), each="model"),  # the two random matrices
            Keep(("rank", "d_out"), each="model"),
        ),
        select=maps_alone,
        low_rank=False,
        attach=shared_random,
        rank_limit="",
        drawing=replace(LORA.drawing, branch=("A, random", "*× d", "B, random", "*× b")),
        settings=("rank", "dropout", "target_modules", "layers", "adapter_precision"),
        defaults={"learning_rate": 3e-2, "rank": 256},
    ),
)
