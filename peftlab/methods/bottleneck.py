"""Bottleneck adapters, our own: narrow networks that hang on the linear maps at the border of a frozen sub-layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..base import architecture as architectures
from ..base import modules as shapes
from ..base.architecture import Architecture
from ..base.roles import nearest
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Keep, Method, Target, Term, Unsuited, by_role, in_layers, register, through_peft
from .through_peft import adapter_dtype

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

KRONECKER = 4  # Compacter's n, the paper's choice: how many small matrices a weight is a sum of products of


def _beside(place: Module, first: Module, adapter: Module) -> None:
    """Adds to what `place`, the end of a feed-forward, gives what the adapter makes of the input of its `first` module."""

    def keep(module: Module, args: tuple[Tensor, ...]) -> None:
        adapter.input = args[0]

    def add(module: Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + adapter(vars(adapter).pop("input"))  # popped, or it would hold its memory until the next pass

    first.register_forward_pre_hook(keep)
    place.register_forward_hook(add)


def _first(architecture: Architecture, target: Target, layer: int) -> str:
    """Name of the module that reads the input of the feed-forward which ends in `target`."""
    module = target.module
    wide = [m for m in architecture.with_role("gate", "up") if m.kind == module.kind and m.stack == module.stack]
    first = nearest(module.parent, [m for m in wide if layer in m.layers] or wide)[0]
    return _place(replace(first, layers=(layer,)))[0]


def _place(module: shapes.Module) -> list[str]:
    """Names of the modules whose output is the map's; experts give theirs together."""
    names = [name for _, name in module.names()]
    return [name.rpartition(".")[0] for name in names] if module.kind == "experts" else names


def ends(architecture: Architecture, spec: Resolved) -> list[Target]:
    found = [m for m in architecture.modules if m.head] + architecture.with_role("embedding")[:1]
    if len(found) < 2:
        raise Unsuited("has no vocabulary head to put the last adapter before; use pfeiffer")
    return in_layers(found, architecture, "all")


def divided(architecture: Architecture, spec: Resolved) -> list[Target]:
    """Compacter's maps. Raises SpecError where their widths or the bottleneck are no multiple of KRONECKER."""
    chosen = by_role("attention output", "down")(architecture, spec)
    for name, size in [("bottleneck", spec.bottleneck)] + [("width", t.module.width) for t in chosen]:
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
    through_peft.own_tensors(model, through_peft.classifiers(targets), train=True)
    for target, layer in ((t, n) for t in targets if not t.module.classifier for n in t.layers or (0,)):
        module = target.module
        (name,) = _place(replace(module, layers=(layer,) if module.layers else ()))
        place = model.get_submodule(name)
        width = module.d_in if module.head else module.width
        place.adapter = adapter = Bottleneck(width, spec.bottleneck, rules).to(device, dtype)
        if module.head:
            place.register_forward_pre_hook(lambda place, args: (args[0] + place.adapter(args[0]), *args[1:]))
        elif beside:
            first = _first(architectures.of(spec.model), target, layer)
            _beside(place, model.get_submodule(first), adapter)
        else:
            place.register_forward_hook(lambda place, args, out: out + place.adapter(out))
    return model


HOULSBY = Method(
    "houlsby",
    terms=(Term(("bottleneck", "width"), 2), Term(("bottleneck",)), Term(("width",))),
    keeps=(Keep(("width",)), Keep(("bottleneck",), 2)),  # its input, and what goes into and comes out of GELU
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
        select=by_role("down"),
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
        terms=(Term(("width",), 3), Term(("bottleneck",), 3)),  # down: d + m + m biases, up: m + d + d biases
        keeps=(*HOULSBY.keeps, Keep(("width", "bottleneck"), 3, each="module")),  # the weights, multiplied out
        shared={"rules": (KRONECKER,) * 3},
        select=divided,
        attach=partial(attach, kronecker=True),
        drawing=Drawing(("sub-layer", "*Σ A⊗B", "~GELU", "*Σ A⊗B"), leaves=1, joins=4),
        defaults={"learning_rate": 1e-2},
    ),
)
