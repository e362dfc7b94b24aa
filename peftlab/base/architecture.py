"""Shapes of base models without their weights; `python -m peftlab.base.architecture` writes those of the catalogue again."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalog, seam
from ..errors import SpecError
from ..spec import Json
from . import configs, models
from .configs import Config, get

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

ROLES: dict[str, tuple[str, ...]] = {
    "query": ("q_proj", "q", "query"),
    "key": ("k_proj", "k", "key"),
    "value": ("v_proj", "v", "value"),
    "query+key+value": ("c_attn", "qkv_proj"),
    "attention output": ("o_proj", "self_attn.out_proj", "attn.c_proj", "attention.output.dense", "o"),
    "gate": ("gate_proj", "wi_0"),
    "up": ("up_proj", "fc1", "c_fc", "wi", "wi_1", "intermediate.dense"),
    "gate+up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "mlp.c_proj", "wo", "layer.*.output.dense"),
}
"""Role of a linear map → the names that families give it. A fused projection has several roles, joined by +."""


@dataclass(frozen=True)
class Module:
    """One kind of module, with every layer that repeats it."""

    name: str
    """The dotted name, with `*` for the layer's number."""
    kind: str
    """linear, conv1d, embedding (of the tokens), norm or other."""
    parameters: Mapping[str, tuple[int, ...]]
    """Name of each of its own parameters → shape."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that have this module; empty for one that stands alone."""
    tied: bool = False
    """Whether its weight is another module's too (a head tied to the embedding) and is counted there."""
    head: bool = False
    """Whether it maps the last hidden states to the vocabulary."""

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "conv1d")

    @property
    def d_in(self) -> int:
        """Features of the input. GPT-2's Conv1D stores its weight as in × out; an embedding's input is the vocabulary."""
        return self.parameters["weight"][0 if self.kind in ("conv1d", "embedding") else 1]

    @property
    def d_out(self) -> int:
        return self.parameters["weight"][1 if self.kind in ("conv1d", "embedding") else 0]

    @property
    def count(self) -> int:
        """How many modules of this kind the model has."""
        return len(self.layers) or 1

    @property
    def weight(self) -> int:
        """Elements of everything but the bias, for one layer; 0 where the weight is tied."""
        return 0 if self.tied else sum(math.prod(s) for n, s in self.parameters.items() if n != "bias")

    @property
    def bias(self) -> int:
        return math.prod(self.parameters["bias"]) if "bias" in self.parameters else 0

    @cached_property
    def role(self) -> str:
        """query, down, head, embedding, norm, …; empty for a linear map whose name is not in ROLES."""
        if self.head:
            return "head"
        if self.kind in ("embedding", "norm"):
            return self.kind
        return next((role for role, names in ROLES.items() if any(map(self.ends_in, names))), "")

    @property
    def short_name(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    def ends_in(self, parts: str) -> bool:
        """Whether these are the last parts of its name."""
        return f".{self.name}".endswith(f".{parts}")

    def names(self) -> Iterator[tuple[int | None, str]]:
        """(layer, full dotted name) of each module of this kind."""
        if not self.layers:
            yield None, self.name
        for layer in self.layers:
            yield layer, self.name.replace("*", str(layer), 1)


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

    @property
    def total_parameters(self) -> int:
        return sum((m.weight + m.bias) * m.count for m in self.modules)

    def linear(self) -> list[Module]:
        """Every linear map except the head: what peft calls `all-linear`."""
        return [m for m in self.modules if m.is_linear and not m.head]

    def with_role(self, *roles: str) -> list[Module]:
        """Modules that have one of `roles`; a fused projection has several."""
        return [m for m in self.modules if set(m.role.split("+")) & set(roles)]

    def target_names(self) -> list[str]:
        """For each kind of linear map, the shortest name by which `target_modules` can ask for it alone."""
        return told_apart([m.name for m in self.linear()])

    def targets(self, wanted: str) -> list[Module]:
        """The linear maps of `all-linear`, or of roles and ends of names by comma. Raises SpecError that lists them."""
        if wanted == "all-linear":
            return self.linear()
        chosen: list[Module] = []
        for token in (t.strip() for t in wanted.split(",") if t.strip()):
            found = [m for m in self.modules if m.is_linear and (token in m.role.split("+") or m.ends_in(token))]
            if not found:
                have = ", ".join(self.target_names())
                raise SpecError(f"target-modules={token}: the model has no linear module of that name; it has {have}")
            chosen += [m for m in found if m not in chosen]
        if not chosen:
            raise SpecError("target-modules is empty: nothing would be trained; try all-linear")
        return chosen


def told_apart(paths: list[str]) -> list[str]:
    """For each dotted path, its shortest end that no other path has; the whole path where there is none."""
    ends = [[".".join(path.split(".")[-n:]) for n in range(1, path.count(".") + 2)] for path in paths]
    every = Counter(end for of_one in ends for end in of_one)
    return [next((end for end in of_one if every[end] == 1), of_one[-1]) for of_one in ends]


def build(config: Config) -> Architecture:
    """The architecture of a config, built on the meta device, without memory. Raises SpecError as `build_meta` does."""
    with configs.in_words(config):
        return describe(configs.build_meta(config))


def describe(model: PreTrainedModel) -> Architecture:
    """The architecture of a transformers model, on whatever device."""
    counted: set[int] = set()
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    groups: dict[tuple[object, ...], tuple[Module, list[int]]] = {}
    for name, module in model.named_modules():
        if not (own := dict(module.named_parameters(recurse=False))):
            continue
        layer = re.search(r"\.(\d+)\.", name)
        pattern = name.replace(f".{layer[1]}.", ".*.", 1) if layer else name
        # BERT ties the bias of its head too
        shapes = {n: tuple(p.shape) for n, p in own.items() if n != "bias" or id(p) not in counted}
        tied = any(id(own[n]) in counted for n in shapes)
        counted.update(map(id, own.values()))
        kind = "embedding" if module is tokens else _kind(module)
        made = Module(pattern, kind, shapes, (), tied, module is head)
        _, layers = groups.setdefault((pattern, tuple(shapes.items()), tied), (made, []))
        if layer:
            layers.append(int(layer[1]))
    modules = tuple(replace(module, layers=tuple(layers)) for module, layers in groups.values())
    c = model.config
    context = get(c, "max_position_embeddings") or get(c, "n_positions") or 0
    return Architecture(c.num_hidden_layers, modules, c.hidden_size, context, _facts(c, seam.has_sdpa(model)))


def _facts(config: PreTrainedConfig, has_sdpa: bool) -> Facts:
    def first(*names: str) -> Any:
        """The value of the first of `names` that the config has; 0 where it has none."""
        return next((v for v in (get(config, name) for name in names) if v), 0)

    heads, kinds = get(config, "num_attention_heads"), get(config, "layer_types") or []
    windowed = sum(kind == "sliding_attention" for kind in kinds)
    window = max(0, first("sliding_window")) if getattr(config, "use_sliding_window", True) else 0
    return Facts(
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        head_size=first("head_dim", "d_kv") or config.hidden_size // heads,
        window=window,
        windowed=(windowed if kinds else config.num_hidden_layers) if window else 0,
        activation=first("hidden_act", "hidden_activation", "activation_function", "dense_act_fn") or "",
        dropout=float(first("resid_pdrop", "dropout", "hidden_dropout_prob", "dropout_rate")),
        attention_dropout=float(first("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")),
        experts=first("num_local_experts", "num_experts", "n_routed_experts"),
        experts_per_token=first("num_experts_per_tok"),
        attention="sdpa" if has_sdpa else "eager",
    )


def _kind(module: nn.Module) -> str:
    from torch.nn import Linear

    name = "Linear" if isinstance(module, Linear) else type(module).__name__
    return {"Linear": "linear", "Conv1D": "conv1d"}.get(name, "norm" if "Norm" in name else "other")


def to_data(a: Architecture) -> Json:
    """An architecture as JSON. Layers are [first, last] runs, because nearly every model repeats one layer throughout."""
    return asdict(a) | {"modules": [asdict(m) | {"layers": runs(m.layers)} for m in a.modules]}


def from_data(data: Json) -> Architecture:
    """The inverse of `to_data`."""
    modules = []
    for m in data["modules"]:
        layers = tuple(n for first, last in m["layers"] for n in range(first, last + 1))
        shapes = {name: tuple(shape) for name, shape in m["parameters"].items()}
        modules.append(Module(**m | {"layers": layers, "parameters": shapes}))
    return Architecture(**data | {"modules": tuple(modules), "facts": Facts(**data["facts"])})


def runs(numbers: tuple[int, ...]) -> list[list[int]]:
    """[first, last] of each run of consecutive numbers."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return [[start, end] for start, end in zip(starts, ends, strict=True)]


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
