"""The low-rank family, through peft: a product of thin matrices beside frozen linear maps."""

from __future__ import annotations

import math
from typing import Any

from ..base.architecture import Architecture
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Keep, Method, Target, Term, linear_targets, register, through_peft

SETTINGS = ("rank", "alpha", "dropout", "target_modules", "layers", "adapter_precision")
BA = (Term(("rank", "d_in")), Term(("rank", "d_out")))
DROPPED = Keep(("d_in",), of="mask", dropout=True)
INPUT = (Keep(("d_in",), of="input"), DROPPED, Keep(("rank",)))
"""For A's gradient and for B's."""
PARALLEL = Drawing(("W",), ("*A", "*B", "~× α/r"), leaves=0, joins=1)


def quantized(architecture: Architecture, spec: Resolved) -> list[Target]:
    if spec.quantization == "none":
        raise SpecError("quantization=none: QLoRA is LoRA on a quantized base; set it to nf4 or int8, or use lora")
    return linear_targets(architecture, spec)


def unquantized(architecture: Architecture, spec: Resolved) -> list[Target]:
    if spec.quantization != "none":
        raise SpecError(
            f"quantization={spec.quantization}: PiSSA takes W apart by its singular values, for which W must be whole; "
            "set it to none, or use qlora"
        )
    return linear_targets(architecture, spec)


def attach(model: Any, targets: list[Target], spec: Resolved, **variant: Any) -> Any:
    from peft import LoraConfig

    config = LoraConfig(**_config(targets), r=spec.rank, **_scale(spec), **variant)
    return through_peft.attach(model, config, spec)


def _config(targets: list[Target]) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "target_modules": through_peft.names(targets),
        "fan_in_fan_out": targets[0].module.kind == "conv1d",
    }


def _scale(spec: Resolved) -> dict[str, Any]:
    return {"lora_alpha": spec.alpha, "lora_dropout": spec.dropout}


def rank_stabilized(model: Any, targets: list[Target], spec: Resolved) -> Any:
    return attach(model, targets, spec, use_rslora=True)


def decomposed(model: Any, targets: list[Target], spec: Resolved) -> Any:
    return attach(model, targets, spec, use_dora=True)


def principal(model: Any, targets: list[Target], spec: Resolved) -> Any:
    adapted = attach(model, targets, spec)
    adapted.peft_config["default"].init_lora_weights = "pissa"
    through_peft.leave_residual(adapted, start=True)
    return adapted


def faster_b(name: str, spec: Resolved) -> float:
    """LoRA+, section 4: B learns `lr_ratio` times as fast as A."""
    return spec.lr_ratio if "lora_B" in name else 1.0


def adaptive(model: Any, targets: list[Target], spec: Resolved) -> Any:
    """AdaLoRA over the run's steps: a tenth to warm up, three tenths at the final budget, the cuts in between."""
    from peft import AdaLoraConfig

    rank, steps = spec.rank, max(spec.steps, 2)  # the last cut needs a step before it, to judge by
    config = AdaLoraConfig(
        **_config(targets),
        **_scale(spec),
        init_r=rank,
        target_r=max(1, round(rank * SURVIVING)),
        total_step=steps,
        tinit=steps // 10,
        tfinal=3 * steps // 10,
    )
    model = through_peft.attach(model, config, spec)
    for name, parameter in model.named_parameters():
        if "ranknum" in name:  # a count of ranks, which peft moves to a GPU as a copy that would be trained
            parameter.requires_grad_(False)
    return model


SURVIVING = 2 / 3
"""Share of AdaLoRA's initial ranks that its final budget pays for: peft's 8 of 12."""
ORTHOGONALITY = 0.5
"""Weight of AdaLoRA's penalty on A and B that are not orthogonal: peft's default."""


def orthogonality(model: Any) -> Any:
    """AdaLoRA, equation 4: the mean of ‖PPᵀ − I‖ over all A and B."""
    import torch

    off = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = p @ p.T if "lora_A" in name else p.T @ p
            off.append(torch.linalg.matrix_norm(square - torch.eye(len(square), device=p.device, dtype=p.dtype)))
    return ORTHOGONALITY * torch.stack(off).mean()


def cut_ranks(model: Any, step: int) -> None:
    model.base_model.update_and_allocate(step)


def vectors(model: Any, targets: list[Target], spec: Resolved) -> Any:
    from peft import VeraConfig

    config = VeraConfig(
        **_config(targets),
        r=spec.rank,
        vera_dropout=spec.dropout,
        projection_prng_key=spec.seed,
        save_projection=False,  # the seed makes them again
    )
    return through_peft.attach(model, config, spec)


def rate_of_rank(spec: dict[str, Any]) -> float:
    """The best learning rate for LoRA's rank, α twice the rank: the more rank, the farther a step of each of its weights
    moves what they multiply to. From the recorded races over both (assets/measured/race-rank-*.json).
    """
    return next(rate for most, rate in ((16, 3e-3), (64, 1e-3), (math.inf, 3e-4)) if spec["rank"] <= most)


def _register(key: str, **rest: Any) -> None:
    usual: dict[str, Any] = {
        "terms": BA,
        "keeps": INPUT,
        "select": linear_targets,
        "attach": attach,
        "merge": through_peft.merge,
        "drawing": PARALLEL,
        "settings": SETTINGS,
        "rank_limit": "largest",
    }
    register(Method(key, **{**usual, **rest}))


_register("lora", defaults={"learning_rate": rate_of_rank})
_register(
    "qlora",
    select=quantized,
    drawing=Drawing(("W in NF4",), ("*A", "*B", "~× α/r"), leaves=0, joins=1),
    defaults={"learning_rate": rate_of_rank, "quantization": "nf4"},
)
_register(
    "rslora",
    attach=rank_stabilized,
    drawing=Drawing(("W",), ("*A", "*B", "~× α/√r"), leaves=0, joins=1),
    defaults={"learning_rate": 2e-3, "alpha": 8.0},
)
_register(
    "dora",
    terms=(*BA, Term(("d_out",))),
    keeps=(
        *INPUT,
        Keep(("d_out",)),  # BAx and, below, Wx: for the magnitude's gradient
        Keep(("d_out",), of="base", dropout=False),
        Keep(("d_out",), dropout=True),  # W times the input that dropout left, and W in the adapter's format
        Keep(("d_in", "d_out"), of="weight", each="module", dropout=True),
        Keep(("d_out",), 3, each="module"),
        Keep(("d_in", "d_in"), each="pass"),  # an identity matrix, sent through A and B to see their product
        Keep(("d_in", "d_out"), 4, each="pass"),  # W, BA, α/r BA and their sum, for the norm of each row
    ),
    attach=decomposed,
    drawing=Drawing(("W", "~÷ norm", "*× m"), ("*A", "*B", "~× α/r"), leaves=0, joins=1),
    defaults={"learning_rate": rate_of_rank},
)
_register("lora-plus", rate=faster_b, settings=(*SETTINGS, "lr_ratio"), defaults={"learning_rate": 3e-4})
_register(
    "pissa",
    select=unquantized,
    attach=principal,
    rank_limit="smallest",
    drawing=Drawing(("W − BA at the start",), ("*A", "*B", "~× α/r"), leaves=0, joins=1),
    defaults={"learning_rate": 1e-3, "alpha": lambda spec: float(spec["rank"])},
)
_register(
    "adalora",
    terms=(*BA, Term(("rank",))),
    keeps=(*INPUT, Keep(("rank", "d_in"), each="module")),  # ΛA
    attach=adaptive,
    drawing=Drawing(("W",), ("*A", "*Λ, pruned", "*B", "~× α/r"), leaves=0, joins=1),
    defaults={"learning_rate": 1e-2, "rank": 12},
    penalty=orthogonality,
    after_step=cut_ranks,
)
_register(
    "vera",
    terms=(Term(("rank",)), Term(("d_out",))),
    keeps=(
        DROPPED,
        Keep(("rank",)),
        Keep(("d_out",)),
        Keep(("rank", "d_in"), each="model"),  # the two random matrices
        Keep(("rank", "d_out"), each="model"),
    ),
    attach=vectors,
    rank_limit="",
    drawing=Drawing(("W",), ("A, random", "*× d", "B, random", "*× b"), leaves=0, joins=1),
    settings=("rank", "dropout", "target_modules", "layers", "adapter_precision"),
    defaults={"learning_rate": 3e-2, "rank": 256},
)
