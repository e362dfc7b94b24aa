"""Which names peft reads otherwise in a family: of experts that transformers 5 has fused, and of modules that it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTER = "gate"
"""peft's name of a mixture's router, which no longer is a linear map: it gets no adapter here."""


def rewritten(model: PreTrainedModel) -> dict[str, str]:
    """End of a linear map's name in transformers 4 → the parameter of all experts in which LoRA finds it now."""
    from peft.utils import transformers_weight_conversion

    conversion: Any = transformers_weight_conversion
    kind = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type, "")
    if conversion.get_checkpoint_conversion_mapping(model.config.model_type) is None:
        return {}
    return {old: new for old, new in conversion._MOE_TARGET_MODULE_MAPPING.get(kind, {}).items() if old != ROUTER}


def refused(model: PreTrainedModel) -> tuple[str, ...]:
    """Ends of the names of linear maps to which peft attaches no LoRA, such as Mamba's, which a fused kernel reads."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    def is_refused(name: str) -> bool:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, name)
        except ValueError:
            return True
        return False

    names = dict.fromkeys(name.rpartition(".")[2] for name, _ in model.named_modules())
    return tuple(filter(is_refused, names))
