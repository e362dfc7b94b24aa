"""Prompt-based methods, through peft: learned vectors where tokens would be, the model frozen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .. import seam
from ..base import architecture as architectures
from ..base import roles
from ..base.architecture import Architecture, Module
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
    """The maps whose outputs a prefix stands before. Raises SpecError where it cannot: checkpointing, or too long a text."""
    _leave_room(architecture, spec)
    if spec.gradient_checkpointing:
        raise SpecError(
            "gradient-checkpointing=true: it drops the cache, which is where the prefix is; turn it off, or use prompt"
        )
    targets = keepers(architecture)
    if not _is_even(targets, architecture) and any(m.stacks > 1 for m in architecture.modules):
        odd = targets[-1].module.name
        raise Unsuited(f"has an encoder, and a decoder whose layers keep unlike keys ({odd}); use prompt")
    return targets


def keepers(architecture: Architecture) -> list[Target]:
    """The maps whose outputs the cache keeps of a text, and their layers; with an encoder, of the decoder's own attention.

    Raises Unsuited for a model whose cache holds something else than what they make.
    """
    makers = with_roles(architecture, "key", "value")
    if not architecture.facts.plain_cache:
        raise Unsuited(
            f"does not keep what {makers[0].name} makes in transformers' own cache, or not alone; use prompt"
        )
    stack, chosen = _read_last(architecture, makers), dict[Module, list[int]]()
    first: list[Module] = []
    for n in range(architecture.depths[stack]):
        if n in architecture.facts.keyless:
            continue
        in_layer = [m for m in makers if m.stack == stack and n in m.layers]
        place = roles.place_of(in_layer[0]) if in_layer else ""
        if "cross" in place:  # it attends to an image alone
            continue
        if in_layer:  # else another layer's, which they share
            first = [m for m in in_layer if roles.place_of(m) == place]
        for module in first:
            chosen.setdefault(module, []).append(n)
    if odd := next((m for m in chosen if not m.cached), None):
        raise Unsuited(f"keeps something else than what {odd.name} makes; use prompt")
    return [Target(m, tuple(layers)) for m, layers in chosen.items()]


def _read_last(architecture: Architecture, makers: list[Module]) -> str:
    """The stack of layers that makes the text's keys and values: after an encoder, the decoder."""
    stacks = [s for s in architecture.depths if any(m.stack == s for m in makers)]
    if any(m.stacks > 1 for m in architecture.modules):
        return stacks[-1]
    alike = [s for s in stacks if architecture.depths[s] == architecture.n_layers] or stacks
    found = min(alike, key=lambda stack: stack.count("."))  # those of images and sounds stand deeper
    if architecture.depths[found] < architecture.n_layers:
        raise Unsuited(f"keeps what {makers[0].name} makes several times in a layer or round of layers; use prompt")
    return found


def _is_even(targets: list[Target], architecture: Architecture) -> bool:
    """Whether all layers keep as many keys as values, alike in heads and sizes, which is what peft's own prefix fits."""
    facts, kept = architecture.facts, [t for t in targets if not t.module.classifier]
    layers = {n for t in kept for n in t.layers}
    widths = {sum(t.module.cached for t in kept if n in t.layers) for n in layers}
    usual = 2 * facts.kv_heads * facts.head_size
    fits = widths == {usual} or (len(widths) == 1 and kept[0].module.role == FUSED[0] and 0 < max(widths) < usual)
    places = {roles.place_of(t.module) for t in kept}
    whole = len(layers) == architecture.depths[kept[0].module.stack] and not facts.more_than_keys
    return fits and whole and len(places) == 1 and not any(t.module.role == FUSED[1] for t in kept)


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
    entries = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    found = targets[0].module.d_in == entries == getattr(model.config, "vocab_size", 0)
    return attach(model, targets, spec, "PromptTuningConfig", prompt_tuning_init="SAMPLE_VOCAB" if found else "RANDOM")


def prefix(model: PreTrainedModel, targets: list[Target], spec: Resolved) -> PeftModel | PreTrainedModel:
    """Starts from the keys and values of random tokens: Li and Liang, section 7.5, found that far better than noise."""
    import torch

    from . import _prefix

    architecture, layers = architectures.of(spec.model), {n for t in targets for n in t.layers}
    width = sum(t.module.cached * t.count for t in targets)
    if not _is_even(targets, architecture):
        through_peft.own_tensors(model, through_peft.classifiers(targets), train=True)
        return _prefix.attach(model, spec.virtual_tokens, width, through_peft.adapter_dtype(spec))
    size = width // (2 * len(layers))
    shape = {"num_layers": len(layers), "token_dim": size, "num_attention_heads": size // architecture.facts.head_size}
    adapted = through_peft.attach(model, spec, "PrefixTuningConfig", num_virtual_tokens=spec.virtual_tokens, **shape)
    if model.config.is_encoder_decoder:  # peft's own start: the cache would need a text for the encoder
        return adapted
    weight = adapted.prompt_encoder["default"].get_parameter("embedding.weight")
    vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
    ids = torch.randint(0, vocabulary, (1, spec.virtual_tokens))
    with torch.no_grad():
        _, cache = seam.read(model.eval(), None, input_ids=ids.to(weight.device))
        start = _prefix.numbers(cache)
        if start is not None and start.shape == weight.shape:  # a few models put tokens of their own before the text
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
