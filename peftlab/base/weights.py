"""Base models in memory: loaded once and kept, and shared without being changed."""

from __future__ import annotations

import copy
import gc
import importlib.util
import logging
import math
import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from .. import hardware, seam
from ..errors import SpecError
from ..spec import Resolved
from . import configs, models
from .fetching import Source, fetch, folder_of, source_of

if TYPE_CHECKING:
    import torch
    from torch.nn import Module, Parameter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SomeModel = TypeVar("SomeModel", bound="Module")


@dataclass(frozen=True)
class Base:
    """A base model in memory. `model` is shared and never changed: train and adapt a `share` of it."""

    entry: models.BaseModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    device: str
    measured: dict[str, Any] = field(default_factory=dict, compare=False)
    """Results of measuring it, kept by name: the model never changes, so they need not be measured again."""

    @cached_property
    def quick(self) -> PreTrainedModel:
        """A `share` with its operations fused, to generate with."""
        from .. import fused

        fused.quicken(model := share(self.model))
        return model


SHARE = 0.5
"""Of the memory of the GPU, or of this machine without one: the models that stay loaded take at most so much."""
_loaded: OrderedDict[tuple[object, ...], Base] = OrderedDict()
"""The models that stay loaded, those used last at the end."""
_alive: weakref.WeakValueDictionary[tuple[object, ...], Base] = weakref.WeakValueDictionary()
"""Those too that somebody still uses though they do not stay."""
_changing = threading.Lock()
_locks: dict[tuple[object, ...], threading.Lock] = {}
if hasattr(os, "register_at_fork"):  # a forked process has no thread that would ever let go of them
    os.register_at_fork(after_in_child=_changing._at_fork_reinit)  # type: ignore[attr-defined]  # as logging has it
    os.register_at_fork(after_in_child=_locks.clear)


def load(spec: Resolved, device: str | None = None) -> Base:
    """The base model of a resolved spec, in its precision or quantized, on this machine's device or the one named; loaded
    once and kept.

    While all that stay take more than their SHARE, the ones used longest ago go, once nobody uses them any more.
    Raises SpecError for a model that does not write text, and WeightsError where its weights cannot be had.
    """
    entry = models.find(spec.model)
    if not entry.is_causal:
        raise SpecError(f"model={entry.said}: it is no causal language model, and only counted; try {models.DEFAULT}")
    device = device or hardware.here().device
    key = _key(spec, device)
    with _locks.setdefault(key, threading.Lock()):  # a second caller waits here, and then finds the first one's
        if (base := _alive.get(key)) is None:
            base = _load(entry, spec, device)
        _stay(key, base)
        return base


def _key(spec: Resolved, device: str = "") -> tuple[object, ...]:
    """What a base in memory is known by."""
    folder, device = folder_of(models.find(spec.model)), device or hardware.here().device
    return (folder, spec.precision, spec.attention, spec.quantization, spec.double_quantization, device)


def loaded(spec: Resolved) -> Base | None:
    """The base of a run where it is in memory already."""
    return _alive.get(_key(spec))


def let_go(but: Resolved) -> None:
    """Has no base stay but that of the run `but`: the memory of the others is free once nobody uses them any more."""
    with _changing:
        going = [_loaded.pop(key) for key in [*_loaded] if key != _key(but)]
    if going:
        del going
        gc.collect()  # a model refers to itself


def _stay(key: tuple[object, ...], base: Base) -> None:
    with _changing:
        _alive[key] = _loaded[key] = base
        _loaded.move_to_end(key)
        going = []
        while len(_loaded) > 1 and sum(map(allocated, _loaded.values())) > SHARE * _memory(base):
            going.append(_loaded.popitem(last=False))
    if going:
        del going
        gc.collect()  # a model refers to itself


def _memory(base: Base) -> float:
    """Bytes of the memory that a base lies in; infinite where that is not known."""
    import torch

    if base.device == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    return hardware.here().memory_bytes or math.inf


def _load(entry: models.BaseModel, spec: Resolved, device: str) -> Base:
    import torch

    from .. import fused

    list(fetch(spec.model))
    source = source_of(entry)
    assert source is not None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(spec.precision, torch.float32)
    how = {"dtype": dtype, "attn_implementation": spec.attention, **_quantized(spec, dtype, device)}
    try:
        with seam.building:
            model = _class_of(entry).from_pretrained(folder_of(entry), **how)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise _refused(spec, error) from None
    # an adapter names its base by this: it is to be the published model, not this machine's copy
    model.name_or_path = model.config._name_or_path = entry.hub_id or str(entry.folder)
    model.requires_grad_(False).eval()
    if spec.quantization == "none":
        model.to(device)
        fused.adjoin(model)
    _settle(model)
    _try(model, spec)
    return Base(entry, model, tokenizer_of(entry), source, device)


def tokenizer_of(entry: models.BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that is on disk; it can pad."""
    tokenizer = seam.library().AutoTokenizer.from_pretrained(folder_of(entry))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _class_of(entry: models.BaseModel) -> Any:
    """What loads the model: transformers' own choice, or the class of a text model that it has on no list."""
    if not entry.config or seam.is_listed(folder_of(entry)):
        return seam.library().AutoModelForCausalLM
    return configs.parsed(entry.config)[1]


def _refused(spec: Resolved, error: Exception) -> SpecError:
    """What transformers says against loading a model, in one line."""
    said, name = " ".join(str(error).split()), models.find(spec.model).said
    if spec.attention == "sdpa" and "scaled_dot_product_attention" in said:
        return SpecError("attention=sdpa: this model's family has no sdpa in transformers; set it to eager")
    return SpecError(
        f"model={name}: transformers cannot load or run it ({type(error).__name__}: {said[:200]}); try {models.DEFAULT}"
    )


def _try(model: PreTrainedModel, spec: Resolved) -> None:
    """Has a model read two short rows that differ in their last token, told which tokens are there and where they stand.

    Raises SpecError where it cannot, and where earlier logits differ: a model that sees what it is to predict learns nothing.
    """
    import torch

    from ..fused import trial

    ids = torch.arange(6, device=model.device).repeat(2, 1)
    ids[1, -1] += 1
    mask, positions = torch.ones_like(ids), torch.arange(6, device=ids.device).repeat(2, 1) + seam.first_position(model)
    inputs = dict(zip(seam.PLACES, (mask, positions), strict=True))
    try:
        with torch.no_grad():
            one, other = seam.logits(model, input_ids=ids, **inputs)[:, :-1].float()
    except Exception as error:  # anybody's architecture, in transformers' code
        raise _refused(spec, error) from None
    if (one - other).abs().max() > trial.rounding(model.dtype) * one.std():
        raise SpecError(
            f"model={models.find(spec.model).said}: it reads the tokens after each token too, and so cannot learn to write "
            f"them; set is_decoder in its config.json where the family has that, or try {models.DEFAULT}"
        )


def allocated(base: Base | None = None) -> int:
    """Bytes of the parameters of `base`, or of all bases that are loaded."""
    return sum(p.nbytes for b in ([base] if base else [*_alive.values()]) for p in b.model.parameters())


def _settle(model: PreTrainedModel) -> None:
    """Does now what bitsandbytes would do at the first use: int8 moves its scales; NF4 is not to be repacked on a CPU."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state") and module.weight.CB is not None:
            module.init_8bit_state()
            # at each product it would say that inputs are rounded to fp16
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _quantized(spec: Resolved, dtype: torch.dtype, device: str) -> dict[str, object]:
    """Arguments with which transformers loads a quantized base: its linear maps by bitsandbytes, the rest in `dtype`."""
    if spec.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SpecError(
            f"quantization={spec.quantization}: bitsandbytes is not installed; pip install bitsandbytes, or set it to none"
        )
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": spec.double_quantization}
    how = {"load_in_8bit": True} if spec.quantization == "int8" else {"load_in_4bit": True, **nf4}
    config = seam.library().BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **how)
    return {"quantization_config": config, "device_map": {"": device}}


def share(model: SomeModel) -> SomeModel:
    """A copy of `model` that shares its weights' storage and nothing else.

    Each parameter becomes a new one over the same storage, each buffer stays itself: the copy can be wrapped and hooked, and
    its parameters replaced. Whoever trains a parameter in place clones it first.
    """
    memo: dict[int, Any] = {id(parameter): _twin(parameter) for parameter in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    for module in model.modules():  # bitsandbytes keeps tensors beside its parameters, which are shared too
        state = getattr(module, "state", None)
        memo |= {id(held): held for held in (vars(state).values() if state else ()) if hasattr(held, "data_ptr")}
        if scales := getattr(module, "quant_state", None):
            # these are moved along with a model, so the copy gets an object of its own over the same tensors
            own = memo[id(scales)] = memo[id(module.weight)].quant_state = copy.copy(scales)
            if own.nested:
                own.state2 = copy.copy(own.state2)
    return copy.deepcopy(model, memo)


def _twin(parameter: Any) -> Parameter:
    """A Parameter over the storage of `parameter`; a quantized one keeps its type and its scales."""
    import torch

    if type(parameter) is torch.nn.Parameter:
        return torch.nn.Parameter(parameter.detach(), requires_grad=False)
    if hasattr(parameter, "SCB"):
        return type(parameter)(
            parameter.data, requires_grad=False, has_fp16_weights=False, CB=parameter.CB, SCB=parameter.SCB
        )
    twin = copy.copy(parameter)
    twin.module = None
    return twin
