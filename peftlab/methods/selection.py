"""Which modules of a model a method trains, and how that is said in words."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..base import architecture as architectures
from ..base.architecture import Architecture, Module
from ..errors import SpecError
from ..spec import Resolved, parse_layers

FUSED = "query+key+value"  # the role of a projection that makes queries, keys and values at once
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
    """`modules` within the chosen layers; ones outside any layer only when all layers are chosen."""
    numbers = parse_layers(layers or "all", architecture.n_layers)
    whole = len(numbers) == architecture.n_layers
    found = [Target(m, tuple(n for n in m.layers if n in numbers)) for m in modules if m.layers or whole]
    return [t for t in found if t.layers or not t.module.layers]


def linear_targets(architecture: Architecture, spec: Resolved) -> list[Target]:
    """The linear maps named by the spec, in its layers."""
    return in_layers(architecture.targets(spec.target_modules), architecture, spec.layers)


def once_a_layer(architecture: Architecture, *roles: str) -> list[Module]:
    """The modules that play `roles`, each once in every layer. Raises Unsuited where one is missing, or not alone."""
    for role in roles:
        layers = sorted(n for m in architecture.with_role(role) for n in m.layers)
        if layers != list(range(architecture.n_layers)):
            many = len(layers) > architecture.n_layers
            found = f"several {role} projections in a layer" if many else f"no {role} projection under a known name"
            raise Unsuited(f"has {found}; use lora, which takes any linear map")
    return architecture.with_role(*roles)


def by_role(*roles: str) -> Callable[[Architecture, Resolved], list[Target]]:
    """A method's `select`: the modules that play `roles`, one of each in every chosen layer."""
    return lambda architecture, spec: in_layers(once_a_layer(architecture, *roles), architecture, spec.layers)


def where(spec: Resolved) -> str:
    """Target modules in words, and the layers where not all are chosen: `q and v of layers 0-3,7`."""
    text = WHERE.get(spec.target_modules, spec.target_modules.replace(",", ", "))
    if spec.layers in ("", "all"):
        return text
    n_layers = architectures.of(spec.model).n_layers
    runs = architectures.runs(parse_layers(spec.layers, n_layers))
    numbers = ",".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
    return text if runs == [[0, n_layers - 1]] else f"{text} of layers {numbers}"
