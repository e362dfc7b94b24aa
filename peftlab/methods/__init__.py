"""Fine-tuning methods: one registry. To add one, write an entry in a file here, and its words in `catalog/methods.json`."""

from importlib import import_module
from pkgutil import iter_modules

from ..base.architecture import Architecture
from ..catalog import ABOUT
from ..errors import SpecError
from ..spec import Resolved, closest
from . import selection
from .method import SIZES, Drawing, Keep, Method, Select, Term
from .selection import Target, Unsuited, by_role, in_layers, linear_targets, maps_alone, with_roles

__all__ = [
    "METHODS", "SIZES", "Drawing", "Keep", "Method", "Select", "Target", "Term", "Unsuited", "by_role", "find", "in_layers",
    "linear_targets", "maps_alone", "register", "targets", "with_roles",
]  # fmt: skip

METHODS: dict[str, Method] = {}


def register(*methods: Method) -> None:
    METHODS.update({method.key: method for method in methods})


def find(key: str) -> Method:
    """Raises SpecError for an unknown key."""
    if key not in METHODS:
        raise SpecError(f"method={key}: no such method; {closest(key, METHODS)}")
    return METHODS[key]


def targets(architecture: Architecture, spec: Resolved, model_name: str = "the model") -> list[Target]:
    """What `spec.method` trains. Raises SpecError that says why where it does not suit the model or the settings."""
    method = find(spec.method)
    if method.in_place and spec.quantization != "none":
        raise SpecError(
            f"quantization={spec.quantization}: {method.name} trains the base's own parameters, and those of a quantized "
            "base cannot be trained; set it to none, or use qlora"
        )
    try:
        chosen = method.select(architecture, spec)
    except Unsuited as error:
        raise SpecError(f"method={method.key}: {model_name} {error}") from None
    if not any(method.trained(t.module, spec) for t in chosen):
        raise SpecError(f"method={method.key}: {model_name} {method.if_nothing or 'has nothing for it to train'}")
    if method.rank_limit:
        extreme, which = selection.RANK_LIMITS[method.rank_limit]
        limit = extreme(t.module.full_rank for t in chosen)
        if spec.rank > limit:
            usual = min(limit, selection.USUAL_RANK)
            raise SpecError(selection.RANK_REFUSAL.format(rank=spec.rank, which=which, limit=limit, usual=usual))
    heads = [m for m in architecture.modules if m.classifier and not any(t.module is m for t in chosen)]
    return [*chosen, *(Target(m, ()) for m in heads)]


for _file in iter_modules(__path__):
    if not _file.name.startswith("_"):
        import_module(f".{_file.name}", __name__)
if odd := set(METHODS) ^ set(ABOUT):
    raise LookupError(f"{min(odd)} needs both an entry in a file of peftlab/methods and one in catalog/methods.json")
for _key in ABOUT:  # in the catalogue's order
    METHODS[_key] = METHODS.pop(_key)
