"""Attaching, loading and merging by peft, the same way for every method that it has."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from .. import seam
from ..errors import SpecError
from ..spec import Resolved
from . import Target


def names(targets: list[Target]) -> list[str]:
    """What peft calls `target_modules`: the ends of names that a whole kind of module shares, else full names."""
    whole = [t for t in targets if len(t.layers) == len(t.module.layers)]
    return [t.module.name.split(".*.")[-1] for t in whole] + [n for t in targets if t not in whole for n in t.names()]


def attach(model: Any, config: Any, spec: Resolved) -> Any:
    """A PeftModel on `model`'s device whose trained parameters, and fixed ones of its own, are in `adapter_precision`."""
    import torch
    from peft import get_peft_model

    device, old = next(model.parameters()).device, _tensors(model)
    adapted = get_peft_model(model, config)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.adapter_precision]
    for number, tensor in _tensors(adapted).items():
        if number not in old:
            tensor.data = tensor.data.to(device, dtype)
    return _settled(adapted)


def _tensors(model: Any) -> dict[int, Any]:
    """Floating-point parameters and buffers by id."""
    return {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}


def load(model: Any, folder: Path) -> Any:
    """A PeftModel on `model`'s device with the adapter of `folder`, in the wider of the file's type and the base's.

    peft loads some in the base's type: a norm in bf16 would lose what it has learned. What it loads into the model's own
    tensors, such as the biases that were trained with LoRA, goes into copies of them, for their storage is shared.
    """
    import torch
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    device = next(model.parameters()).device
    config = PeftConfig.from_pretrained(str(folder))
    saved = load_file(folder / "adapter_model.safetensors")
    _copy(model, {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in saved})
    old = _tensors(model)
    relative = str(getattr(config, "init_lora_weights", "")) == "pissa"
    if relative:
        config.init_lora_weights = True
    adapted = PeftModel.from_pretrained(model, folder, config=config).to(device)
    if relative:
        leave_residual(adapted)
    added = [t for number, t in _tensors(adapted).items() if number not in old]
    at = {t.data_ptr(): t for t in added if t.numel()}
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    places = {name: at.get(t.data_ptr()) for name, t in state.items() if t.numel()}
    dtype = torch.promote_types(next(iter(saved.values())).dtype, model.dtype)
    for tensor in added:
        tensor.data = tensor.data.to(dtype)
    for name, tensor in saved.items():
        if (place := places.get(name)) is not None:
            place.data = tensor.to(device, dtype)
    return _settled(adapted)


def _copy(model: Any, names: set[str]) -> None:
    """Gives `model` tensors of its own in place of those that are named; where several modules share one, they still do."""
    import torch

    copies: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if name in names and id(tensor) not in copies:
            own = tensor.detach().clone()
            copies[id(tensor)] = torch.nn.Parameter(own, False) if isinstance(tensor, torch.nn.Parameter) else own
    for module in model.modules() if copies else ():
        for held in (module._parameters, module._buffers):
            held.update({name: copies[id(t)] for name, t in held.items() if id(t) in copies})


def leave_residual(model: Any, start: bool = False) -> None:
    """PiSSA: each adapted W keeps what its best rank-r approximation leaves, which is where A and B `start`.

    W is d_out × d_in. The top singular vectors come from the smaller of WWᵀ and WᵀW, in fp64: less work than the whole
    decomposition that peft makes.
    """
    import torch
    from peft.tuners.lora.layer import LoraLayer

    adapted: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for module in adapted:
        base, rank, scaling = module.get_base_layer(), module.r["default"], module.scaling["default"]
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


def merge(model: Any) -> Any:
    """The base with the adapter in its weights, in their type. Raises SpecError for virtual tokens.

    `safe_merge` writes new weights, since the old ones' storage is shared; a head gets a weight of its own first, or the
    embedding tied to it would change too.
    """
    if model.active_peft_config.is_prompt_learning:
        raise SpecError("virtual tokens are no part of any weight, so this adapter cannot be merged; use it as it is")
    from peft.tuners.ln_tuning.layer import LNTuningLayer

    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if hasattr(head, "get_base_layer") and head.get_base_layer().weight is embedding.weight:
        layer = head.get_base_layer()
        layer.weight = type(layer.weight)(layer.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
    norms: list[Any] = [m for m in model.modules() if isinstance(m, LNTuningLayer)]
    for norm in norms:  # which peft would leave in the adapter's type
        norm.ln_tuning_layers.to(norm.base_layer.weight.dtype)
    return model.merge_and_unload(safe_merge=True)


def _settled(model: Any) -> Any:
    """What peft leaves to the caller: norms that keep the data's type, and virtual tokens that decoding can step over."""
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from torch.nn import LayerNorm

    for module in model.modules():
        if isinstance(module, LNTuningLayer):
            module.register_forward_hook(lambda module, args, out: out.to(args[0].dtype))
            if isinstance(module.base_layer, LayerNorm):  # whose CUDA kernel takes one type for all
                for norm in module.ln_tuning_layers.values():
                    norm.register_forward_pre_hook(lambda norm, args: (args[0].to(norm.weight.dtype),))
        if hasattr(module, "init_8bit_state"):
            module.register_forward_pre_hook(_with_scales)
    if model.active_peft_config.is_prompt_learning:
        model.forward = MethodType(_steered, model)
        for name, tokens in model.prompt_tokens.items():  # else each pass copies them, and waits
            model.prompt_tokens[name] = tokens.to(next(model.parameters()).device)
    return model


def _with_scales(module: Any, args: Any) -> None:
    """On a CPU peft's DoRA makes int8 weights anew whenever it reads them, and leaves out the scales."""
    if module.weight.SCB is None:
        module.weight.SCB = module.state.SCB


def _steered(
    self: Any,
    input_ids: Any,
    attention_mask: Any = None,
    position_ids: Any = None,
    logits_to_keep: Any = 0,
    **rest: Any,
) -> Any:
    """The forward pass after virtual tokens, which count as the first positions; logits for the real tokens only.

    peft's own prepends them at every call and drops position ids, so that a batch padded on the left, or decoded token by
    token, would see other distances than in training.
    """
    import torch

    config, base, batch = self.active_peft_config, self.get_base_model(), len(input_ids)
    name = seam.cache_name()
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
            position_ids = torch.cat([torch.arange(virtual, device=device).expand(batch, -1), position_ids], 1)
    out = base(
        **inputs,
        attention_mask=attention_mask,
        position_ids=position_ids,
        logits_to_keep=logits_to_keep,
        **rest,
    )
    if first and not in_cache and isinstance(logits_to_keep, int) and not logits_to_keep:
        out.logits = out.logits[:, virtual:]
    return out
