"""Shapes of base models without their weights; `python -m peftlab.base.architecture` writes those of the catalogue again."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import caches, catalog, seam
from ..errors import SpecError
from ..spec import Json
from . import configs, models, rewriting, roles
from .configs import Config, context, get
from .modules import Module, runs, told_apart
from .roles import ROLES

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "ROLES",
    "Architecture",
    "Facts",
    "Module",
    "build",
    "describe",
    "from_data",
    "kept",
    "of",
    "runs",
    "to_data",
    "told_apart",
]

CLASSIFIERS = ("classifier", "score")
"""Ends of the names of heads that peft trains whole in a model for classification."""
WIDTHS = re.compile(r"intermediate|inner|ff|feed_forward|^hidden_dim$")
"""What the name of a config's number says that is the width of a feed-forward."""


@dataclass(frozen=True)
class Facts:
    """What the config of a model says and the shapes of its parameters do not show."""

    heads: int = 0
    kv_heads: int = 0
    """Fewer than `heads` where queries share keys and values."""
    head_size: int = 0
    window: int = 0
    """How far back a windowed layer sees, in tokens; 0 where no layer has a window."""
    windowed: int = 0
    """Layers with that window; the others see everything."""
    activation: str = ""
    """transformers' name for the activation function of the feed-forward."""
    dropout: float = 0.0
    attention_dropout: float = 0.0
    experts: int = 0
    experts_per_token: int = 0
    plain_cache: bool = True
    """Whether the model takes transformers' own cache, and keeps all that it keeps of a text there."""
    keyless: tuple[int, ...] = ()
    """Layers whose cache holds no keys and values: a state of another kind, or nothing."""
    more_than_keys: bool = False
    """Whether a layer's cache holds something beside keys and values: a state, or what an indexer finds them by."""
    attention: str = "sdpa"
    """The attention that transformers chooses for this family: sdpa, or eager where its class has no other."""


@dataclass(frozen=True)
class Architecture:
    n_layers: int
    modules: tuple[Module, ...]
    hidden_size: int = 0
    context: int = 0
    """Longest input, in tokens; 0 where the config does not say."""
    facts: Facts = Facts()
    rewritten: Mapping[str, str] = field(default_factory=dict)
    """End of a name → the experts' parameter that LoRA in peft adapts for it, and for no linear map of that name."""
    refused: tuple[str, ...] = ()
    """Ends of the names of linear maps that LoRA in peft does not adapt."""

    @cached_property
    def total_parameters(self) -> int:
        return sum((m.weight + m.bias) * m.count for m in self.modules)

    @cached_property
    def depths(self) -> Mapping[str, int]:
        """Name of each stack of layers → how many it has: an encoder's may be another number than the decoder's."""
        stacks = dict.fromkeys(m.stack for m in self.modules if m.layers)
        deep = {stack: 1 + max(n for m in self.modules if m.stack == stack for n in m.layers) for stack in stacks}
        worked = {m.stack for m in self.modules if m.role in ROLES}
        return {stack: depth for stack, depth in deep.items() if stack in worked or depth == self.n_layers}

    def linear(self) -> list[Module]:
        """Every linear map except the head."""
        return [m for m in self.modules if m.is_linear and not m.head and not m.classifier]

    def adaptable(self, low_rank: bool) -> list[Module]:
        """What `all-linear` means: every linear map except the head, as peft takes it.

        `low_rank`: for LoRA, which finds the experts of some families under the names of linear maps, and refuses some maps.
        """
        if not low_rank:
            return self.linear()
        maps = [m for m in self.linear() if m.short_name not in (*self.rewritten, *self.refused)]
        return maps + [m for m in self.modules if m.kind == "experts" and m.short_name in self.rewritten.values()]

    def with_role(self, *roles: str) -> list[Module]:
        """Modules that have one of `roles`; a fused projection has several."""
        return [m for m in self.modules if set(m.role.split("+")) & set(roles)]

    def target_names(self, low_rank: bool = False) -> list[str]:
        """For each kind of module that can be adapted, the shortest name by which `target_modules` can ask for it alone."""
        return told_apart([m.name for m in self.adaptable(low_rank)])

    def targets(self, wanted: str, low_rank: bool = False) -> list[Module]:
        """The modules of `all-linear`, or of roles and ends of names by comma. Raises SpecError that lists them."""
        able = self.adaptable(low_rank)
        if wanted == "all-linear":
            return able
        tokens = [token for t in wanted.split(",") if (token := t.strip())]
        chosen: list[Module] = []
        for token in tokens:
            chosen += [m for m in self._named(token, low_rank, tokens) if m not in chosen]
        if not chosen:
            raise SpecError("target-modules is empty: nothing would be trained; try all-linear")
        return chosen

    def _named(self, token: str, low_rank: bool, tokens: list[str]) -> list[Module]:
        """The modules that one of `tokens` asks for. Raises SpecError where there is none."""
        able, end = self.adaptable(low_rank), token.rpartition(".")[2]
        if low_rank and end in self.rewritten:
            experts = self.rewritten[end]
            together = [old for old, new in self.rewritten.items() if new == experts]
            if missing := [old for old in together if not any(f".{t}".endswith(f".{old}") for t in tokens)]:
                raise SpecError(
                    f"target-modules={token}: {experts} of the experts holds {' and '.join(together)} in one parameter, "
                    f"which peft adapts whole; add {', '.join(missing)}"
                )
            found = [m for m in able if m.kind == "experts" and m.short_name == experts]
        else:
            whole = [m for m in self.modules if (m.head and m.is_linear) or m.kind == "embedding"]
            found = [m for m in able + whole if token in m.role.split("+") or m.ends_in(token)]
        if not found:
            have = ", ".join(self.target_names(low_rank))
            raise SpecError(f"target-modules={token}: {self._lack(token)}; it has {have}")
        return found

    def _lack(self, token: str) -> str:
        """Why no module of this name can be adapted."""
        if token.rpartition(".")[2] in self.refused:
            return "peft attaches no LoRA there, because a fused kernel reads the weight"
        if any(m.kind == "experts" and m.ends_in(token) for m in self.modules):
            return "its experts are one parameter that peft does not adapt in this family"
        return "the model has no linear module of that name"


def build(config: Config) -> Architecture:
    """The architecture of a config, built on the meta device, without memory. Raises SpecError as `build_meta` does."""
    with configs.in_words(config):
        return describe(configs.build_meta(config), own_head=config.get("tie_word_embeddings") is False)


def describe(model: PreTrainedModel, own_head: bool = False) -> Architecture:
    """The architecture of a transformers model, on whatever device.

    `own_head`: the config says so. Some families build a tied head all the same, and give it its own weights as they load.
    """
    c = configs.stack(model.config)
    facts = _facts(model)
    renamed = rewriting.rewritten(model)
    counted: set[int] = set()
    is_classifier = seam.is_classifier(model)
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    groups: dict[tuple[object, ...], tuple[Module, list[int]]] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        experts = [n for n, p in own.items() if facts.experts and _is_of_experts(module, p, c.hidden_size)]
        parts = [(f"{name}.{n}", "experts", {"weight": own.pop(n)}) for n in experts]
        if own:
            parts.append((name, "embedding" if module is tokens else _kind(module), own))
        for full, kind, parameters in parts:
            layer = re.search(r"\.(\d+)\.", full)
            pattern = full.replace(f".{layer[1]}.", ".*.", 1) if layer else full
            # BERT ties the bias of its head too
            shapes = {n: tuple(p.shape) for n, p in parameters.items() if n != "bias" or id(p) not in counted}
            tied = any(id(parameters[n]) in counted for n in shapes) and not (own_head and module is head)
            counted.update(map(id, parameters.values()))
            made = Module(
                pattern, kind, shapes, (), tied,
                head=module is head,
                classifier=is_classifier and any(part.endswith(CLASSIFIERS) for part in name.split(".")),
                stacks=2 if kind == "embedding" and model.config.is_encoder_decoder and not is_classifier else 1,
                ranks=max(1, [*renamed.values()].count(full.rpartition(".")[2])) if kind == "experts" else 1,
                transposed=kind == "experts" and getattr(module, "is_transposed", False),
            )  # fmt: skip
            _, layers = groups.setdefault((pattern, tuple(shapes.items()), tied), (made, []))
            if layer:
                layers.append(int(layer[1]))
    modules = [replace(module, layers=tuple(layers)) for module, layers in groups.values()]
    told = roles.told(modules, c.hidden_size, _widths(c))
    named = [
        replace(m, role=(role := _role(m) or told.get(m, "")), cached=_cached(m, role, facts, modules)) for m in modules
    ]
    refused = rewriting.refused(model)
    return Architecture(c.num_hidden_layers, tuple(named), c.hidden_size, context(c), facts, renamed, refused)


def _is_of_experts(module: nn.Module, parameter: nn.Parameter, hidden: int) -> bool:
    """Whether the parameter holds one matrix for each expert."""
    return parameter.ndim == 3 and hidden in parameter.shape[1:] and "Conv" not in type(module).__name__


def _role(module: Module) -> str:
    """The role of what is no map inside a layer."""
    return "head" if module.head else module.kind if module.kind in ("embedding", "norm") else ""


def _cached(module: Module, role: str, facts: Facts, modules: Collection[Module]) -> int:
    """The numbers in the cache for one token of the keys and values that a map with this role makes.

    Of a low-rank pair they are what the first gives.
    """
    if role in ("key", "value"):
        return module.width
    if role == "key+value":
        return roles.latent(module, modules)
    both = module.width - facts.heads * facts.head_size if role == "query+key+value" else 0
    return both if facts.head_size and both > 0 and both % (2 * facts.head_size) == 0 else 0


def _widths(config: PreTrainedConfig) -> set[int]:
    """Numbers in a config that a feed-forward may be as wide as; four times the hidden size is what families leave unsaid."""
    found, parts = {4 * config.hidden_size}, [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    for name, value in (item for part in parts for item in vars(part).items()):
        if WIDTHS.search(name):
            found |= {n for n in (value if isinstance(value, list) else [value]) if type(n) is int and n > 1}
    return found


def _facts(model: PreTrainedModel) -> Facts:
    config = model.config

    def first(*names: str) -> Any:
        """The value of the first of `names` that the config has; 0 where it has none."""
        return next((v for v in (get(config, name) for name in names) if v), 0)

    heads, kinds = first("num_attention_heads"), get(config, "layer_types") or []
    windowed = sum(kind == "sliding_attention" for kind in kinds)
    held = caches.cached_by_layer(model)
    window = max(0, first("sliding_window")) if getattr(config, "use_sliding_window", True) else 0
    return Facts(
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        head_size=first("head_dim", "d_kv") or (config.hidden_size // heads if heads else 0),
        window=window,
        windowed=(windowed if kinds else config.num_hidden_layers) if window else 0,
        activation=first("hidden_act", "hidden_activation", "activation_function", "dense_act_fn") or "",
        dropout=float(first("resid_pdrop", "dropout", "hidden_dropout_prob", "dropout_rate")),
        attention_dropout=float(first("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")),
        experts=first("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        experts_per_token=first("num_experts_per_tok"),
        plain_cache=caches.has_plain_cache(model),
        keyless=tuple(n for n, kind in enumerate(held) if kind == "other"),
        more_than_keys="more" in held,
        attention="sdpa" if seam.has_sdpa(model) else "eager",
    )


def _kind(module: nn.Module) -> str:
    from torch.nn import Linear

    name = type(module).__name__
    if isinstance(module, Linear):
        name = "Linear" if _gives_a_tensor(module) else "other"
    is_norm = "Norm" in name and not any(module.children())
    return {"Linear": "linear", "Conv1D": "conv1d"}.get(name, "norm" if is_norm else "other")


def _gives_a_tensor(linear: nn.Linear) -> bool:
    """Whether it gives what a linear map gives; a router that is derived from one may give its experts' scores too."""
    import torch

    if type(linear).forward is torch.nn.Linear.forward:
        return True
    try:
        out = linear(linear.weight.new_empty(1, linear.in_features))
    except Exception:  # anybody's module, in transformers' code
        return True
    return isinstance(out, torch.Tensor)


def to_data(a: Architecture) -> Json:
    """An architecture as JSON. Layers are [first, last] runs, because nearly every model repeats one layer throughout."""
    usual = {f.name: f.default for f in fields(Module)}
    modules = [{n: v for n, v in asdict(m).items() if v != usual[n]} | {"layers": runs(m.layers)} for m in a.modules]
    return asdict(a) | {"modules": modules}


def from_data(data: Json) -> Architecture:
    """The inverse of `to_data`."""
    modules = []
    for m in data["modules"]:
        layers = tuple(n for first, last in m["layers"] for n in range(first, last + 1))
        shapes = {name: tuple(shape) for name, shape in m["parameters"].items()}
        modules.append(Module(**m | {"layers": layers, "parameters": shapes}))
    facts = Facts(**data["facts"] | {"keyless": tuple(data["facts"].get("keyless", ()))})
    parts = {"modules": tuple(modules), "facts": facts, "refused": tuple(data["refused"])}
    return Architecture(**data | parts)


@lru_cache(maxsize=1)
def kept() -> dict[str, Architecture]:
    """Key of a catalogue model → its architecture, kept so that the first page needs no model library."""
    return {key: from_data(data) for key, data in catalog.read("architectures").items()}


@lru_cache(maxsize=64)
def _from_config(config_json: str) -> Architecture:
    return build(json.loads(config_json))


def of(model: str) -> Architecture:
    """The architecture of any name that `models.find` knows. Raises SpecError as it does, and for a bare count."""
    entry = models.find(model)
    if entry.config is None:
        raise SpecError(f"model={model}: a bare count has no layers to look at; name a model such as llama-3.1-70b")
    key = entry.shape_of or entry.key
    return kept()[key] if key in kept() else _from_config(json.dumps(entry.config, sort_keys=True))


if __name__ == "__main__":
    lines = [
        f"{json.dumps(key)}: {json.dumps(to_data(build(entry.config)), separators=(',', ':'))}"
        for key, entry in models.MODELS.items()
        if entry.config is not None and not entry.shape_of
    ]
    Path(catalog.__file__).with_name("architectures.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
