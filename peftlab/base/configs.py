"""Hugging Face configs: read, checked before anything is built, and built without weights."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from .. import seam
from ..errors import SpecError

MOST_PARAMETERS = 10**14
BUILD_SECONDS = 20.0
"""Far more than any known model takes."""
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
"""0 where a family has its own, which may lie outside the config's vocabulary; left out where it has none."""
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Without these there is no text model with attention; transformers knows how each family calls them."""
SIZES = ("hidden_size", "num_hidden_layers")
"""Of these, what every published config.json says itself."""
HEAD_SIZES = ("head_dim", "d_kv", "d_head", "attention_head_size", "kv_channels", "qk_head_dim", "v_head_dim")


def build_meta(config: Mapping[str, Any]) -> Any:
    """The transformers model of `config` on the meta device, with its weights tied.

    Raises SpecError for a config that is out of all proportion, before anything is built, and for one that transformers
    does not know or cannot build.
    """
    import torch

    with in_words(config):
        _, parsed, cls = _parse(config)
        with seam.building, torch.device("meta"), _bounded():
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
    with in_words(config):
        return _parse(config)[0]


def check_whole(config: Mapping[str, Any]) -> None:
    """Raises SpecError where a config.json leaves out its SIZES: transformers would take some model's of the family."""
    kind, values, _ = _text_model(config)
    names = seam.library().CONFIG_MAPPING[kind].attribute_map
    for name in SIZES:
        if not {name, names.get(name, name)} & set(values):
            raise SpecError(
                f"{name} is missing: with it left out, this would be any {kind}; paste a model's whole config.json"
            )


def layer_types(config: Mapping[str, Any]) -> list[str] | None:
    """What tells the layers apart, such as how far each sees; None for a family whose layers are all alike."""
    with in_words(config):
        return getattr(_parse(config)[1], "layer_types", None)


def _parse(config: Mapping[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """(`normal`, transformers' config, class to build)"""
    kind, values, whole = _text_model(config)
    config_class: Any = seam.library().CONFIG_MAPPING[kind]
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
    if isinstance(window := values.get("sliding_window"), (list, dict, str)):
        raise SpecError(
            f"sliding_window={shown(window)}: this is a whole number or null; use that of the model's own config"
        )
    parsed = config_class(**values, **{name: 0 for name in TOKENS if defaults.get(name) is not None})
    for name in NEEDED:
        if get(parsed, name) is None:
            raise SpecError(
                f"{name} is missing: {kind} has none, and text models with attention are counted here; try llama"
            )
        _check_count(name, get(parsed, name))
    _check_heads(values, parsed)
    cls = _model_class(kind, values.get("architectures"), parsed, whole)
    return {**values, "model_type": kind, "architectures": [cls.__name__]}, parsed, cls


def _text_model(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """(model_type, fields, model_type of the whole) of the text model in `config`, which is nearly always all of it."""
    known = seam.library().CONFIG_MAPPING
    whole, text = config.get("model_type"), config.get("text_config")
    if not isinstance(whole, str) or not whole:
        raise SpecError(
            "model_type is missing: it says how the other numbers are read; paste a model's whole config.json"
        )
    parts = getattr(known[whole], "sub_configs", {}) if whole in known else {}
    kind, values = whole, dict(config)
    if isinstance(text, dict) and text:
        kind = getattr(parts.get("text_config"), "model_type", "") or text.get("model_type") or ""
        values = {name: config[name] for name in ("tie_word_embeddings",) if name in config} | text
    elif "text_config" in parts:
        raise SpecError(f"text_config is missing: a {whole} has its text model there; paste its whole config.json")
    values.pop("model_type", None)
    if not isinstance(kind, str) or kind not in known:
        name = f"model_type={shown(kind or 'missing')}"
        if "auto_map" in config:
            raise SpecError(
                f"{name}: it needs code from its repository, which peftlab never runs; name a model that transformers "
                "itself can build, such as llama"
            )
        near = get_close_matches(shown(kind), list(known), n=3, cutoff=0.5) or ["llama", "qwen3", "gpt2"]
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
    return frozenset(seam.library().GenerationConfig().to_dict()) | IGNORED


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise SpecError(
            f"{name}={shown(repr(value))}: this is a whole number of at least 1; use that of the model's own config.json"
        )


def _check_heads(values: Mapping[str, Any], parsed: Any) -> None:
    """Raises SpecError where heads do not divide what they share."""
    hidden, heads = parsed.hidden_size, get(parsed, "num_attention_heads")
    kv_heads = heads if (given := get(parsed, "num_key_value_heads")) is None else given
    sizes = {get(parsed, name) for name in HEAD_SIZES} - {None, hidden // heads}
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
    transformers, tables = seam.library(), seam.writers()
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
def in_words(config: Mapping[str, Any]) -> Iterator[None]:
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


def get(config: Any, name: str) -> Any:
    """A transformers config's attribute; of one that varies between layers (Gemma 4's head_dim), the usual layer's."""
    name = config.attribute_map.get(name, name)
    return vars(config)[name] if name in vars(config) else getattr(config, name, None)
