"""A tiny model of any family: its own default config with small numbers, random weights, and a tokenizer of 512 tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalog, seam
from ..base import configs
from ..spec import Json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

LAYERS = HEADS = 4
SMALL: tuple[tuple[str, int], ...] = (
    (r"vocab", 512),
    (r"first_k_dense|layer_offset|index_start|dense_layers$|tokens?$|mtp|nextn|adapter_layers", 1),
    (r"layer_period|every_n|layer_interval|sparse_step|pattern$|layer_group_size|layers_per|shared_layers$", 2),
    (r"index_end|window_layers", LAYERS - 1),
    (r"layers?$|num_blocks$|layers_per_stack", LAYERS),
    (r"per_tok|moe_topk$|top_k_experts", 2),
    (r"index_topk|chunk|window|local_attention$|attn_length|rel_extent|block_size", 32),
    (r"ngroups|n_groups?$|topk_group|o_groups|shared_experts$", 1),
    (r"experts?$|experts_num|expert_num", 4),
    (r"conv_kernel|d_conv", 4),
    (r"state_size|d_state", 16),
    (r"dt_rank|step_rank|rope_head_dim|rotary_dim", 8),
    (r"q_lora|o_lora", 32),
    (r"_rank$|lowrank", 16),
    (r"mamba_(n|num)_heads|^num_heads$", 8),
    (r"kv_heads|key_value_heads|query_groups", 2),
    (r"head_dim|headdim|dim_head|head_size|d_kv|d_head|kv_channels|query_pre_attn", 16),
    (r"heads?$|heads_per_ngram", HEADS),
    (r"d_ssm", 64),
    (r"intermediate|ffn|ff$|inner|feed_forward|dim_ff|^hidden_dim$", 128),
    (r"position|n_ctx|seq_len|model_max_length|max_length", 256),
    (r"hidden|d_model|embed|emb_size|width|lru_width|adapter_rank", 64),
)
"""Pattern of a number's standard name → the most that it is in a tiny model; the first match counts."""
SPREAD = 0.02
"""Standard deviation of the weights, as most models start."""
INDICES = re.compile(r"_ids$|_idxs$|only_layers|cross_attention_layers")
"""Names of lists that hold the numbers of layers."""


SET = {"head_dim": 16, "num_key_value_heads": HEADS, "num_experts_per_tok": 2}
"""Numbers that some families leave open and then need."""
TASKS = ("causal", "seq2seq", "classification")


def kinds(task: str) -> list[str]:
    """The model_type of every family of which transformers has a model for the task."""
    return sorted(seam.classes(task))


def tiny(kind: str, task: str = "") -> Json:
    """A config.json of the family, small in every size that its own default config has; for its first task, or the given.

    Raises SpecError where transformers refuses its own default.
    """
    task = task or next(task for task in TASKS if kind in seam.classes(task))
    made = _named(kind, task)
    with configs.in_words(made):
        config = seam.library().CONFIG_MAPPING[kind]()
    made |= _small(config)
    if task == "causal" and hasattr(config, "is_decoder"):
        made["is_decoder"] = True
    own = _own(kind)
    return made | {name: made[name] | v if isinstance(made.get(name), dict) else v for name, v in own.items()}


def usual(kind: str, task: str) -> Iterator[Json]:
    """A config.json of the family's own default sizes, and, as those may make no model, another that says more.

    Raises SpecError where transformers refuses its own default.
    """
    made = _named(kind, task)
    with configs.in_words(made):
        config = seam.library().CONFIG_MAPPING[kind]()
        yield config.to_dict() | made
        main = configs.stack(config)
        layers = configs.get(main, "num_hidden_layers") or LAYERS
        own = {
            name: value * (layers // LAYERS) if isinstance(value, list) and len(value) == LAYERS else value
            for name, value in _own(kind).items()
        }
        if task == "causal" and hasattr(config, "is_decoder"):
            own["is_decoder"] = True
        yield type(config)(**_open(main) | own).to_dict() | made


def _named(kind: str, task: str) -> Json:
    return {"model_type": kind, "architectures": [seam.classes(task)[kind]]}


def _own(kind: str) -> Json:
    """What a family's defaults do not tell of a tiny model."""
    return catalog.read("families").get(kind, {})


def _open(config: PreTrainedConfig) -> Json:
    """The numbers of SET that the config leaves open, as they are at its size."""
    hidden, heads = (configs.get(config, name) for name in ("hidden_size", "num_attention_heads"))
    found = SET | ({"num_key_value_heads": heads, "head_dim": hidden // heads} if hidden and heads else {})
    return {name: value for name, value in found.items() if getattr(config, name, value) is None}


def _small(config: PreTrainedConfig) -> Json:
    """The fields of a config that a tiny one has otherwise."""
    standard = {own: name for name, own in config.attribute_map.items() if own not in configs.NEEDED}
    layers, heads = (configs.get(config, name) for name in ("num_hidden_layers", "num_attention_heads"))
    declared = {f.name: f.default for f in fields(type(config))}
    made: Json = {}
    for field, value in (config.to_dict() | vars(config)).items():  # the first has what differs by layer too
        name = standard.get(field, field)
        is_own = not declared.keys().isdisjoint((field, name))
        if isinstance(value, seam.library().PreTrainedConfig):
            made[field] = {"model_type": value.model_type, **_small(value)}
        elif value is None and name in SET:
            made[field] = SET[name]
        elif name == "num_key_value_heads" and value == heads:
            made[field] = HEADS
        elif isinstance(value, list) and value and INDICES.search(name) and is_own:
            made[field] = [n for n in value if n < LAYERS] or [1]
        elif isinstance(value, list) and len(value) == layers:
            kinds = list({json.dumps(v): v for v in value}.values())
            made[field] = [_at_most(name, v) for v in (kinds * LAYERS)[:LAYERS]]
        elif declared.get(field, declared.get(name)) is not None and (small := _at_most(name, value)) != value:
            made[field] = small  # what the family works out itself, it works out again
    return made


def _at_most(name: str, value: Any) -> Any:
    """A whole number as it is in a tiny model; anything else as it is."""
    if type(value) is not int or name[:1] == "_" or name.endswith("token_id"):
        return value
    return next((min(most, value) for pattern, most in SMALL if re.search(pattern, name)), value)


def save(kind: str, folder: Path, task: str = "", seed: int = 0) -> Path:
    """Writes a tiny model of the family, its weights drawn by the seed, and a tokenizer, as transformers saves them."""
    import torch

    made = tiny(kind, task)
    config, cls = configs.parsed(made)
    draw = torch.Generator().manual_seed(seed)
    with configs.in_words(made), seam.building, torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # some families leave experts as the memory was
                parameter.copy_(SPREAD * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerBase:
    """Every byte is a token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    bytewise = Tokenizer(BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet, show_progress=False)
    bytewise.train_from_iterator((), trainer)
    made = seam.library().PreTrainedTokenizerFast
    return made(tokenizer_object=bytewise, eos_token="<end>", pad_token="<pad>")
