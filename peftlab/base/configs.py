"""Hugging Face configs: read, checked before anything is built, and built without weights. Refusals are of one line."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .. import seam
from ..errors import SpecError
from ..spec import Json

if TYPE_CHECKING:
    from torch.overrides import TorchFunctionMode
    from transformers import PreTrainedConfig, PreTrainedModel

Config = Mapping[str, Any]
"""A config.json as parsed: of a whole model, or the part of it that `normal` leaves."""
MOST_PARAMETERS = 10**14
BUILD_SECONDS = 20.0
"""Far more than any known model takes."""
MOST_ON_CPU = 10**7
"""Elements of a tensor that a model may make on the CPU while it is built on the meta device, as XLNet does."""
LIMITS: tuple[tuple[str, float, int], ...] = (
    (r"layers$|n_layer$|^depth$", 0, 1_000),
    (r"layer$", -1_000, 1_000),  # the number of one, which may be counted from the last
    (r"experts(_per_tok)?$", 0, 100_000),
    (r"heads?$|labels$", 0, 100_000),
    (r"vocab_size$", 0, 10_000_000),
    (r"relative_positions$", -1, 100_000_000),
    (r"^(hidden|intermediate)_size$|position", 0, 100_000_000),
    (r"theta", -math.inf, 10**12),
    (r"", -math.inf, 100_000_000),
)
"""Pattern of a field's name, the least and the most that it may be as a whole number; the first match counts."""
IGNORED = {
    "transformers_version", "dtype", "torch_dtype", "name_or_path", "auto_map", "quantization_config",
    "compression_config", "attn_implementation", "experts_implementation", "use_kernels", "id2label", "label2id",
    "task_specific_params", "problem_type", "finetuning_task", "tokenizer_class", "model_max_length",
    "initializer_range", "torchscript", "sinusoidal_embeddings",
}  # fmt: skip
"""Fields that say nothing about shapes, or name code to run. Settings of generation are ignored too."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that are set to 0 where a family has a default, because that may lie outside the config's vocabulary."""
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Fields that every text model with attention has, the first two in every config.json; families have names of their own.

A family without attention heads, or one that reads bytes, has no field for what it lacks.
"""
FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""What transformers writes under `__float__` for a number that JSON has none for."""
WHOLE, CHECKPOINT = "text_model_of", "quantization_config"
"""Fields of `normal` that say nothing about shapes: the family whose text model this is; how its checkpoint is quantized."""


def build_meta(config: Config) -> PreTrainedModel:
    """The transformers model of `config` on the meta device, tied. Raises SpecError, and where numbers are absurd, at once."""
    import torch

    with in_words(config):
        _, parsed, cls = _parse(config)
        with seam.building, torch.device("meta"), _bounded():
            model = cls(parsed)
            model.tie_weights()
        total = sum(p.numel() for p in model.parameters())
        if not 0 < total <= MOST_PARAMETERS:
            raise SpecError(f"this config makes {total:,} parameters, not 1 to {MOST_PARAMETERS:,}; check its sizes")
    return model


def normal(config: Config) -> Json:
    """The fields of a config.json's text model that decide its shapes, and in `architectures` the class to build.

    Raises SpecError, and builds nothing. A width or depth that a whole model's config leaves out would be transformers' own
    default, and is refused too.
    """
    with in_words(config):
        values, parsed, _ = _parse(config)
        given = {*values, *(name for part in values.values() if isinstance(part, dict) for name in part)}
        owns = {name: parsed.attribute_map.get(name, name) for name in NEEDED}
        is_part = "text_config" in config and not given.isdisjoint({*owns, *owns.values()})
        for name in NEEDED[:2]:
            if {name, owns[name]} & given or any(_decides(field, name, values, parsed) for field in values):
                continue
            if not is_part:
                raise SpecError(f"{name} is missing, and this may be any {parsed.model_type}; paste the whole file")
            values[owns[name]] = get(parsed, name)  # transformers leaves defaults out where it writes a part
        return values


def _decides(field: str, name: str, values: Json, parsed: PreTrainedConfig) -> bool:
    """Whether the number `name` of a config comes from its field of another name: with more of that, it is another."""
    value = values[field]
    if type(value) is int:
        more: Any = value + 1
    elif isinstance(value, list) and value:
        more = [*value, value[-1]]
    else:
        more = value + value[-1:] if isinstance(value, str) else value
    changed = {own: v for own, v in values.items() if own != "model_type"} | {field: more}
    with suppress(Exception):  # it may have no more
        return get(stack(type(parsed)(**changed)), name) != get(stack(parsed), name)
    return False


def parsed(config: Config) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """(transformers' own config of a config.json's text model, the class to build of it). Raises SpecError."""
    with in_words(config):
        _, made, cls = _parse(config)
        return made, cls


def layer_types(config: Config) -> list[str] | None:
    """The kind of attention of each layer; None for a family whose layers are all alike."""
    with in_words(config):
        return getattr(_parse(config)[1], "layer_types", None)


def _parse(config: Config) -> tuple[Json, PreTrainedConfig, type[PreTrainedModel]]:
    """(`normal`, transformers' config, the class to build)"""
    kind, values, whole = _text_model(config)
    about = _checkpoint(config) | ({WHOLE: whole} if whole != kind else {})
    config_class = seam.library().CONFIG_MAPPING[kind]
    if isinstance(labels := values.get("id2label"), dict) and len(labels) != 2:
        values["num_labels"] = len(labels)
    defaults = {f.name: f.default for f in fields(config_class)}
    values = {
        name: value
        for name, value in _clean(values).items()
        if (name in defaults or not hasattr(config_class, name) or isinstance(getattr(config_class, name), property))
        and (value is not None or defaults.get(name) is not None)  # a null says that there is no window
    }
    for name in (*NEEDED, "head_dim"):
        for own in {name, config_class.attribute_map.get(name, name)} & set(values):
            if name in NEEDED or values[own] is not None:
                _check_count(own, values[own])
    if isinstance(window := values.get("sliding_window"), (list, dict, str)):
        raise SpecError(f"sliding_window={shown(window)}: this is a whole number or null; use the model's own")
    parsed = config_class(**values, **{name: 0 for name in TOKENS if defaults.get(name) is not None})
    cls = _model_class(kind, values.get("architectures"), parsed, whole)
    main = stack(parsed)
    for name in NEEDED:
        if get(main, name) is not None:
            _check_count(name, get(main, name))
        elif name in NEEDED[:2] or name in defaults:
            raise SpecError(f"{name} is missing: this {kind} has none, and it cannot be counted without; try llama")
    if get(main, "num_attention_heads") is not None:
        _check_heads(main)
    return {**values, **about, "model_type": kind, "architectures": [cls.__name__]}, parsed, cls


def stack(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a transformers config that says how wide and deep the layers are: the decoder's, where each stack has one."""
    return config if get(config, "hidden_size") is not None else config.get_text_config(decoder=True)


def _checkpoint(config: Config) -> Json:
    """CHECKPOINT with the method and the bits alone, where a config says that its weights are quantized."""
    text = config.get("text_config")
    parts = [part for part in (config, text) if isinstance(part, dict)]
    for said in (part.get(name) for part in parts for name in (CHECKPOINT, "compression_config")):
        if isinstance(said, dict) and said:
            method, bits = said.get("quant_method"), said.get("bits")
            named = {"quant_method": shown(method) if isinstance(method, str) and method else "quantized"}
            return {CHECKPOINT: named | ({"bits": bits} if type(bits) is int and 0 < bits <= 16 else {})}
    return {}


def _text_model(config: Config) -> tuple[str, Json, str]:
    """(model_type and fields of the text model in `config`, model_type of the whole, which is nearly always the same)"""
    known = seam.library().CONFIG_MAPPING
    kind, text = config.get("model_type"), config.get("text_config")
    whole = config.get(WHOLE, kind)
    if not isinstance(kind, str) or not kind or not isinstance(whole, str):
        raise SpecError("model_type is missing: it says how the other numbers are read; paste the whole config.json")
    parts = getattr(known[kind], "sub_configs", {}) if kind in known else {}
    values = dict(config)
    if isinstance(text, dict) and text:
        kind = getattr(parts.get("text_config"), "model_type", "") or text.get("model_type") or ""
        values = {name: config[name] for name in ("tie_word_embeddings",) if name in config} | text
    elif "text_config" in parts:
        raise SpecError(f"text_config is missing: a {kind} has its text model there; paste its whole config.json")
    values.pop("model_type", None)
    if not isinstance(kind, str) or kind not in known:
        name = f"model_type={shown(kind or 'missing')}"
        if "auto_map" in config:
            raise SpecError(f"{name}: it needs code from its repository, which never runs here; try llama")
        near = get_close_matches(shown(kind), list(known), n=3, cutoff=0.5) or ["llama", "qwen3", "gpt2"]
        raise SpecError(f"{name}: transformers does not know it; did you mean {' or '.join(near)}?")
    return kind, values, whole


def _clean(value: Any, name: str = "", depth: int = 0) -> Any:
    """A field's value, with what says something about shapes. Raises SpecError beyond LIMITS and for deep nesting."""
    if depth > 8:
        raise SpecError("config.json is nested more than 8 deep, and no model's is; paste a model's own config.json")
    if isinstance(value, dict) and isinstance(number := value.get("__float__"), str) and number in FLOATS:
        return FLOATS[number]
    if isinstance(value, dict):
        said = {
            n: v for n, v in value.items() if n not in _ignored() and (n[:1] != "_" or n == "_sliding_window_pattern")
        }
        return {name: _clean(inner, name, depth + 1) for name, inner in said.items()}
    if isinstance(value, list):
        return [_clean(inner, name, depth + 1) for inner in value]
    if isinstance(value, int):
        low, high = next((low, high) for pattern, low, high in LIMITS if re.search(pattern, name))
        if not low <= value <= high:
            least = "at least 0 and " if low == 0 else ""
            raise SpecError(f"{shown(name)}={shown(value)}: {least}at most {high:,} here; use the model's own number")
    return value


@lru_cache(maxsize=1)
def _ignored() -> frozenset[str]:
    return frozenset(seam.library().GenerationConfig().to_dict()) | IGNORED


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise SpecError(f"{name}={shown(repr(value))}: this is a whole number of at least 1; use the model's own")


def _check_heads(parsed: PreTrainedConfig) -> None:
    """Raises SpecError where the heads cannot be split among the key-value heads. Some families need no more than that."""
    heads = get(parsed, "num_attention_heads")
    kv_heads = heads if (given := get(parsed, "num_key_value_heads")) is None else given
    if type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads:
        raise SpecError(f"num_key_value_heads={shown(kv_heads)}: must divide num_attention_heads={heads}; try {heads}")


def _model_class(kind: str, named: object, parsed: PreTrainedConfig, whole: str) -> type[PreTrainedModel]:
    """The class to build: the one that the config names, if it is a model of that config, else one that writes text."""
    transformers, tables = seam.library(), seam.writers()
    first = named[:1] if isinstance(named, list) else []
    own = [name for table in tables if (name := table.get(kind))]
    for name in (*first, *own, *(table.get(whole) for table in tables)):
        cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        reads = getattr(cls, "config_class", None)
        # a family of plain fields may be built by another one's class, which reads them as its own
        if is_model and reads and (isinstance(parsed, reads) or (name in own and not parsed.sub_configs)):
            return cls
    part = "" if kind == whole else f" (the text model of {whole})"
    raise SpecError(f"model_type={kind}{part}: transformers builds no language model of it; name one such as llama")


@contextmanager
def in_words(config: Config) -> Iterator[None]:
    """Turns whatever transformers raises into a SpecError of one line."""
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


def shown(value: object, most: int = 40) -> str:
    """A value from a config as one printable line of at most `most` characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _bounded() -> TorchFunctionMode:
    """A context that stops a build which takes far longer than any known model's, or makes a large table on the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    deadline = time.monotonic() + BUILD_SECONDS

    class Bounded(TorchFunctionMode):
        def __torch_function__(
            self, func: Callable[..., object], types: object, args: Sequence[object] = (), kwargs: Json | None = None
        ) -> object:
            first = args[0] if args else None
            on_cpu = first.numel() if isinstance(first, torch.Tensor) and first.device.type == "cpu" else 0
            if time.monotonic() > deadline or on_cpu > MOST_ON_CPU:
                raise SpecError(f"this config takes over {BUILD_SECONDS:g} s to build, or much memory; check its sizes")
            return func(*args, **(kwargs or {}))

    return Bounded()


def get(config: PreTrainedConfig, name: str) -> Any:
    """A field of a transformers config, or None; the usual layer's where layers differ, as in Gemma 4's head_dim."""
    name = config.attribute_map.get(name, name)
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)


def context(config: PreTrainedConfig) -> int:
    """The longest text that the model reads, in tokens; 0 where its config does not say."""
    said = (
        get(config, name) for name in ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
    )
    return max(0, next(filter(None, said), 0))  # XLNet says -1
