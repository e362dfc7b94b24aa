"""Lines for what a model's own modules keep, as the model itself tells: for those that `plain.py` has no formulas for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from ..base import architecture as architectures
from ..base import models
from ..base.architecture import Module
from ..errors import SpecError
from ..resolve import resolve
from ..spec import RunSpec
from . import plain
from .case import Case
from .lines import Line, total
from .states import ALWAYS, FIRST, FORWARD, HEAD, KEPT, LAST, LOSS, PASS

if TYPE_CHECKING:
    from .saved import Saved

NEAR = 0.03
"""How far the formulas' bytes may be from the model's own for the formulas to stand."""
USUAL = 512
"""Tokens of a text at which what grows with pairs of them counts."""
PARTS = {
    "norm": "norms",
    "ln_": "norms",
    "attn": "attention",
    "attention": "attention",
    "mlp": "feed-forward",
    "ffn": "feed-forward",
}
"""Parts of the names of a layer's own modules, and what they are called here; others keep their name."""
WIDTHS = ("h", "q", "kv", "f", "n_q", "n_kv")
"""Symbols by which a number for each token is written, where one has that value."""


class Unknown(SpecError):
    """The closed form does not know what this model keeps."""


def formulas_hold(case: Case) -> bool:
    """Whether `plain.py` says of the model what it says itself; known beforehand of the catalogue's, which are recorded."""
    entry = models.find(case.spec.model)
    known = (entry.shape_of or entry.key) in architectures.kept()
    return known or _agree(case.spec.model, case.spec.attention, models.edition(case.spec.model))


@lru_cache(maxsize=256)
def _agree(model: str, attention: str, _edition: str) -> bool:
    """In bf16, with every weight trained and with none; for a text of usual length too, where no window changes the form."""
    from .saved import length_of

    shape = architectures.of(model)
    length = length_of(shape)
    lengths = (length,) if shape.facts.window else (length, USUAL)
    spec = RunSpec(model=model, method="full", precision="bf16", attention=attention, sequence_length=length)
    spec = resolve(spec.but(batch_size=1, gradient_checkpointing=True))  # so that every layer counts
    trained = Case.of(spec)
    for case in (trained, replace(trained, targets=())):
        try:
            theirs = [*plain.around(case), *plain.kept(case, "L ", "", KEPT)]
        except (KeyError, ValueError, StopIteration):  # a module that no formula speaks of
            return False
        own = [*around(case), *kept(case, "L ", "", KEPT)]
        a, b = (total(line.size for line in lines) for lines in (theirs, own))
        if any(abs(a.value(1, n, 0) / b.value(1, n, 0) - 1) > NEAR for n in lengths):
            return False
    return True


def running(case: Case) -> Case:
    """The case without targets that never run, as in a decoder's attention to an encoder that is not there."""
    if formulas_hold(case):
        return case
    from .saved import saved

    run = saved(case.spec.model, "bf16", case.spec.attention).run
    return replace(case, targets=tuple(t for t in case.targets if _runs(t.module, run)))


def _runs(module: Module, run: frozenset[str]) -> bool:
    """Whether it runs, or what it is in does, which may read its weight."""
    return any(name in run or name.rpartition(".")[0] in run for _, name in module.names())


def _saved(case: Case) -> tuple[Saved, ...]:
    """What the model's modules save in this run. Raises Unknown where it cannot be told."""
    spec = case.spec
    if case.method.before_layers:
        raise Unknown("the closed form does not know this model's attention to a prefix; the exact trace tells")
    from .saved import saved

    try:
        return saved(spec.model, spec.precision, spec.attention, bool(case.masked)).tensors
    except SpecError as error:
        raise Unknown(f"the closed form does not know this model's layers ({error}); the exact trace tells") from None


def _needed(case: Case) -> list[Saved]:
    """Those of `_saved` that a gradient of this run needs."""
    trained = {m.name for m in case.shape.modules if case.trains(m)} | {m.name for m in plain.readers(case)}
    trained |= {t.module.name for t in case.adapted_experts}
    if case.spec.quantization == "int8":
        trained |= {m.name for m in case.shape.linear()}
    # a tensor is for the weights of a module, of those around it, or for everything below
    return [
        t
        for t in _saved(case)
        if not t.readers or any(r == n or n.startswith(f"{r}.") for r in t.readers for n in trained)
    ]


def around(case: Case) -> list[Line]:
    """Token numbers, the mask, and what is kept outside the layers or shared by them."""
    found = case.line("token numbers", "B S", {"": 16}, ALWAYS, "64-bit, with the labels")
    if case.masked and case.spec.attention != "eager":
        found += case.line("the mask", "B S S_k", {"": 1}, ALWAYS, "true and false, before it is cast")
    outside = [t for t in _needed(case) if t.layer < 0]
    words = round(case.sizes["V"]) if isinstance(case.sizes["V"], (int, float)) else 0
    for name, chosen, moments, kind in (
        ("shared by the layers", [t for t in outside if t.layer == -1], ALWAYS, "activations"),
        ("after the layers", [t for t in outside if t.layer == -2 and t.numbers != words], KEPT, "activations"),
        (
            "made of the logits",
            [t for t in outside if t.layer == -2 and t.numbers == words],
            (FORWARD, PASS, LOSS, HEAD),
            "logits",
        ),
    ):
        found += _lines(case, name, 1, _parts(case, chosen), moments, kind)
    return found


def kept(case: Case, layers: str, suffix: str, moments: tuple[str, ...]) -> list[Line]:
    """As `plain.kept`: in all layers that a gradient reaches where `layers` is "L ", in the largest where it is empty."""
    by_layer: dict[int, dict[str, list[Saved]]] = {n: {} for n in range(case.lowest, case.shape.n_layers)}
    for tensor in (t for t in _needed(case) if t.layer in by_layer):
        by_layer[tensor.layer].setdefault(_called(tensor.part), []).append(tensor)
    if not layers and by_layer:
        by_layer = {
            0: max(by_layer.values(), key=lambda parts: sum(_bytes(case, t) for ts in parts.values() for t in ts))
        }
    alike: Counter[tuple[str, tuple[tuple[tuple[str, int], float], ...]]] = Counter()
    for parts in by_layer.values():
        alike.update((name, tuple(sorted(_parts(case, tensors).items()))) for name, tensors in parts.items())
    found = list[Line]()
    for (name, sizes), n in alike.items():
        found += _lines(case, name + suffix, n, dict(sizes), moments)
    return found


def temporaries(case: Case) -> list[Line]:
    """The gradients that a layer's backward pass holds at a time: two of its widest tensor."""
    tensors = [t for t in _needed(case) if t.layer >= case.lowest]
    widest = max(tensors, key=lambda t: _bytes(case, t) / t.size, default=None)
    if widest is None:
        return []
    e, pairs = case.product_bytes, widest.power == 2
    adapted = any(t.module.role == "down" for t in case.targets) and not case.method.in_place
    both = 8 if pairs else e + (max(e, case.trained_bytes) if adapted else e)
    parts = {key: x / widest.size * both for key, x in _parts(case, [widest]).items()}
    parts["h", 1] = parts.get(("h", 1), 0) + 2 * case.stream_bytes
    return list(_lines(case, "one layer's gradients of activations", 1, parts, (LAST, FIRST)))


def _bytes(case: Case, tensor: Saved) -> float:
    return tensor.numbers * tensor.size * float(case.spec.sequence_length) ** tensor.power


def _called(part: str) -> str:
    return next((name for piece, name in PARTS.items() if piece in part.lower()), part or "the layer itself")


def _parts(case: Case, tensors: Iterable[Saved]) -> dict[tuple[str, int], float]:
    """(symbol of a width, power of the length) → bytes for each of it."""
    found: dict[tuple[str, int], float] = {}
    for t in tensors:
        symbol = next((s for s in WIDTHS if case.sizes[s] == t.numbers), "")
        key = symbol, t.power
        found[key] = found.get(key, 0) + t.size * (1 if symbol else t.numbers)
    return found


def _lines(
    case: Case,
    name: str,
    n: int,
    parts: Mapping[tuple[str, int], float],
    moments: tuple[str, ...],
    kind: str = "activations",
) -> Iterator[Line]:
    for power, times, more in ((1, "B S", ""), (2, "B S S_k", ", squared"), (0, "", ", once")):
        chosen = {symbol: x for (symbol, p), x in parts.items() if p == power}
        note = "as the model's own modules tell"
        yield from case.line(name + more, f"L {times}" if n > 1 else times, chosen, moments, note, {"L": n}, kind)
