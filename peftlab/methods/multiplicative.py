"""Methods that multiply what the frozen weights see or give: scaling (IA³) and rotation (OFT), through peft."""

from ..base.architecture import Architecture
from ..errors import SpecError
from ..spec import Resolved
from . import Drawing, Keep, Method, Target, Term, Unsuited, by_role, linear_targets, register, through_peft
from .selection import FUSED


def rotated(architecture: Architecture, spec: Resolved) -> list[Target]:
    """OFT's maps. Raises SpecError where blocks do not fill a map's inputs, Unsuited for Conv1D."""
    chosen = linear_targets(architecture, spec)
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


register(
    Method(
        "ia3",
        terms=(Term(("d_out",), roles=("key", "value", FUSED)), Term(("d_in",), roles=("down",))),
        keeps=(
            Keep(("d_out",), of="base", roles=("key", "value", FUSED)),
            Keep(("d_in",), of="factor", roles=("down",)),
        ),
        select=by_role("key", "value", "down"),
        attach=lambda model, targets, spec: through_peft.attach(
            model,
            spec,
            "IA3Config",
            **through_peft.linear(targets),
            feedforward_modules=through_peft.names([t for t in targets if t.module.role == "down"]),
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
            target_modules=through_peft.names(targets),
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
