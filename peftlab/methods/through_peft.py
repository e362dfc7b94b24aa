"""Attaching, loading and merging by peft, the same way for every method that it has."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from .. import seam
from ..errors import SpecError
from ..spec import Resolved
from .selection import Target

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, dtype, nn
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

ADDING = (
    "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "LORA", "ADALORA", "IA3", "VERA", "OFT", "BOFT",
    "LOHA", "LOKR", "LN_TUNING", "TRAINABLE_TOKENS",
)  # fmt: skip
"""peft's kinds of adapter that never write into a base's weights where they are."""


def names(model: nn.Module, targets: list[Target]) -> list[str]:
    """What peft calls `target_modules`: ends of names where all that end so are chosen, else full names.

    A classifier is none of them: peft trains it whole, by itself.
    """
    adapted = [t for t in targets if not t.module.classifier]
    chosen = {name for t in adapted for name in t.names()}
    others = {name for name, _ in (*model.named_modules(), *model.named_parameters())} - chosen
    found: list[str] = []
    for target in adapted:
        end = target.module.name.split(".*.")[-1]
        alone = not any(f".{name}".endswith(f".{end}") for name in others)
        found += [end] if alone else target.names()
    return found


def classifiers(targets: list[Target]) -> list[str]:
    """Full names of the parameters of a classifier."""
    return [own for t in targets if t.module.classifier for own in t.module.own_names(t.module.name)]


def linear(model: nn.Module, targets: list[Target]) -> dict[str, Any]:
    """What peft's configs of adapters on linear maps and embeddings have in common."""
    maps = [t for t in targets if t.module.kind != "experts"]
    transposed = any(t.module.kind == "conv1d" for t in maps)
    return {"target_modules": names(model, maps), "fan_in_fan_out": transposed}


def experts(model: nn.Module, targets: list[Target], spec: Resolved) -> dict[str, Any]:
    """What peft's config of LoRA says of experts' parameters: a gate and an up projection in one get twice the rank."""
    own = [t for t in targets if t.module.kind == "experts"]
    times = {re.escape(name): t.module.ranks for t in own if t.module.ranks > 1 for name in names(model, [t])}
    return {
        "target_parameters": names(model, own) or None,
        "rank_pattern": {name: n * spec.rank for name, n in times.items()},
        "alpha_pattern": {name: n * spec.alpha for name, n in times.items()},
    }


def adapter_dtype(spec: Resolved) -> dtype:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.adapter_precision]


def attach(model: PreTrainedModel, spec: Resolved, config: str, **settings: object) -> PeftModel:
    """A PeftModel by peft's `config` and its settings, on `model`'s device. Its own numbers are in `adapter_precision`."""
    import peft

    device, old = next(model.parameters()).device, _tensors(model)
    made: PeftConfig = getattr(peft, config)(task_type=task_type(model), **settings)
    adapted = cast("PeftModel", peft.get_peft_model(model, made))
    for number, tensor in _tensors(adapted).items():
        if number not in old:
            tensor.data = tensor.data.to(device, adapter_dtype(spec))
    return _settled(adapted)


def task_type(model: PreTrainedModel) -> str:
    """peft's name of what the model is for."""
    if seam.is_classifier(model):
        return "SEQ_CLS"
    if not hasattr(model, "prepare_inputs_for_generation"):  # it fills gaps in a text
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _tensors(model: nn.Module) -> dict[int, Tensor]:
    """Floating-point parameters and buffers by id."""
    return {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}


def _named(module: nn.Module, recurse: bool = True) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by all of their names."""
    return [*module.named_parameters("", recurse, False), *module.named_buffers("", recurse, False)]


def check_names(saved: Collection[str], own: Collection[str]) -> None:
    """Raises ValueError for a tensor that only an adapter's file or only the model has; peft would merely warn of it."""
    if odd := set(saved) ^ set(own):
        raise ValueError(f"{min(odd)} is in the {'adapter' if min(odd) in saved else 'model'} only")


def own_tensors(
    model: nn.Module, names: Collection[str], train: bool = False, only: Iterable[nn.Module] | None = None
) -> None:
    """Gives `model` clones of the named parameters and buffers, trained where they are to `train`.

    Every module that holds one of them gets the same clone, so that tied modules stay tied; with `only`, just those modules.
    """
    import torch

    clones: dict[int, Tensor] = {}
    for name, tensor in _named(model):
        if name in names and id(tensor) not in clones:
            own = tensor.detach().clone()
            clones[id(tensor)] = torch.nn.Parameter(own, train) if isinstance(tensor, torch.nn.Parameter) else own
    for module in (only or model.modules()) if clones else ():
        for name, tensor in _named(module, recurse=False):
            if id(tensor) in clones:
                setattr(module, name, clones[id(tensor)])


def leave_residual(model: nn.Module, start: bool = False) -> None:
    """PiSSA: each adapted W keeps what its best approximation of rank r leaves. With `start`, A and B are set to that.

    W is d_out × d_in. The top singular vectors come from the smaller of WWᵀ and WᵀW, in fp64, which is less work than the
    whole decomposition that peft makes.
    """
    import torch
    from peft.tuners.lora.layer import LoraLayer

    for module in (m for m in model.modules() if isinstance(m, LoraLayer)):
        base, rank, scaling = cast("nn.Linear", module.get_base_layer()), module.r["default"], module.scaling["default"]
        stored = base.weight.data
        w = (stored.T if module.fan_in_fan_out else stored).double()
        wide = w.shape[0] <= w.shape[1]
        values, vectors = torch.linalg.eigh(w @ w.T if wide else w.T @ w)
        top, root = vectors[:, -rank:], values[-rank:].clamp(min=1e-30).pow(0.25)  # √σ
        b, a = (top * root, (top.T @ w) / root[:, None]) if wide else ((w @ top) / root, top.T * root[:, None])
        left = w - b @ a
        base.weight.data = (left.T if module.fan_in_fan_out else left).to(stored.dtype).contiguous()
        if start:
            for side, matrix in ((module.lora_A, a), (module.lora_B, b)):
                weight = side["default"].weight
                weight.data = (matrix / scaling**0.5).to(weight.dtype)


def merge(model: nn.Module) -> nn.Module:
    """The base of a PeftModel with the adapter in its weights, in their type. Raises SpecError for virtual tokens.

    `safe_merge` writes new weights, because the old ones' storage is shared; where a kind of adapter is not known to do so,
    adapted modules get weights of their own first. A head that is tied to the embedding gets one where either is adapted.
    """
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from torch.nn import Module

    adapted = cast("PeftModel", model)
    if adapted.active_peft_config.is_prompt_learning:
        raise SpecError("virtual tokens are no part of any weight, so this adapter cannot be merged; use it as it is")
    base = cast("PreTrainedModel", adapted.get_base_model())
    inside = {id(layer): layer for m in base.modules() if isinstance(layer := getattr(m, "base_layer", None), Module)}
    if _untie(base, inside):
        base.config.tie_word_embeddings = False
    if adapted.active_peft_config.peft_type not in ADDING:
        for parameter in (p for layer in inside.values() for p in layer.parameters()):
            parameter.data = parameter.data.clone()
    for norm in (m for m in adapted.modules() if isinstance(m, LNTuningLayer)):
        # peft would leave it in the adapter's type
        norm.ln_tuning_layers.to(norm.get_base_layer().get_parameter("weight").dtype)
    return adapted.merge_and_unload(safe_merge=True)


def _untie(base: nn.Module, adapted: Collection[int]) -> bool:
    """Gives each module with a weight that an adapted one has too a weight of its own; whether there was one."""
    holders: dict[int, list[nn.Module]] = {}
    for module in base.modules():
        if (weight := module._parameters.get("weight")) is not None:
            holders.setdefault(id(weight), []).append(module)
    tied = [modules for modules in holders.values() if len(modules) > 1 and any(id(m) in adapted for m in modules)]
    for module in (module for modules in tied for module in modules[1:]):
        weight = module.get_parameter("weight")
        module.weight = type(weight)(weight.detach().clone(), requires_grad=False)
    return bool(tied)


def _settled(model: PeftModel) -> PeftModel:
    """Does what peft leaves to the caller: norms keep the data's type, and decoding can step over virtual tokens."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from torch.nn import LayerNorm

    for module in model.modules():
        if isinstance(module, LNTuningLayer):
            module.register_forward_hook(lambda module, args, out: out.to(args[0].dtype))
            if isinstance(module.base_layer, LayerNorm):  # its CUDA kernel takes one type for all tensors
                for norm in module.ln_tuning_layers.values():
                    norm.register_forward_pre_hook(lambda norm, args: (args[0].to(norm.weight.dtype),))
        if hasattr(module, "init_8bit_state"):
            module.register_forward_pre_hook(_with_scales)
    if model.active_peft_config.is_prompt_learning:
        model.forward = MethodType(_steered, model)  # type: ignore[method-assign]
        for name, tokens in model.prompt_tokens.items():  # otherwise each pass copies them to the device, and waits
            model.prompt_tokens[name] = tokens.to(next(model.parameters()).device)
    return model


def _with_scales(module: Any, args: tuple[Tensor, ...]) -> None:
    """On a CPU peft's DoRA makes int8 weights anew whenever it reads them, and leaves out the scales."""
    if module.weight.SCB is None:
        module.weight.SCB = module.state.SCB


def _steered(
    self: PeftModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    **rest: Any,
) -> CausalLMOutput:
    """The forward pass after virtual tokens, which take the first positions; it gives logits of the real tokens only.

    peft's own forward prepends them at every call and drops position ids, so that a batch padded on the left, or decoded
    token by token, would see other distances than in training.
    """
    import torch

    config, base = self.active_peft_config, cast("PreTrainedModel", self.get_base_model())
    batch, name = len(input_ids), seam.cache_name()
    virtual, first, device = config.num_virtual_tokens, rest.get(name) is None, input_ids.device
    in_cache = config.peft_type == "PREFIX_TUNING"
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask.new_ones(batch, virtual), attention_mask], 1)
    if position_ids is not None:
        position_ids = position_ids + virtual
    inputs = {"input_ids": input_ids}
    if first and in_cache:
        rest[name] = self.get_prompt(batch)
    elif first:
        embedded = base.get_input_embeddings()(input_ids)
        inputs = {"inputs_embeds": torch.cat([self.get_prompt(batch).to(embedded.dtype), embedded], 1)}
        if position_ids is not None:
            ahead = seam.first_position(base) + torch.arange(virtual, device=device)
            position_ids = torch.cat([ahead.expand(batch, -1), position_ids], 1)
    rest |= {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
    out = base(**seam.taken(base, {**inputs, **rest}))
    if first and not in_cache and isinstance(logits_to_keep, int) and not logits_to_keep:
        out.logits = out.logits[:, virtual:]
    return out
