"""LoRA: a low-rank update beside frozen linear maps, through peft."""

from __future__ import annotations

from typing import Any

from ..architecture import Architecture
from ..errors import SpecError
from ..spec import RunSpec
from . import Method, Target, Term, in_layers, register


def select(architecture: Architecture, spec: RunSpec) -> list[Target]:
    chosen = in_layers(architecture.targets(spec.target_modules or "all-linear"), architecture, spec.layers)
    largest = max((min(t.module.d_in, t.module.d_out) for t in chosen), default=0)
    if chosen and (spec.rank or 0) > largest:
        raise SpecError(
            f"rank={spec.rank}: no adapted matrix has a rank above {largest}, so a larger update is wasted; "
            f"try {min(largest, 8)}, or {largest} at most"
        )
    return chosen


def attach(model: Any, targets: list[Target], spec: RunSpec) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    layers = sorted({n for t in targets for n in t.layers})
    numbers: dict[str, Any] = {"r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        **numbers,
        target_modules=[t.module.name.split(".*.")[-1] for t in targets],
        layers_to_transform=None if spec.layers == "all" else layers,
        fan_in_fan_out=targets[0].module.kind == "conv1d",
    )
    adapted = get_peft_model(model, config)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.adapter_precision or "fp32"]
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


register(
    Method(
        key="lora",
        name="LoRA",
        family="additive",
        hypothesis="The change that adaptation makes to a weight matrix has a low rank.",
        trains="Two thin matrices beside each chosen linear map: A (rank × d_in) reads, B (d_out × rank) writes.",
        terms=(Term(("rank", "d_in")), Term(("rank", "d_out"))),
        select=select,
        attach=attach,
        papers=("lora", "intrinsic-dimension"),
        settings=("rank", "alpha", "dropout", "target_modules", "layers", "adapter_precision"),
        defaults={"target_modules": "all-linear", "learning_rate": 2e-3},
        merges=True,
    )
)
