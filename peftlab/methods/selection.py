"""Which modules of a model a method trains, and how that is said in words."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..base import architecture as architectures
from ..base.architecture import Architecture, Module
from ..errors import SpecError
from ..spec import Resolved, parse_layers

FUSED = ("query+key+value", "key+value")
"""Roles of projections that make keys and values at once, the first queries too."""
MAKES_KEYS = ("key", "value", *FUSED)
WHERE = {"all-linear": "every linear layer", "query,value": "q and v", "q_proj,v_proj": "q and v"}
"""Target modules that have a name of their own."""
USUAL_RANK = 8
RANK_LIMITS: dict[str, tuple[Callable[[Iterable[int]], int], str]] = {
    "largest": (max, "no adapted matrix has a rank above"),
    "smallest": (min, "the smallest adapted matrix has rank"),
}
RANK_REFUSAL = "rank={rank}: {which} {limit}, so a larger update is wasted; try {usual}, or {limit} at most"
"""The page fills the same words."""


@dataclass(frozen=True)
class Target:
    """A kind of module and the layers of it that a method trains."""

    module: Module
    layers: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.layers) if self.module.layers else 1

    def names(self) -> list[str]:
        """Full dotted names of the modules."""
        return [name for layer, name in self.module.names() if layer is None or layer in self.layers]


class Unsuited(SpecError):
    """Raised by a method's `select`: what the model has or lacks, and the fix, to be read after the model's name."""


def in_layers(modules: list[Module], architecture: Architecture, layers: str) -> list[Target]:
    """`modules` within the chosen layers of each stack; ones outside any stack only when all layers are chosen."""
    chosen = {stack: frozenset(parse_layers(layers or "all", depth)) for stack, depth in architecture.depths.items()}
    if all(len(chosen[stack]) == depth for stack, depth in architecture.depths.items()):
        return [Target(m, m.layers) for m in modules]
    stacks = ((m, chosen[m.stack]) for m in modules if m.stack in chosen)
    found = [Target(m, tuple(n for n in m.layers if n in numbers)) for m, numbers in stacks]
    return [t for t in found if t.layers or not t.module.layers]


def linear_targets(architecture: Architecture, spec: Resolved, low_rank: bool = False) -> list[Target]:
    """The linear maps named by the spec, in its layers; `low_rank` as in `Architecture.adaptable`."""
    return in_layers(architecture.targets(spec.target_modules, low_rank), architecture, spec.layers)


def only_maps(targets: list[Target]) -> list[Target]:
    """`targets`, for a method that peft has for linear maps alone. Raises Unsuited where another kind is named."""
    if other := next((t.module for t in targets if not t.module.is_linear), None):
        raise Unsuited(f"has an {other.kind} in {other.name}, and this method takes linear maps alone; use lora for it")
    return targets


def maps_alone(architecture: Architecture, spec: Resolved) -> list[Target]:
    """The linear maps named by the spec, in its layers. Raises Unsuited where another kind is named."""
    return only_maps(linear_targets(architecture, spec))


def with_roles(architecture: Architecture, *roles: str) -> list[Module]:
    """The modules that play `roles`, in the layers that have them. Raises Unsuited where the whole model lacks one."""
    for role in roles:
        if not any(m.layers for m in architecture.with_role(role)):
            maps = ", ".join(architecture.target_names()[:8])
            raise Unsuited(f"has no {role} projection in any layer, only {maps}; use lora, which takes any linear map")
    return [m for m in architecture.with_role(*roles) if m.layers]


def by_role(*roles: str) -> Callable[[Architecture, Resolved], list[Target]]:
    """A method's `select`: the modules that play `roles`, in the chosen layers that have them."""
    return lambda architecture, spec: in_layers(with_roles(architecture, *roles), architecture, spec.layers)


def where(spec: Resolved) -> str:
    """Target modules in words, and the layers where not all are chosen: `q and v of layers 0-3,7`."""
    text = WHERE.get(spec.target_modules, spec.target_modules.replace(",", ", "))
    if spec.layers in ("", "all"):
        return text
    n_layers = architectures.of(spec.model).n_layers
    runs = architectures.runs(parse_layers(spec.layers, n_layers))
    numbers = ",".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
    return text if runs == [[0, n_layers - 1]] else f"{text} of layers {numbers}"
