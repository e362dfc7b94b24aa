"""The seam to transformers: everything that peftlab takes from it and that its documentation does not promise.

When a release of transformers moves one of these, this file changes and no other; tests/test_seam.py tries them on the
installed release. Besides, a mask of four dimensions reaches attention as it is, and `position_ids` say where in its row
each token stands (`run/batches.py`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Module
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

    Rotation = Callable[..., tuple[Tensor, Tensor]]

ROTARY = "apply_rotary_pos_emb"
PLACES = ("attention_mask", "position_ids")
"""The arguments that tell a model which tokens are padding, and where in its row each one stands."""
TURN = "peftlab_turn"
"""The attribute of a `sin` that holds the function to call in place of ROTARY."""
_importing = threading.Lock()
building = threading.Lock()
"""To hold while transformers builds a model: it changes torch's default type and every `tie_weights` for all threads then."""


def quiet() -> None:
    """Keeps libraries from writing to the terminal, unless the environment asks for it. To be called before their import."""
    asked = "PYTHONWARNINGS" in os.environ
    silence = {
        "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    for name, value in silence.items():
        os.environ.setdefault(name, value)
    if not asked and not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())  # without it, loggers that nobody has set up write too


def library() -> ModuleType:
    """transformers, imported by one thread at a time: it replaces its own module, and a second would get an empty one."""
    with _importing:
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()
    return transformers


def offer_rotation(kind: type) -> bool:
    """Lets a `sin` name the function by which attention of this class rotates; False where the class calls none.

    Attention takes `position_embeddings`, which is (cos, sin), by name, and looks ROTARY up in its own file each time it
    runs. There it is wrapped, once, and does as before for every `sin` without a TURN: other models see no difference.
    """
    files = {sys.modules[base.__module__] for base in kind.__mro__ if base.__module__ in sys.modules}
    calling = [file for file in files if _rotates_both(getattr(file, ROTARY, None))]
    for file in calling:
        if not hasattr(own := getattr(file, ROTARY), TURN):
            setattr(file, ROTARY, _giving_way(own))
    return bool(calling)


def _rotates_both(rotation: Rotation | None) -> bool:
    """Whether this takes what `_giving_way` does: some families rotate one of the two at a time."""
    if rotation is None:
        return False
    first = [*inspect.signature(rotation).parameters.values()][:4]
    return [(p.name, p.default) for p in first] == [
        (name, inspect.Parameter.empty) for name in ("q", "k", "cos", "sin")
    ]


def _giving_way(own: Rotation) -> Rotation:
    @functools.wraps(own)
    def rotation(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: object, **more: object
    ) -> tuple[Tensor, Tensor]:
        return getattr(sin, TURN, own)(q, k, cos, sin, *rest, **more)

    setattr(rotation, TURN, True)
    return rotation


def rotary_sizes(model: Module) -> set[int]:
    """How many numbers of a head are rotated: one size for most models, none where positions are not rotary."""
    return {2 * buffer.shape[-1] for name, buffer in model.named_buffers() if "inv_freq" in name}


def epsilon(norm: Module) -> float:
    """What an RMS norm adds to the mean square. Raises AttributeError."""
    return getattr(norm, "variance_epsilon" if isinstance(getattr(norm, "variance_epsilon", None), float) else "eps")


def configs_of(model: Module) -> list[PreTrainedConfig]:
    """Every config that a module of the model reads, once."""
    found: Iterator[Any] = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if hasattr(c, "_attn_implementation")}.values())


def attending_by_name(model: Module) -> set[int]:
    """The ids of the configs whose models look up their attention under its name, as `register_attention` has it."""
    kind = library().PreTrainedModel
    models = [module for module in model.modules() if isinstance(module, kind)]
    return {id(m.config) for m in models if m._supports_attention_backend}


def attention_of(config: PreTrainedConfig) -> str:
    """sdpa, eager, or a name that was registered."""
    return config._attn_implementation


def has_sdpa(model: PreTrainedModel) -> bool:
    """Whether transformers lets models of this class attend by torch's scaled_dot_product_attention."""
    return model._supports_sdpa


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether the model is of a class that tells kinds of texts apart."""
    return "ForSequenceClassification" in type(model).__name__


def windows(config: PreTrainedConfig) -> list[int]:
    """Each limit that the config sets to the number of tokens that a token attends to."""
    found = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return [window for window in found if isinstance(window, int) and window > 0]


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Has models of this config attend by the attention of that name."""
    config._attn_implementation = name


def register_attention(name: str, attend: Callable[..., object], mask: Callable[..., object]) -> None:
    """Has configs with this name attend by `attend`, through masks made by `mask`: two tables in which it is looked up."""
    transformers = library()
    transformers.AttentionInterface.register(name, attend)
    transformers.AttentionMaskInterface.register(name, mask)


def sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers' attention by torch's scaled_dot_product_attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(*args, **kwargs)


def sdpa_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that goes with `sdpa`."""
    from transformers.masking_utils import sdpa_mask as made

    return made(*args, **kwargs)


@cache
def make_masks_for_fakes() -> None:
    """Has masks made for fake tensors as for real ones: transformers takes fakes for a compilation, and makes every mask."""
    from torch._subclasses.fake_tensor import FakeTensor
    from transformers import masking_utils

    masks: Any = masking_utils
    own = masks.is_tracing
    masks.is_tracing = lambda tensor=None: own(None if isinstance(tensor, FakeTensor) else tensor)


@cache
def cache_name() -> str:
    """The name of the keys and values of tokens that were read, as an argument and in what a model returns."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


_arguments: dict[type, Mapping[str, inspect.Parameter]] = {}


def arguments_of(model: Module) -> Mapping[str, inspect.Parameter]:
    """What the forward of models of this class takes."""
    kind = type(model)
    if kind not in _arguments:
        _arguments[kind] = inspect.signature(kind.forward).parameters
    return _arguments[kind]


def takes(model: Module, name: str) -> bool:
    """Whether the forward of the transformers model inside `model` has an argument of that name.

    A name that it does not have would go on to its layers unseen, or end in a TypeError.
    """
    return name in arguments_of(writer(model) or model)


def logits(model: Module, keep: Tensor | None = None, **inputs: object) -> Tensor:
    """The logits at the places `keep`, or at all; of the inputs, the model gets those that it takes."""
    return _logits(model, keep, {**inputs, "use_cache": False})[0]


def taken(model: Module, inputs: Mapping[str, object]) -> dict[str, object]:
    """Those of the inputs that the model takes."""
    names = arguments_of(writer(model) or model)
    return {name: value for name, value in inputs.items() if name in names}


def _logits(model: Module, keep: Tensor | None, inputs: Mapping[str, object]) -> tuple[Tensor, Any]:
    """(the logits at the places `keep`, or at all; the whole output)"""
    given = taken(model, inputs if keep is None else {**inputs, "logits_to_keep": keep})
    out = model(**given)
    return (out.logits if keep is None or "logits_to_keep" in given else out.logits[:, keep]), out


def read(
    model: Module, held: Cache | None, keep: Tensor | None = None, **inputs: object
) -> tuple[Tensor, Cache | None]:
    """(logits at the places `keep` of inputs that follow the tokens in `held`, the cache of all these tokens)

    The cache is None for a model that keeps nothing in transformers' own: it has to read all tokens again.
    """
    name = cache_name()
    given = inputs if held is None else {**inputs, name: held}
    try:
        made, out = _logits(model, keep, {**given, "use_cache": True})
    except (LookupError, ValueError, TypeError, AttributeError):
        if held is not None:
            raise
        return logits(model, keep, **inputs), None  # a cache that the family's own config does not suit
    return made, getattr(out, name, None) if takes(model, name) else None


def first_position(model: Module) -> int:
    """The position of a row's first token: families whose table of positions has a place for padding begin after it."""
    from torch.nn import Embedding

    for name, module in model.named_modules():
        if isinstance(module, Embedding) and "position" in name and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def is_listed(folder: Path) -> bool:
    """Whether transformers' list of models that write text has the config in `folder`. Raises what transformers does."""
    transformers = library()
    config = transformers.AutoConfig.from_pretrained(folder)
    return type(config) in transformers.AutoModelForCausalLM._model_mapping


def writer(model: Module) -> PreTrainedModel | None:
    """The transformers model inside an adapted one; None where there is none."""
    kind = library().PreTrainedModel
    return next((module for module in model.modules() if isinstance(module, kind)), None)


def writers() -> tuple[Mapping[str, str], ...]:
    """Three tables, model_type → name of a class that writes text: encoder and decoder, masked, causal."""
    return tuple(map(classes, ("seq2seq", "masked", "causal")))


def classes(task: str) -> Mapping[str, str]:
    """model_type → name of the class for causal, seq2seq, masked or classification."""
    library()
    from transformers.models.auto import modeling_auto as auto

    names = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM", "masked": "MASKED_LM"}
    return getattr(auto, f"MODEL_FOR_{names.get(task, 'SEQUENCE_CLASSIFICATION')}_MAPPING_NAMES")
