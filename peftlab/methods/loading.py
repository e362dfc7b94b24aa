"""Adapters that peft saved, here or elsewhere, put on a private copy of a base whose own tensors stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .through_peft import ADDING, _settled, _tensors, check_names, leave_residual, own_tensors

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
"""peft's names of an adapter's files."""
FROM_NOTHING = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base alone; others take W apart and leave it a residual."""


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A PeftModel on `model`'s device with the adapter of `folder`, in the wider of the file's type and the base's.

    peft loads some numbers in the base's type: a norm in bf16 would lose what it has learned. Whole modules and tokens take
    the place of the base's own, and stay in its type. What is loaded into the model's own tensors, such as biases, goes into
    copies of them, because their storage is shared. Raises OSError, ValueError, KeyError, TypeError or RuntimeError for
    files that do not fit.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils.other import AuxiliaryTrainingWrapper
    from safetensors.torch import load_file

    device = next(model.parameters()).device
    config = config_of(folder)
    saved = load_file(folder / TENSORS)
    before = _own_what_it_changes(model, config, saved)
    old = _tensors(model)
    is_pissa = str(getattr(config, "init_lora_weights", "")).startswith("pissa")
    if is_pissa:
        config.init_lora_weights = True  # type: ignore[attr-defined]
    adapted = PeftModel.from_pretrained(model, folder, config=config).to(device)
    if is_pissa:
        leave_residual(adapted)
    _share_again(adapted, before)
    whole = [m for m in adapted.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    in_place = {id(t) for wrapper in whole for t in _tensors(wrapper).values()}
    added = [t for number, t in _tensors(adapted).items() if number not in old and number not in in_place]
    at = {t.data_ptr(): t for t in added if t.numel()}
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_names(saved.keys() - adapted.state_dict(), state.keys() - adapted.state_dict())
    places = {name: at.get(t.data_ptr()) for name, t in state.items() if t.numel()}
    wider = torch.promote_types(next(iter(saved.values())).dtype, model.dtype)
    for tensor in added:
        tensor.data = tensor.data.to(wider)
    for name, tensor in saved.items():
        if (place := places.get(name)) is not None:
            place.data = tensor.to(device, wider)
    return _settled(adapted)


def _own_what_it_changes(
    model: PreTrainedModel, config: PeftConfig, names: Iterable[str]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Gives a copy clones of the base's tensors that the adapter's file names, or that putting it on may change.

    Returns the parameters that were cloned for the second reason, each with the base's own tensor.
    """
    named = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in names}
    own_tensors(model, named)
    adds = config.peft_type in ADDING and getattr(config, "init_lora_weights", None) in FROM_NOTHING
    if adds or str(getattr(config, "init_lora_weights", "")).startswith("pissa"):  # the residual is written anew
        return []
    before = []
    for name, parameter in model.named_parameters():
        if name not in named and parameter.is_floating_point():
            before.append((parameter, parameter.data))
            parameter.data = parameter.data.clone()
    return before


def _share_again(model: nn.Module, before: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Gives parameters that are as they were the base's storage back."""
    for parameter, tensor in before:
        if parameter.shape == tensor.shape and parameter.data.equal(tensor):
            parameter.data = tensor


def config_of(folder: Path) -> PeftConfig:
    """The adapter's own settings, without those that `unknown` allows. Raises ValueError for what this peft cannot do."""
    import peft

    said = json.loads((folder / CONFIG).read_text())
    odd = unknown(folder)
    if changing := [f"{name}={value!r}" for name, value in odd.items() if value]:
        raise ValueError(
            f"{CONFIG} has {', '.join(changing)}, which peft {peft.__version__} does not know and which may change what the "
            "adapter does; pip install -U peft"
        )
    kind = _kind(said)
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in said.items() if name in known})


def unknown(folder: Path) -> dict[str, Any]:
    """The settings in an adapter's file that the installed peft does not know, by name."""
    said = json.loads((folder / CONFIG).read_text())
    known = {field.name for field in fields(_kind(said))}
    return {name: value for name, value in said.items() if name not in known and not name.endswith("version")}


def _kind(said: dict[str, Any]) -> type[PeftConfig]:
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as KINDS

    try:
        return KINDS[said.get("peft_type")]  # type: ignore[index]
    except KeyError:
        raise ValueError(
            f"{CONFIG} has peft_type={said.get('peft_type')}, which peft {peft.__version__} does not have; pip install -U peft"
        ) from None
