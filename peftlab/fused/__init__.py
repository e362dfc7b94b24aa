"""The same functions in fewer operations, put in place of a model's own: norms, rotary positions, masks, linear maps and
the loss.

A model of 30 layers launches thousands of small kernels a step, and each takes longer than its arithmetic. Everything here
is torch's own operations, so nothing is compiled. Results differ from the model's own by rounding alone. What a module does
is found out by trying it, and what is not known to be the same stays as it was and is told (`Fused.kept`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import attention, functions, maps
from .loss import Head, cross_entropy, head, last_map
from .maps import adjoin

if TYPE_CHECKING:
    from ..spec import Resolved

__all__ = ["Fused", "Head", "adjoin", "cross_entropy", "head", "quicken", "together", "try_out", "why_not"]


@dataclass(frozen=True)
class Fused:
    """How many modules of a model were given fused operations, by kind."""

    norms: int = 0
    rotary: int = 0
    """Attention modules whose rotary positions are fused."""
    attention: int = 0
    """Configs whose attention takes its mask as the kernels want it."""
    lora: int = 0
    joined: int = 0
    """Groups of linear maps of one input that are one product."""
    kept: tuple[str, ...] = ()
    """What goes on by the model's or peft's own operations, in words."""

    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("norms", "rotary", "attention", "lora", "joined")}


def quicken(model: Any, logits: bool = False) -> Fused:
    """Fuses what it knows in a private copy of a model. The copy's modules stay themselves.

    Unless it is asked for its `logits`, the copy may have a `head` from then on: in training it gives hidden states then, for
    `cross_entropy`.
    """
    found = functions.Found(model)
    masks = attention.take(model)
    for module, forward in found.forwards.items():
        module.__class__ = maps.with_forward(module.__class__, forward)
    apart = list(maps.kept(model))
    sites = maps.take(model)
    last, why = (None, "") if logits else last_map(model)
    if last:
        last.__class__ = Head
    return Fused(
        norms=found.norms,
        rotary=found.rotary,
        attention=masks.taken,
        lora=sum(len(site.adapted) for site in sites),
        joined=sum(len(site.members) > 1 for site in sites),
        kept=(*found.kept(), *masks.kept(), *apart, *([f"the loss ({why})"] if why else ())),
    )


def why_not(spec: Resolved) -> str:
    """Why nothing is fused in runs of a resolved spec; empty where something is."""
    return "in mixed precision types differ from one operation to the next" if spec.precision == "amp" else ""


def try_out(model: Any) -> None:
    """Tries on numbers what `quicken` takes, so that it can be done to a model that has none."""
    functions.Found(model)


def together(base: Any, adapted: Sequence[Any]) -> Any:
    """`base`, a private copy, for batches of a row of its own and one for each of `adapted`: the base's maps once for all,
    and to each row its own LoRA. To generate with. None where an adapted model is more than plain LoRA over this base.
    """
    updates = maps.updates(base, adapted)
    if updates is None:
        return None
    quicken(base)
    maps.add_rows(base, updates, len(adapted) + 1)
    return base
