"""Architecture: the shapes of a base model, exact to the parameter and without its weights.

Built once from transformers' own code on the meta device. The catalogue's are kept in `catalog/architectures.json`, so
that the first page needs no model library; a test holds that file against a fresh build of every entry.
Run `python -m peftlab.base.architecture` to write it again.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ..errors import SpecError
from . import configs
from .configs import get

KEPT = Path(__file__).parents[1] / "catalog" / "architectures.json"

ROLES: dict[str, tuple[str, ...]] = {
    "query": ("q_proj", "q", "query"),
    "key": ("k_proj", "k", "key"),
    "value": ("v_proj", "v", "value"),
    "query+key+value": ("c_attn", "qkv_proj"),
    "attention output": ("o_proj", "self_attn.out_proj", "attn.c_proj", "attention.output.dense", "Attention.o"),
    "gate": ("gate_proj", "wi_0"),
    "up": ("up_proj", "fc1", "c_fc", "wi", "wi_1", "intermediate.dense"),
    "gate+up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "mlp.c_proj", "wo", "layer.*.output.dense"),
}
"""What a linear layer does, by the names families give it. A fused projection has several roles, joined by +."""


@dataclass(frozen=True)
class Module:
    """One kind of module, with every layer that repeats it.

    `name` has `*` for the layer's number. `parameters` maps a parameter's own name to its shape; `d_in` and `d_out` are
    the features of a linear map, whichever way round its weight is stored (GPT-2's Conv1D stores in × out, and so does
    an embedding, which maps a vocabulary to features).
    """

    name: str
    kind: str
    """linear, conv1d, embedding (of the tokens), norm or other."""
    parameters: Mapping[str, tuple[int, ...]]
    layers: tuple[int, ...] = ()
    """Numbers of the layers that have this module; empty for one that stands alone."""
    tied: bool = False
    """Its weight is another module's too (a head tied to the embedding) and is counted there."""
    head: bool = False

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "conv1d")

    @property
    def d_in(self) -> int:
        return self.parameters["weight"][0 if self.kind in ("conv1d", "embedding") else 1]

    @property
    def d_out(self) -> int:
        return self.parameters["weight"][1 if self.kind in ("conv1d", "embedding") else 0]

    @property
    def count(self) -> int:
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
        """Query, down, head, embedding, norm, …; empty where the name is none of ROLES'."""
        if self.head:
            return "head"
        if self.kind in ("embedding", "norm"):
            return self.kind
        return next((r for r, names in ROLES.items() if any(self.name.endswith(_dotted(n)) for n in names)), "")

    @property
    def short_name(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    def names(self) -> Iterator[tuple[int | None, str]]:
        """(layer, full dotted name) of each module of this kind."""
        if not self.layers:
            yield None, self.name
        for layer in self.layers:
            yield layer, self.name.replace("*", str(layer), 1)


def _dotted(name: str) -> str:
    return name if name.startswith(("Attention.", "layer.")) else "." + name


@dataclass(frozen=True)
class Facts:
    """What a config says and no parameter's shape shows."""

    heads: int = 0
    kv_heads: int = 0
    """Fewer than `heads` where queries share keys and values."""
    head_size: int = 0
    window: int = 0
    """How far back a windowed layer sees, in tokens; 0 where no layer has a window."""
    windowed: int = 0
    """Layers with that window; the others see everything."""
    activation: str = ""
    """Of the feed-forward, by transformers' name."""
    dropout: float = 0.0
    """Share of the hidden state that a training step zeroes."""
    attention_dropout: float = 0.0
    experts: int = 0
    experts_per_token: int = 0


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
        """Every linear map but the vocabulary head: what peft calls `all-linear`."""
        return [m for m in self.modules if m.is_linear and not m.head]

    def with_role(self, *roles: str) -> list[Module]:
        """Modules that play one of `roles`, a fused projection for each of its own."""
        return [m for m in self.modules if set(m.role.split("+")) & set(roles)]

    def target_names(self) -> list[str]:
        """Names that `target_modules` takes, one a kind of linear map: as short as tells them apart."""
        return told_apart([m.name for m in self.linear()])

    def targets(self, wanted: str) -> list[Module]:
        """Modules named by `all-linear`, by role, or by the ends of their names, as peft matches them.

        Raises SpecError that lists what the model has.
        """
        if wanted == "all-linear":
            return self.linear()
        chosen: list[Module] = []
        for token in (t.strip() for t in wanted.split(",") if t.strip()):
            found = [m for m in self.modules if m.is_linear and _answers_to(m, token)]
            if not found:
                have = ", ".join(self.target_names())
                raise SpecError(f"target-modules={token}: the model has no linear module of that name; it has {have}")
            chosen += [m for m in found if m not in chosen]
        if not chosen:
            raise SpecError("target-modules is empty: nothing would be trained; try all-linear")
        return chosen


def told_apart(paths: list[str]) -> list[str]:
    """The shortest end of each dotted path that is no other's."""
    ends = [[".".join(path.split(".")[-n:]) for n in range(1, path.count(".") + 2)] for path in paths]
    every = Counter(end for of_one in ends for end in of_one)
    return [next((end for end in of_one if every[end] == 1), of_one[-1]) for of_one in ends]


def _answers_to(module: Module, token: str) -> bool:
    return token in module.role.split("+") or ("." + module.name).endswith("." + token)


def build(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Hugging Face config, built on the meta device: no weights, no memory.

    Raises SpecError for a config that `build_meta` refuses.
    """
    with configs.in_words(config):
        return describe(configs.build_meta(config))


def describe(model: Any) -> Architecture:
    """The architecture of a transformers model."""
    owner: dict[int, str] = {}
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    groups: dict[tuple, dict[str, Any]] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        layer = re.search(r"\.(\d+)\.", name)
        pattern = name.replace(f".{layer[1]}.", ".*.", 1) if layer else name
        fresh = {n: p for n, p in own.items() if n != "bias" or id(p) not in owner}  # BERT ties its head's bias too
        shapes = {n: tuple(p.shape) for n, p in fresh.items()}
        tied = any(id(p) in owner for p in fresh.values())
        owner.update({id(p): name for p in own.values()})
        group = groups.setdefault(
            (pattern, tuple(shapes.items()), tied),
            {
                "kind": "embedding" if module is tokens else _kind(module),
                "shapes": shapes,
                "head": module is head,
                "layers": [],
            },
        )
        if layer:
            group["layers"].append(int(layer[1]))
    modules = tuple(
        Module(pattern, g["kind"], g["shapes"], tuple(g["layers"]), tied, g["head"])
        for (pattern, _, tied), g in groups.items()
    )
    c = model.config
    context = get(c, "max_position_embeddings") or get(c, "n_positions") or 0
    return Architecture(c.num_hidden_layers, modules, c.hidden_size, context, _facts(c))


def _facts(config: Any) -> Facts:
    def first(*names: str) -> Any:
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
    )


def _kind(module: Any) -> str:
    import torch

    name = type(module).__name__
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if name == "Conv1D":
        return "conv1d"
    return "norm" if "Norm" in name else "other"


def to_data(a: Architecture) -> dict[str, Any]:
    """As JSON: layers as [first, last] runs, because nearly every model repeats one layer throughout."""
    return {
        "n_layers": a.n_layers,
        "hidden_size": a.hidden_size,
        "context": a.context,
        "facts": {name: value for name, value in asdict(a.facts).items() if value},
        "modules": [
            [m.name, m.kind, {n: list(s) for n, s in m.parameters.items()}, _runs(m.layers)]
            + ([int(m.tied), int(m.head)] if m.tied or m.head else [])
            for m in a.modules
        ],
    }


def from_data(data: Mapping[str, Any]) -> Architecture:
    modules = []
    for name, kind, shapes, runs, *flags in data["modules"]:
        layers = tuple(n for first, last in runs for n in range(first, last + 1))
        tied, head = flags or (0, 0)
        modules.append(Module(name, kind, {n: tuple(s) for n, s in shapes.items()}, layers, bool(tied), bool(head)))
    return Architecture(data["n_layers"], tuple(modules), data["hidden_size"], data["context"], Facts(**data["facts"]))


def _runs(numbers: tuple[int, ...]) -> list[list[int]]:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return runs


@lru_cache(maxsize=1)
def kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


@lru_cache(maxsize=64)
def _of_config(config_json: str) -> Architecture:
    return build(json.loads(config_json))


def of(model: str) -> Architecture:
    """The architecture of a catalogue key, Hub id, folder or config.json.

    Raises SpecError for a bare count, which has no layers, and for a name that cannot be found.
    """
    from . import models

    entry = models.find(model)
    if entry.config is None:
        raise SpecError(
            f"model={model}: a bare count has no layers to look at; name a model such as llama-3.1-70b for exact counts"
        )
    key = entry.shape_of or entry.key
    if key in kept():
        return _from_kept(key)
    return _of_config(json.dumps(entry.config, sort_keys=True))


@lru_cache(maxsize=64)
def _from_kept(key: str) -> Architecture:
    return from_data(kept()[key])


def _write() -> None:
    from . import models

    lines = [
        f"{json.dumps(key)}: {json.dumps(to_data(build(entry.config)), separators=(',', ':'))}"
        for key, entry in models.MODELS.items()
        if entry.config is not None and not entry.shape_of
    ]
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _write()
