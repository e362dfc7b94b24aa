"""Prompt-based methods, through peft: learned vectors where tokens would be, the model frozen."""

from __future__ import annotations

from typing import Any

from .. import seam
from ..base.architecture import Architecture
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Method, Target, Term, in_layers, once_a_layer, register, through_peft

SETTINGS = ("virtual_tokens", "adapter_precision")
VECTORS = Term(("virtual_tokens", "d_out"))
FUSED = ("query+key+value",)


def embedding(architecture: Architecture, spec: Resolved) -> list[Target]:
    _leave_room(architecture, spec)
    return in_layers(architecture.with_role("embedding")[:1], architecture, "all")


def keys_and_values(architecture: Architecture, spec: Resolved) -> list[Target]:
    _leave_room(architecture, spec)
    if spec.gradient_checkpointing:
        raise SpecError(
            "gradient-checkpointing=true: it drops the cache, which is where the prefix is; turn it off, or use prompt"
        )
    return in_layers(once_a_layer(architecture, "key", "value"), architecture, "all")


def _leave_room(architecture: Architecture, spec: Resolved) -> None:
    tokens, context = spec.virtual_tokens, architecture.context
    left = context - spec.sequence_length
    if not context or tokens <= left:
        return
    if left > 0:
        raise SpecError(
            f"virtual-tokens={tokens}: the model reads {context:,} tokens and the task's examples take "
            f"{spec.sequence_length:,}; try {min(left, 20)}"
        )
    raise SpecError(
        f"sequence-length={spec.sequence_length}: the model reads {context:,} tokens, and so many leave no room for "
        f"{tokens} virtual tokens; try {max(8, context - tokens)}"
    )


def prompt(model: Any, targets: list[Target], spec: Resolved) -> Any:
    from peft import PromptTuningConfig

    return through_peft.attach(
        model, PromptTuningConfig(**_config(targets, spec), prompt_tuning_init="SAMPLE_VOCAB"), spec
    )


def encoded(model: Any, targets: list[Target], spec: Resolved) -> Any:
    from peft import PromptEncoderConfig

    width = targets[0].module.d_out
    return through_peft.attach(model, PromptEncoderConfig(**_config(targets, spec), encoder_hidden_size=width), spec)


def _config(targets: list[Target], spec: Resolved) -> dict[str, Any]:
    """Width and number of the vectors; a model that projects its embedding takes them before the projection."""
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": spec.virtual_tokens,
        "token_dim": targets[0].module.d_out,
    }


def prefix(model: Any, targets: list[Target], spec: Resolved) -> Any:
    """Starts from the keys and values of random tokens: Li and Liang, section 7.5, found that far better than noise."""
    import torch
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=spec.virtual_tokens)
    adapted = through_peft.attach(model, config, spec)
    weight = adapted.prompt_encoder["default"].embedding.weight
    ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (1, spec.virtual_tokens))
    with torch.no_grad():
        _, cache = seam.read(model.eval(), None, input_ids=ids.to(weight.device))
        flat = [t[0].transpose(0, 1).flatten(1) for layer in cache.layers for t in (layer.keys, layer.values)]
        weight.copy_(torch.cat(flat, 1))
    return adapted


register(
    Method(
        "prompt",
        terms=(VECTORS,),
        select=embedding,
        attach=prompt,
        drawing=Drawing(("embedding", "all layers"), ("*vectors",), joins=1, how="before"),
        settings=SETTINGS,
        defaults={"learning_rate": 1e-1},
        starts_as_base=False,
    )
)
register(
    Method(
        "p-tuning",
        terms=(VECTORS, Term(("d_out", "d_out"), 3), Term(("d_out",), 3)),  # the encoder: three square linear maps
        saved=(VECTORS,),
        select=embedding,
        attach=encoded,
        drawing=Drawing(("embedding", "all layers"), ("*vectors", "*MLP"), joins=1, how="before"),
        settings=SETTINGS,
        defaults={"learning_rate": 3e-2},
        starts_as_base=False,
    )
)
register(
    Method(
        "prefix",
        terms=(
            Term(("virtual_tokens", "d_out"), roles=("key", "value", *FUSED)),
            Term(("virtual_tokens", "d_in"), -1, roles=FUSED),  # the query's share, as wide as the input
        ),
        select=keys_and_values,
        attach=prefix,
        drawing=Drawing(("keys, values", "attention"), ("*prefix",), joins=1, how="before"),
        settings=SETTINGS,
        defaults={"learning_rate": 3e-2},
        starts_as_base=False,
        before_layers=True,
    )
)
