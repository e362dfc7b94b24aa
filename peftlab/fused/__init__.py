"""The same functions in fewer operations, put in place of a model's own: norms, rotary positions, masks, maps, the loss.

Everything is made of torch's own operations, so nothing is compiled, and results differ by rounding alone. Each module is
tried out, and then the whole model (`trial`); what is not known to do the same stays, and `Fused.kept` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from . import attention, functions, maps, trial
from .loss import Head, cross_entropy, head, last_map
from .maps import adjoin

if TYPE_CHECKING:
    from torch.nn import Module

    from ..spec import Resolved

SomeModel = TypeVar("SomeModel", bound="Module")
Taken: TypeAlias = "tuple[dict[str, int], list[str]]"

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
    fitting = trial.fitting(model, KINDS)
    said = [KINDS[kind](model) for kind in fitting]
    kept = [f"{kind} (tried, they gave other logits)" for kind in KINDS if kind not in fitting]
    last, why = (None, "") if logits else last_map(model)
    if last:
        last.__class__ = Head
    counts = {name: n for of_kind, _ in said for name, n in of_kind.items()}
    kept += [*(what for _, others in said for what in others), *([f"the loss ({why})"] if why else ())]
    return Fused(**counts, kept=tuple(kept))


def _functions(model: Module) -> Taken:
    found = functions.Found(model)
    for module, forward in (found.norms | found.rotary).items():
        maps.give_forward(module, forward)
    return {"norms": len(found.norms), "rotary": len(found.rotary)}, found.kept


def _attention(model: Module) -> Taken:
    attending, others = attention.take(model)
    return {"attention": attending}, others


def _maps(model: Module) -> Taken:
    apart, groups = maps.kept(model), maps.take(model)
    adapted, joined = (sum(len(g.updates) for g in groups), sum(len(g.members) > 1 for g in groups))
    return {"lora": adapted, "joined": joined}, apart


KINDS = {"norms and rotary positions": _functions, "masks": _attention, "linear maps": _maps}
"""What fuses the operations of a kind in a private copy, and says of how many modules, and what it leaves as it is."""


def why_not(spec: Resolved) -> str:
    """Why nothing is fused in runs of a spec; empty where something is."""
    return "in mixed precision types differ from one operation to the next" if spec.precision == "amp" else ""


def together(base: SomeModel, adapted: Sequence[Module]) -> SomeModel | None:
    """`base`, a private copy, made to generate for several models at once: a batch has a row for the base itself, and then
    one for each of `adapted`. The base's maps are computed once for all rows, and each row gets its own LoRA.

    None where an adapted model is more than plain LoRA over this base, and where a try gives a row other logits than its own
    model does: a family may lay the tokens of all rows in one line, or bring them in another order.
    """
    updates = maps.updates(base, adapted)
    if updates is None:
        return None

    def fuse() -> None:
        quicken(base)
        maps.add_rows(base, updates, len(adapted) + 1)

    return base if trial.answers_for(base, adapted, fuse) else None
