"""Bottleneck adapters, our own: narrow networks that hang on the linear maps at the border of a frozen sub-layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..base.architecture import ROLES, Architecture
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Keep, Method, Target, Term, Unsuited, by_role, in_layers, once_a_layer, register
from .through_peft import adapter_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

KRONECKER = 4  # Compacter's n, the paper's choice: how many small matrices a weight is a sum of products of


def _beside(last: Module, parent: Module, adapter: Module) -> None:
    """Adds to what a feed-forward's `last` map gives what the adapter makes of the input of its first, found by its name."""
    names = [name.rpartition(".")[2] for role in ("gate", "up", "gate+up") for name in ROLES[role]]
    children = dict(parent.named_children())
    first = next(children[name] for name in names if name in children)

    def keep(module: Module, args: tuple[Tensor, ...]) -> None:
        adapter.input = args[0]

    def add(module: Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + adapter(vars(adapter).pop("input"))  # popped, or it would hold its memory until the next pass

    first.register_forward_pre_hook(keep)
    last.register_forward_hook(add)


def beside_feed_forward(architecture: Architecture, spec: Resolved) -> list[Target]:
    once_a_layer(architecture, "gate" if architecture.with_role("gate") else "up")  # whose input the adapter reads
    return by_role("down")(architecture, spec)


def ends(architecture: Architecture, spec: Resolved) -> list[Target]:
    found = [m for m in architecture.modules if m.head] + architecture.with_role("embedding")[:1]
    if len(found) < 2:
        raise Unsuited("has no vocabulary head to put the last adapter before; use pfeiffer")
    return in_layers(found, architecture, "all")


def divided(architecture: Architecture, spec: Resolved) -> list[Target]:
    """Compacter's maps. Raises SpecError where their widths or the bottleneck are no multiple of KRONECKER."""
    chosen = by_role("attention output", "down")(architecture, spec)
    for name, size in [("bottleneck", spec.bottleneck)] + [("width", t.module.d_out) for t in chosen]:
        if size % KRONECKER:
            fix = f"; try {max(1, round(size / KRONECKER)) * KRONECKER}" if name == "bottleneck" else "; use pfeiffer"
            raise SpecError(f"{name}={size}: Compacter splits it in {KRONECKER} equal parts{fix}")
    return chosen


def attach(
    model: PreTrainedModel, targets: list[Target], spec: Resolved, beside: bool = False, kronecker: bool = False
) -> PreTrainedModel:
    """Adds a Bottleneck before a vocabulary head, `beside` the feed-forward that ends in a target, or after a target."""
    import torch

    from ._layers import Bottleneck

    device, dtype, rules = next(model.parameters()).device, adapter_dtype(spec), None
    if kronecker:
        rules = torch.nn.Parameter((torch.randn((KRONECKER,) * 3) * KRONECKER**-0.5).to(device, dtype))
    for module, name in ((t.module, name) for t in targets for name in t.names()):
        place = model.get_submodule(name)
        width = module.d_in if module.head else module.d_out
        place.adapter = adapter = Bottleneck(width, spec.bottleneck, rules).to(device, dtype)
        if module.head:
            place.register_forward_pre_hook(lambda place, args: (args[0] + place.adapter(args[0]), *args[1:]))
        elif beside:
            _beside(place, model.get_submodule(name.rpartition(".")[0]), adapter)
        else:
            place.register_forward_hook(lambda place, args, out: out + place.adapter(out))
    return model


HOULSBY = Method(
    "houlsby",
    terms=(Term(("bottleneck", "d_out"), 2), Term(("bottleneck",)), Term(("d_out",))),
    keeps=(Keep(("d_out",)), Keep(("bottleneck",), 2)),  # its input, and what goes into and comes out of GELU
    select=by_role("attention output", "down"),
    attach=attach,
    drawing=Drawing(("sub-layer", "*down", "~GELU", "*up"), leaves=1, joins=4),
    settings=("bottleneck", "layers", "adapter_precision"),
    defaults={"learning_rate": 3e-3},
)
register(
    HOULSBY,
    replace(
        HOULSBY,
        key="pfeiffer",
        select=by_role("down"),
        drawing=Drawing(("feed-forward", "*down", "~GELU", "*up"), leaves=1, joins=4),
    ),
    replace(
        HOULSBY,
        key="parallel",
        select=beside_feed_forward,
        attach=partial(attach, beside=True),
        drawing=Drawing(("feed-forward",), ("*down", "~GELU", "*up"), leaves=0, joins=1),
        defaults={"learning_rate": 1e-2},
    ),
    replace(
        HOULSBY,
        key="post-attention",
        select=by_role("attention output"),
        drawing=Drawing(("attention", "*down", "~GELU", "*up"), leaves=1, joins=4),
    ),
    replace(
        HOULSBY,
        key="io-adapter",
        terms=(
            Term(("bottleneck", "d_out"), 2, roles=("embedding",)),
            Term(("d_out",), roles=("embedding",)),
            Term(("bottleneck", "d_in"), 2, roles=("head",)),
            Term(("d_in",), roles=("head",)),
            Term(("bottleneck",)),
        ),
        keeps=(Keep(("d_out",), roles=("embedding",)), Keep(("d_in",), roles=("head",)), Keep(("bottleneck",), 2)),
        select=ends,
        drawing=Drawing(("embedding", "*adapter", "every block", "*adapter", "head")),
        settings=("bottleneck", "adapter_precision"),
        defaults={"learning_rate": 1e-2},
    ),
    replace(
        HOULSBY,
        key="compacter",
        terms=(Term(("d_out",), 3), Term(("bottleneck",), 3)),  # down: d + m + m biases, up: m + d + d biases
        keeps=(*HOULSBY.keeps, Keep(("d_out", "bottleneck"), 3, each="module")),  # the weights, multiplied out
        shared={"rules": (KRONECKER,) * 3},
        select=divided,
        attach=partial(attach, kronecker=True),
        drawing=Drawing(("sub-layer", "*Σ A⊗B", "~GELU", "*Σ A⊗B"), leaves=1, joins=4),
        defaults={"learning_rate": 1e-2},
    ),
)
