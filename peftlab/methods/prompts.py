"""Prompt-based methods, through peft: learned vectors where tokens would be, the model frozen."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from .. import seam
from ..base.architecture import Architecture
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Method, Target, Term, in_layers, once_a_layer, register, through_peft
from .selection import FUSED

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

VECTORS = Term(("virtual_tokens", "d_out"))


def embedding(architecture: Architecture, spec: Resolved) -> list[Target]:
    _leave_room(architecture, spec)
    return in_layers(architecture.with_role("embedding")[:1], architecture, "all")


def keys_and_values(architecture: Architecture, spec: Resolved) -> list[Target]:
    """The maps whose outputs a prefix stands before. Raises SpecError where it cannot: checkpointing, or too long a text."""
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


def attach(model: PreTrainedModel, targets: list[Target], spec: Resolved, config: str, **settings: object) -> PeftModel:
    """Vectors as wide as the embedding: a model that projects its embedding takes them before the projection."""
    return through_peft.attach(
        model, spec, config, num_virtual_tokens=spec.virtual_tokens, token_dim=targets[0].module.d_out, **settings
    )


def prefix(model: PreTrainedModel, targets: list[Target], spec: Resolved) -> PeftModel:
    """Starts from the keys and values of random tokens: Li and Liang, section 7.5, found that far better than noise."""
    import torch

    adapted = through_peft.attach(model, spec, "PrefixTuningConfig", num_virtual_tokens=spec.virtual_tokens)
    weight = adapted.prompt_encoder["default"].get_parameter("embedding.weight")
    vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
    ids = torch.randint(0, vocabulary, (1, spec.virtual_tokens))
    with torch.no_grad():
        _, cache = seam.read(model.eval(), None, input_ids=ids.to(weight.device))
        flat = [t[0].transpose(0, 1).flatten(1) for t in seam.kept_by(cache)]
        weight.copy_(torch.cat(flat, 1))
    return adapted


PROMPT = Method(
    "prompt",
    terms=(VECTORS,),
    select=embedding,
    attach=partial(attach, config="PromptTuningConfig", prompt_tuning_init="SAMPLE_VOCAB"),
    drawing=Drawing(("embedding", "all layers"), ("*vectors",), joins=1, how="before"),
    settings=("virtual_tokens", "adapter_precision"),
    defaults={"learning_rate": 1e-1},
)
register(
    PROMPT,
    replace(
        PROMPT,
        key="p-tuning",
        terms=(VECTORS, Term(("d_out", "d_out"), 3), Term(("d_out",), 3)),  # the encoder: three square linear maps
        saved=(VECTORS,),
        attach=lambda model, targets, spec: attach(
            model, targets, spec, "PromptEncoderConfig", encoder_hidden_size=targets[0].module.d_out
        ),
        drawing=replace(PROMPT.drawing, branch=("*vectors", "*MLP")),
        defaults={"learning_rate": 3e-2},
    ),
    replace(
        PROMPT,
        key="prefix",
        terms=(
            Term(("virtual_tokens", "d_out"), roles=("key", "value", FUSED)),
            Term(("virtual_tokens", "d_in"), -1, roles=(FUSED,)),  # the query's share, as wide as the input
        ),
        select=keys_and_values,
        attach=prefix,
        drawing=replace(PROMPT.drawing, main=("keys, values", "attention"), branch=("*prefix",)),
        defaults={"learning_rate": 3e-2},
        before_layers=True,
    ),
)
