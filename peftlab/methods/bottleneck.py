"""Bottleneck adapters, our own: a narrow network down and up again, in series with or beside a frozen sub-layer.

The up projection starts at zero, so that an adapter starts as the exact identity (Houlsby et al., section 2.1, ask for a
near one). Modules are reached by hooks on the linear maps at a sub-layer's border, whatever the model calls the sub-layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..base.architecture import Architecture
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Keep, Method, Target, Term, Unsuited, in_layers, once_a_layer, register

KRONECKER = 4
"""Compacter's n: how many small matrices a weight is a sum of products of. The paper's choice."""


def _serial(module: Any, adapter: Any) -> None:
    module.adapter = adapter
    module.register_forward_hook(lambda module, args, out: out + module.adapter(out))


def _at_input(module: Any, adapter: Any) -> None:
    module.adapter = adapter
    module.register_forward_pre_hook(lambda module, args: (args[0] + module.adapter(args[0]), *args[1:]))


def _beside(reader: Any, writer: Any, adapter: Any) -> None:
    """What goes into `reader` goes through the adapter too, and is added to what comes out of `writer`."""
    writer.adapter = adapter

    def keep(module: Any, args: Any) -> None:
        adapter.input = args[0]

    def add(module: Any, args: Any, out: Any) -> Any:
        x, adapter.input = adapter.input, None  # else it would hold its memory until the next pass
        return out + adapter(x)

    reader.register_forward_pre_hook(keep)
    writer.register_forward_hook(add)


def at(*roles: str) -> Any:
    """Selects the modules of `roles`, one of each in every chosen layer."""

    def select(architecture: Architecture, spec: Resolved) -> list[Target]:
        return in_layers(once_a_layer(architecture, *roles), architecture, spec.layers)

    return select


def beside_feed_forward(architecture: Architecture, spec: Resolved) -> list[Target]:
    once_a_layer(architecture, "gate" if architecture.with_role("gate") else "up")  # whose input the adapter reads
    return at("down")(architecture, spec)


def ends(architecture: Architecture, spec: Resolved) -> list[Target]:
    found = [m for m in architecture.modules if m.head] + architecture.with_role("embedding")[:1]
    if len(found) < 2:
        raise Unsuited("has no vocabulary head to put the last adapter before; use pfeiffer")
    return in_layers(found, architecture, "all")


def divided(architecture: Architecture, spec: Resolved) -> list[Target]:
    chosen = at("attention output", "down")(architecture, spec)
    for name, size in [("bottleneck", spec.bottleneck)] + [("width", t.module.d_out) for t in chosen]:
        if size % KRONECKER:
            fix = f"; try {max(1, round(size / KRONECKER)) * KRONECKER}" if name == "bottleneck" else "; use pfeiffer"
            raise SpecError(f"{name}={size}: Compacter splits it in {KRONECKER} equal parts{fix}")
    return chosen


def attach(model: Any, targets: list[Target], spec: Resolved) -> Any:
    _each(model, targets, spec, lambda module, name, adapter: _serial(module, adapter))
    return model


def attach_parallel(model: Any, targets: list[Target], spec: Resolved) -> Any:
    modules = dict(model.named_modules())

    def place(module: Any, name: str, adapter: Any) -> None:
        _beside(_reader(modules, name), module, adapter)

    _each(model, targets, spec, place)
    return model


def _reader(modules: Any, writer: str) -> Any:
    """The first module beside `writer`, by the names that gate and up have."""
    from ..base.architecture import ROLES

    parent = writer.rpartition(".")[0]
    ends = [n.rpartition(".")[2] for role in ("gate", "up", "gate+up") for n in ROLES[role]]
    return next(modules[f"{parent}.{end}"] for end in ends if f"{parent}.{end}" in modules)


def attach_ends(model: Any, targets: list[Target], spec: Resolved) -> Any:
    def place(module: Any, name: str, adapter: Any) -> None:
        (_at_input if module is model.get_output_embeddings() else _serial)(module, adapter)

    _each(model, targets, spec, place)
    return model


def attach_compacter(model: Any, targets: list[Target], spec: Resolved) -> Any:
    import torch

    start = torch.randn(KRONECKER, KRONECKER, KRONECKER) * KRONECKER**-0.5
    rules = torch.nn.Parameter(start.to(next(model.parameters()).device, _dtype(spec)))
    _each(model, targets, spec, lambda module, name, adapter: _serial(module, adapter), rules)
    return model


def _dtype(spec: Resolved) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[spec.adapter_precision]


def _each(model: Any, targets: Sequence[Target], spec: Resolved, place: Any, rules: Any = None) -> None:
    from .layers import Bottleneck

    modules, device = dict(model.named_modules()), next(model.parameters()).device
    for t in targets:
        width = t.module.d_in if t.module.head else t.module.d_out
        for name in t.names():
            place(modules[name], name, Bottleneck(width, spec.bottleneck, rules).to(device, _dtype(spec)))


def _register(key: str, **rest: Any) -> None:
    usual: dict[str, Any] = {
        "terms": (Term(("bottleneck", "d_out"), 2), Term(("bottleneck",)), Term(("d_out",))),
        "keeps": (Keep(("d_out",)), Keep(("bottleneck",), 2)),  # its input, and what goes into and comes out of GELU
        "attach": attach,
        "drawing": Drawing(("sub-layer", "*down", "~GELU", "*up"), leaves=1, joins=4),
        "settings": ("bottleneck", "layers", "adapter_precision"),
        "defaults": {"learning_rate": 3e-3},
    }
    register(Method(key, **{**usual, **rest}))


_register("houlsby", select=at("attention output", "down"))
_register("pfeiffer", select=at("down"), drawing=Drawing(("feed-forward", "*down", "~GELU", "*up"), leaves=1, joins=4))
_register(
    "parallel",
    select=beside_feed_forward,
    attach=attach_parallel,
    drawing=Drawing(("feed-forward",), ("*down", "~GELU", "*up"), leaves=0, joins=1),
    defaults={"learning_rate": 1e-2},
)
_register(
    "post-attention",
    select=at("attention output"),
    drawing=Drawing(("attention", "*down", "~GELU", "*up"), leaves=1, joins=4),
)
_register(
    "io-adapter",
    terms=(
        Term(("bottleneck", "d_out"), 2, roles=("embedding",)),
        Term(("d_out",), roles=("embedding",)),
        Term(("bottleneck", "d_in"), 2, roles=("head",)),
        Term(("d_in",), roles=("head",)),
        Term(("bottleneck",)),
    ),
    keeps=(
        Keep(("d_out",), roles=("embedding",)),
        Keep(("d_in",), roles=("head",)),
        Keep(("bottleneck",), 2),
    ),
    select=ends,
    attach=attach_ends,
    drawing=Drawing(("embedding", "*adapter", "every block", "*adapter", "head")),
    settings=("bottleneck", "adapter_precision"),
    defaults={"learning_rate": 1e-2},
)
_register(
    "compacter",
    terms=(Term(("d_out",), 3), Term(("bottleneck",), 3)),  # down: d + m + m biases, up: m + d + d biases
    keeps=(
        Keep(("d_out",)),
        Keep(("bottleneck",), 2),
        Keep(("d_out", "bottleneck"), 3, each="module"),  # the weights, multiplied out
    ),
    shared={"rules": (KRONECKER,) * 3},
    select=divided,
    attach=attach_compacter,
    drawing=Drawing(("sub-layer", "*Σ A⊗B", "~GELU", "*Σ A⊗B"), leaves=1, joins=4),
    defaults={"learning_rate": 1e-2},
)
