"""Prompt-based methods, through peft: learned vectors where tokens would be, the model frozen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .. import seam
from ..base import architecture as architectures
from ..base.architecture import Architecture
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Method, Target, Term, Unsuited, in_layers, register, through_peft, with_roles
from .selection import FUSED

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

VECTORS = Term(("virtual_tokens", "d_out", "stacks"))


def embedding(architecture: Architecture, spec: Resolved) -> list[Target]:
    _leave_room(architecture, spec)
    return in_layers(architecture.with_role("embedding")[:1], architecture, "all")


def keys_and_values(architecture: Architecture, spec: Resolved) -> list[Target]:
    """The maps whose outputs a prefix stands before. Raises SpecError where it cannot: checkpointing, or too long a text.

    With an encoder, they are those of the decoder's attention to itself. Raises Unsuited for caches that peft cannot fill.
    """
    _leave_room(architecture, spec)
    if spec.gradient_checkpointing:
        raise SpecError(
            "gradient-checkpointing=true: it drops the cache, which is where the prefix is; turn it off, or use prompt"
        )
    makers = with_roles(architecture, "key", "value")
    stacks = [s for s, depth in architecture.depths.items() if any(m.stack == s for m in makers)]
    has_encoder = any(m.stacks > 1 for m in architecture.modules)
    deep = stacks[-1:] if has_encoder else [s for s in stacks if architecture.depths[s] == architecture.n_layers]
    own, chosen, widths = [m for m in makers if m.stack in deep], [], set()
    for n in range(architecture.depths[deep[0]] if len(deep) == 1 else 0):
        in_layer = [m for m in own if n in m.layers]
        first = [m for m in in_layer if m.parent == in_layer[0].parent]
        widths.add(sum(m.cached for m in first) if all(m.cached for m in first) else 0)
        chosen += [m for m in first if m not in chosen]
    facts = architecture.facts
    usual = 2 * facts.kv_heads * facts.head_size
    fits = widths == {usual} or (len(widths) == 1 and chosen[0].role in FUSED and 0 < max(widths) < usual)
    if not fits or not facts.plain_cache or len({m.parent for m in chosen}) != 1:
        odd = next((m.name for m in own if not m.cached), "some layers have none, others, or a state of another kind")
        raise Unsuited(f"keeps no plain keys and values in every layer ({odd}), and peft fills only those; use prompt")
    return [Target(m, m.layers) for m in chosen]


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
    shape = architectures.of(spec.model)
    settings |= {"token_dim": targets[0].module.d_out, "num_layers": shape.n_layers}
    settings |= {"num_attention_heads": shape.facts.heads or 1}  # which peft asks for, and these methods do not read
    return through_peft.attach(model, spec, config, num_virtual_tokens=spec.virtual_tokens, **settings)


def vectors(model: PreTrainedModel, targets: list[Target], spec: Resolved) -> PeftModel:
    """Starts from the vectors of random tokens, which peft finds by their number; from noise where it would not find them."""
    found = targets[0].module.d_in == getattr(model.config, "vocab_size", 0)
    return attach(model, targets, spec, "PromptTuningConfig", prompt_tuning_init="SAMPLE_VOCAB" if found else "RANDOM")


def prefix(model: PreTrainedModel, targets: list[Target], spec: Resolved) -> PeftModel:
    """Starts from the keys and values of random tokens: Li and Liang, section 7.5, found that far better than noise."""
    import torch

    facts, layers = architectures.of(spec.model).facts, {n for t in targets for n in t.layers}
    width = sum(t.module.cached * t.count for t in targets) // (2 * len(layers))
    shape = {"num_layers": len(layers), "token_dim": width, "num_attention_heads": width // facts.head_size}
    adapted = through_peft.attach(model, spec, "PrefixTuningConfig", num_virtual_tokens=spec.virtual_tokens, **shape)
    if model.config.is_encoder_decoder:  # peft's own start: the cache would need a text for the encoder
        return adapted
    weight = adapted.prompt_encoder["default"].get_parameter("embedding.weight")
    vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
    ids = torch.randint(0, vocabulary, (1, spec.virtual_tokens))
    with torch.no_grad():
        _, cache = seam.read(model.eval(), None, input_ids=ids.to(weight.device))
        own = getattr(cache, "self_attention_cache", cache)  # BERT as a decoder keeps room for an encoder's
        if own is not None:
            start = torch.cat([t[0].transpose(0, 1).flatten(1) for t in seam.kept_by(own)], 1)
            if start.shape == weight.shape:  # a few models put tokens of their own before the text
                weight.copy_(start)
    return adapted


PROMPT = Method(
    "prompt",
    terms=(VECTORS,),
    select=embedding,
    attach=vectors,
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
        terms=(Term(("virtual_tokens", "cached")),),
        select=keys_and_values,
        attach=prefix,
        drawing=replace(PROMPT.drawing, main=("keys, values", "attention"), branch=("*prefix",)),
        defaults={"learning_rate": 3e-2},
        before_layers=True,
    ),
)
