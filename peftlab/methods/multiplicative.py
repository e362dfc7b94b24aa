"""Methods that multiply what the frozen weights see or give: scaling (IA³) and rotation (OFT), through peft."""

from ..base.architecture import Architecture
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Keep, Method, Target, Term, Unsuited, in_layers, maps_alone, register, through_peft, with_roles
from .selection import MAKES_KEYS


def rotated(architecture: Architecture, spec: Resolved) -> list[Target]:
    """OFT's maps. Raises SpecError where blocks do not fill a map's inputs, Unsuited for Conv1D."""
    chosen = maps_alone(architecture, spec)
    if any(t.module.kind == "conv1d" for t in chosen):
        raise Unsuited("stores its linear maps as Conv1D, which OFT in peft does not take; use lora, or another model")
    size = spec.block_size
    for t in chosen:
        if t.module.d_in % size:
            fits = [n for n in range(2, t.module.d_in + 1) if all(c.module.d_in % n == 0 for c in chosen)]
            near = min(fits, key=lambda n: abs(n - size), default=1)
            raise SpecError(
                f"block-size={size}: {t.module.short_name} has {t.module.d_in} inputs, which blocks of {size} do not "
                f"fill; try {near}"
            )
    return chosen


def scaled(architecture: Architecture, spec: Resolved) -> list[Target]:
    """IA³'s maps: what makes keys and values, and the last of each feed-forward that is a linear map of its own."""
    found = with_roles(architecture, "key", "value", "down")
    return in_layers([m for m in found if m.is_linear], architecture, spec.layers)


register(
    Method(
        "ia3",
        terms=(Term(("d_out",), roles=MAKES_KEYS), Term(("d_in",), roles=("down",))),
        keeps=(
            Keep(("d_out",), of="base", roles=MAKES_KEYS),
            Keep(("d_in",), of="factor", roles=("down",)),
        ),
        select=scaled,
        attach=lambda model, targets, spec: through_peft.attach(
            model,
            spec,
            "IA3Config",
            **through_peft.linear(model, targets),
            feedforward_modules=through_peft.names(model, [t for t in targets if t.module.role == "down"]),
        ),
        merge=through_peft.merge,
        drawing=Drawing(("W of keys, values", "*× l")),
        settings=("layers", "adapter_precision"),
        defaults={"learning_rate": 3e-2},
    ),
    Method(
        "oft",
        terms=(Term(("d_in", "block_size"), 0.5), Term(("d_in",), -0.5)),  # b(b − 1)/2 for each of d_in/b blocks
        keeps=(Keep(("d_in",), of="input"), Keep(("d_in", "block_size"), 4, each="module")),  # Cayley's Neumann series
        select=rotated,
        attach=lambda model, targets, spec: through_peft.attach(
            model,
            spec,
            "OFTConfig",
            target_modules=through_peft.names(model, targets),
            r=0,
            oft_block_size=spec.block_size,
            module_dropout=spec.dropout,
        ),
        merge=through_peft.merge,
        drawing=Drawing(("*rotation", "W")),
        settings=("block_size", "dropout", "target_modules", "layers", "adapter_precision"),
        defaults={"learning_rate": 3e-4},
    ),
)
