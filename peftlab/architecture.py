"""Architecture: the shapes of a base model, exact to the parameter and without its weights.

Built once from transformers' own code on the meta device. The catalogue's are kept in `catalog/architectures.json`, so
that the first page needs no model library; a test holds that file against a fresh build of every entry.
Run `python -m peftlab.architecture` to write it again.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import SpecError

KEPT = Path(__file__).parent / "catalog" / "architectures.json"

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

MOST_PARAMETERS = 10**14
BUILD_SECONDS = 5.0
"""Known models take 0.1 s, and a thousand layers of Llama 2 s."""
MOST_ON_CPU = 10**7
"""Elements of a tensor that is made on the CPU even so: XLNet's are."""
LIMITS: tuple[tuple[str, float, int], ...] = (
    (r"layers?$|^depth$", 0, 1_000),
    (r"experts(_per_tok)?$", 0, 10_000),
    (r"heads?$|labels$", 0, 100_000),
    (r"vocab_size$", 0, 10_000_000),
    (r"^(hidden|intermediate)_size$|position", 0, 100_000_000),
    (r"theta", -math.inf, 10**12),
    (r"", -math.inf, 100_000_000),
)
"""Names in a config, and the least and the most that a whole number of that name may be; the first that fits counts."""
IGNORED = {
    "transformers_version", "dtype", "torch_dtype", "name_or_path", "auto_map", "quantization_config",
    "compression_config", "attn_implementation", "experts_implementation", "use_kernels", "id2label", "label2id",
    "task_specific_params", "problem_type", "finetuning_task", "tokenizer_class", "model_max_length",
    "initializer_range", "torchscript", "sinusoidal_embeddings",
}  # fmt: skip
"""Says nothing about shapes, or names code to run. What transformers counts as a setting of generation is ignored too."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""All are 0 here: a class's own may lie outside a config's vocabulary, which transformers refuses."""
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Without these there is no text model with attention; transformers knows how each family calls them."""
HEAD_SIZES = ("head_dim", "d_kv", "d_head", "attention_head_size", "kv_channels", "qk_head_dim", "v_head_dim")


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

    @property
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
        found = self.linear()
        short = [m.short_name for m in found]
        return [m.short_name if short.count(m.short_name) == 1 else m.name.split(".*.")[-1] for m in found]

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
                have = ", ".join(dict.fromkeys(m.short_name for m in self.linear()))
                raise SpecError(f"target-modules={token}: the model has no linear module of that name; it has {have}")
            chosen += [m for m in found if m not in chosen]
        if not chosen:
            raise SpecError("target-modules is empty: nothing would be trained; try all-linear")
        return chosen


def _answers_to(module: Module, token: str) -> bool:
    return token in module.role.split("+") or ("." + module.name).endswith("." + token)


def build(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a Hugging Face config, built on the meta device: no weights, no memory.

    Raises SpecError for a config that `build_meta` refuses.
    """
    with _in_words(config):
        return describe(build_meta(config))


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
        shapes = {n: tuple(p.shape) for n, p in own.items()}
        tied = any(id(p) in owner for p in own.values())
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
    context = _get(c, "max_position_embeddings") or _get(c, "n_positions") or 0
    return Architecture(c.num_hidden_layers, modules, c.hidden_size, context, _facts(c))


def _get(config: Any, name: str) -> Any:
    """A transformers config's attribute; of one that varies between layers (Gemma 4's head_dim), the usual layer's."""
    name = config.attribute_map.get(name, name)
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


def _facts(config: Any) -> Facts:
    def first(*names: str) -> Any:
        return next((v for v in (_get(config, name) for name in names) if v), 0)

    heads, kinds = _get(config, "num_attention_heads"), _get(config, "layer_types") or []
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


def build_meta(config: Mapping[str, Any]) -> Any:
    """The transformers model of `config` on the meta device, with its weights tied: the one door to transformers.

    Raises SpecError for a config that is out of all proportion, before anything is built, and for one that transformers
    does not know or cannot build.
    """
    import torch

    with _in_words(config):
        _, parsed, cls = _parse(config)
        with torch.device("meta"), _bounded():
            model = cls(parsed)
        model.tie_weights()
        total = sum(p.numel() for p in model.parameters())
        if not 0 < total <= MOST_PARAMETERS:
            raise SpecError(
                f"this config makes {total:,} parameters, and a model here has 1 to {MOST_PARAMETERS:,}; check hidden_size, "
                "num_hidden_layers and the number of experts"
            )
    return model


def normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the shapes in a config.json: of its text model, with the class to build named in `architectures`.

    Raises SpecError as `build_meta` does, but builds nothing.
    """
    with _in_words(config):
        return _parse(config)[0]


def _parse(config: Mapping[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """(`normal`, transformers' config, class to build)"""
    from transformers import CONFIG_MAPPING

    kind, values, whole = _text_model(config)
    config_class: Any = CONFIG_MAPPING[kind]
    if isinstance(labels := values.get("id2label"), dict) and len(labels) != 2:
        values["num_labels"] = len(labels)
    defaults = {f.name: f.default for f in fields(config_class)}
    values = {
        name: value
        for name, value in _clean(values).items()
        if (name in defaults or not hasattr(config_class, name) or isinstance(getattr(config_class, name), property))
        and (value is not None or defaults.get(name) is not None)  # null is no window, where the default is one
    }
    for name in NEEDED:
        for own in {name, config_class.attribute_map.get(name, name)} & set(values):
            _check_count(own, values[own])
    parsed = config_class(**values, **{name: 0 for name in TOKENS if name in defaults})
    for name in NEEDED:
        if _get(parsed, name) is None:
            raise SpecError(
                f"{name} is missing: {kind} has none, and text models with attention are counted here; try llama"
            )
        _check_count(name, _get(parsed, name))
    _check_heads(values, parsed)
    cls = _model_class(kind, values.get("architectures"), parsed, whole)
    return {**values, "model_type": kind, "architectures": [cls.__name__]}, parsed, cls


def _text_model(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """(model_type, fields, model_type of the whole) of the text model in `config`, which is nearly always all of it."""
    from transformers import CONFIG_MAPPING

    whole, text = config.get("model_type"), config.get("text_config")
    if not isinstance(whole, str) or not whole:
        raise SpecError(
            "model_type is missing: it says how the other numbers are read; paste a model's whole config.json"
        )
    parts = getattr(CONFIG_MAPPING[whole], "sub_configs", {}) if whole in CONFIG_MAPPING else {}
    kind, values = whole, dict(config)
    if isinstance(text, dict) and text:
        kind = getattr(parts.get("text_config"), "model_type", "") or text.get("model_type") or ""
        values = {name: config[name] for name in ("tie_word_embeddings",) if name in config} | text
    elif "text_config" in parts:
        raise SpecError(f"text_config is missing: a {whole} has its text model there; paste its whole config.json")
    values.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        name = f"model_type={shown(kind or 'missing')}"
        if "auto_map" in config:
            raise SpecError(
                f"{name}: it needs code from its repository, which peftlab never runs; name a model that transformers "
                "itself can build, such as llama"
            )
        near = get_close_matches(shown(kind), list(CONFIG_MAPPING), n=3, cutoff=0.5) or ["llama", "qwen3", "gpt2"]
        raise SpecError(f"{name}: transformers does not know it; did you mean {' or '.join(near)}?")
    return kind, values, whole


def _clean(value: Any, name: str = "", depth: int = 0) -> Any:
    """`value` of a config without what says nothing about shapes. Raises SpecError for a number beyond LIMITS."""
    if depth > 8:
        raise SpecError("config.json is nested more than 8 deep, and no model's is; paste a model's own config.json")
    if isinstance(value, dict):
        return {
            key: _clean(inner, key, depth + 1)
            for key, inner in value.items()
            if key not in _ignored() and (not key.startswith("_") or key == "_sliding_window_pattern")
        }
    if isinstance(value, list):
        return [_clean(inner, name, depth + 1) for inner in value]
    if isinstance(value, int):
        low, high = next((low, high) for pattern, low, high in LIMITS if re.search(pattern, name))
        if not low <= value <= high:
            raise SpecError(
                f"{shown(name)}={shown(value)}: {'at least 0 and ' if low == 0 else ''}at most {high:,} here; use the number "
                "of the model's own config.json"
            )
    return value


@lru_cache(maxsize=1)
def _ignored() -> frozenset[str]:
    from transformers import GenerationConfig

    return frozenset(GenerationConfig().to_dict()) | IGNORED


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise SpecError(
            f"{name}={shown(repr(value))}: this is a whole number of at least 1; use that of the model's own config.json"
        )


def _check_heads(values: Mapping[str, Any], parsed: Any) -> None:
    """Raises SpecError where heads do not divide what they share."""
    hidden, heads = parsed.hidden_size, _get(parsed, "num_attention_heads")
    kv_heads = heads if (given := _get(parsed, "num_key_value_heads")) is None else given
    sizes = {_get(parsed, name) for name in HEAD_SIZES} - {None, hidden // heads}
    if hidden % heads and not sizes and not values.get("head_dim"):
        raise SpecError(
            f"num_attention_heads={heads}: it must divide hidden_size={hidden}; try {math.gcd(hidden, heads)}"
        )
    if type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads:
        raise SpecError(
            f"num_key_value_heads={shown(kv_heads)}: it must divide num_attention_heads={heads}; try {heads}"
        )


def _model_class(kind: str, named: Any, parsed: Any, whole: str) -> Any:
    """The class to build: the one that the config names, if it is a model of that config, else one that writes text."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    for name in [*(named if isinstance(named, list) else [])[:1], *(t.get(k) for k in (kind, whole) for t in tables)]:
        cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if is_model and cls.config_class and isinstance(parsed, cls.config_class):
            return cls
    part = "" if kind == whole else f" (the text model of {whole})"
    raise SpecError(
        f"model_type={kind}{part}: transformers builds no language model of it alone; name one such as llama"
    )


@contextmanager
def _in_words(config: Mapping[str, Any]) -> Iterator[None]:
    """Whatever transformers raises, as a SpecError of one line."""
    try:
        yield
    except SpecError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = shown(f"{type(cause).__name__}: {cause}", 240)
        raise SpecError(
            f"model_type={shown(config.get('model_type'))}: transformers cannot build this config ({reason}); compare it "
            "with the model's own config.json"
        ) from None


def shown(value: Any, most: int = 40) -> str:
    """A value from a config as one short line that can be printed."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _bounded() -> Any:
    """Stops a build where a config asks for far more modules than any model, or for a large table on the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    deadline = time.monotonic() + BUILD_SECONDS

    class Bounded(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            on_cpu = args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu"
            if time.monotonic() > deadline or (on_cpu and args[0].numel() > MOST_ON_CPU):
                raise SpecError(
                    f"this config takes more than {BUILD_SECONDS:g} s to build, or much memory, and known models take neither; "
                    "check its layers, experts and positions"
                )
            return func(*args, **(kwargs or {}))

    return Bounded()


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
    from .catalog import models

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
    from .catalog import models

    lines = [
        f"{json.dumps(key)}: {json.dumps(to_data(build(entry.config)), separators=(',', ':'))}"
        for key, entry in models.MODELS.items()
        if entry.config is not None and not entry.shape_of
    ]
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _write()
