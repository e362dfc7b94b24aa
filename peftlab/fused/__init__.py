"""The same functions in fewer operations, put in place of a model's own: norms, rotary positions, masks, maps, the loss.

Everything is made of torch's own operations, so nothing is compiled, and results differ by rounding alone. Each module is
tried out; one that is not known to do the same keeps its own operations, and `Fused.kept` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from . import attention, functions, maps
from .loss import Head, cross_entropy, head, last_map
from .maps import adjoin

if TYPE_CHECKING:
    from torch.nn import Module

    from ..spec import Resolved

SomeModel = TypeVar("SomeModel", bound="Module")

__all__ = ["Fused", "Head", "adjoin", "cross_entropy", "head", "quicken", "together", "why_not"]


@dataclass(frozen=True)
class Fused:
    """How many modules of a model were given fused operations, by kind."""

    norms: int = 0
    rotary: int = 0  # attention modules whose rotary positions are fused
    attention: int = 0  # configs whose attention takes its mask as the kernels want it
    lora: int = 0  # linear maps that are computed with their LoRA in place
    joined: int = 0  # groups of linear maps of one input that are one product
    kept: tuple[str, ...] = ()  # what keeps the model's or peft's own operations, in words

    def counts(self) -> dict[str, int]:
        """The numbers, by name."""
        return {name: getattr(self, name) for name in ("norms", "rotary", "attention", "lora", "joined")}


def quicken(model: Module, logits: bool = False) -> Fused:
    """Fuses what it knows in a private copy of a model. The copy's modules stay the same objects.

    Unless `logits` are asked for, it may give hidden states in training from then on: `cross_entropy` takes them with a `head`.
    """
    found = functions.Found(model)
    attending, other_attention = attention.take(model)
    for module, forward in (found.norms | found.rotary).items():
        maps.give_forward(module, forward)
    apart = maps.kept(model)
    groups = maps.take(model)
    last, why = (None, "") if logits else last_map(model)
    if last:
        last.__class__ = Head
    return Fused(
        norms=len(found.norms),
        rotary=len(found.rotary),
        attention=attending,
        lora=sum(len(group.updates) for group in groups),
        joined=sum(len(group.members) > 1 for group in groups),
        kept=(*found.kept, *other_attention, *apart, *([f"the loss ({why})"] if why else ())),
    )


def why_not(spec: Resolved) -> str:
    """Why nothing is fused in runs of a spec; empty where something is."""
    return "in mixed precision types differ from one operation to the next" if spec.precision == "amp" else ""


def together(base: SomeModel, adapted: Sequence[Module]) -> SomeModel | None:
    """`base`, a private copy, made to generate for several models at once: a batch has a row for the base itself, and then
    one for each of `adapted`. The base's maps are computed once for all rows, and each row gets its own LoRA.

    None where an adapted model is more than plain LoRA over this base.
    """
    updates = maps.updates(base, adapted)
    if updates is None:
        return None
    quicken(base)
    maps.add_rows(base, updates, len(adapted) + 1)
    return base
