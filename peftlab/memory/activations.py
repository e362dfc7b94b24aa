"""The closed form of a training step: what is allocated at each of its high points, as lines that a person can read.

Worked out from what autograd saves in transformers' code and PyTorch's kernels; for a plain transformer as in Korthikanti et
al. 2022, arXiv 2205.05198 section 4. The rounding of blocks is left out. Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .. import optimizers
from ..base import models
from ..base.architecture import Module
from ..methods import Keep
from ..spec import SETTINGS, Json, Resolved
from . import asked, plain, states
from .case import Case
from .lines import Line, Polynomial, total
from .plain import shares_input
from .report import KINDS
from .states import EMBEDDING, FIRST, FORWARD, HEAD, KEPT, LAST, LOSS, MOMENTS, PASS, RECOMPUTE

SHORTEST = int(SETTINGS["sequence_length"].low or 1)
SOMETIMES = (PASS, RECOMPUTE, EMBEDDING)
"""Moments that only those runs have that hold something at this moment alone."""


def moments(spec: Resolved) -> dict[str, dict[str, Polynomial]]:
    """Bytes by kind at each high point of a step, for any batch and rank, and any length on the spec's side of the model's
    attention window. Raises SpecError as `Case.of` does.
    """
    return _moments(_of_any_size(Case.of(spec)), models.edition(spec.model))


def _of_any_size(case: Case) -> Resolved:
    """The run at the least batch, length and rank that have its polynomials, which it shares with all runs of other sizes.

    The rank stays where a trained tensor's own size decides how its optimizer states are kept, and the length where the
    model itself tells what it keeps: which of its layers keeps most may depend on that.
    """
    spec, window = case.spec, case.shape.facts.window
    length = min(spec.sequence_length, window if case.masked and window else SHORTEST)
    kept: Json = {} if asked.formulas_hold(case) else {"sequence_length": spec.sequence_length}
    if spec.optimizer == "adafactor" or optimizers.find(spec).bits == 8:
        kept["rank"] = spec.rank
    read: Json = {
        "rank": 1,
        "alpha": 1.0,
        "lr_ratio": 1.0,
        "learning_rate": 1.0,
        "steps": 1,
        "seed": 0,
        "batch_size": 1,
    }
    usual = {name: value for name, value in read.items() if name not in spec.unread}
    return replace(spec, **usual | {"sequence_length": length} | kept)


@lru_cache(maxsize=1024)  # the catalogue's models with each method are 760; 20 kB each
def _moments(spec: Resolved, _edition: str) -> dict[str, dict[str, Polynomial]]:
    found = derivation(spec)
    kinds = [kind for kind in KINDS if kind != "communication"]
    return {
        moment: {k: total(part.size for part in found if part.kind == k and moment in part.moments) for k in kinds}
        for moment in MOMENTS
        if moment not in SOMETIMES or any(part.moments == (moment,) for part in found)
    }


def derivation(spec: Resolved) -> tuple[Line, ...]:
    """The lines that `moments` adds up. Raises SpecError as `Case.of` does."""
    return _derivation(spec, models.edition(spec.model))


@lru_cache(maxsize=256)
def _derivation(spec: Resolved, _edition: str) -> tuple[Line, ...]:
    whole = Case.of(spec)
    case = asked.running(whole)
    around = plain.around if asked.formulas_hold(case) else asked.around
    return (*states.lines(whole, case), *around(case), *_layers(case), *_temporaries(case), *_logits(case))


def _layers(case: Case) -> list[Line]:
    others = [(t.module, t.count) for t in case.targets if not t.module.layers]
    outside = _methods_own(case, others, KEPT, " outside layers")
    if not case.spec.gradient_checkpointing:
        return [*_in_layers(case, KEPT, one=False), *_in_layers(case, (FIRST,), one=True), *outside]
    why, inputs = "checkpointing keeps nothing else of a layer", {"h": case.stream_bytes}
    return [
        *case.line("layers' inputs", "L B S", inputs, (*KEPT, RECOMPUTE), why),
        *_in_layers(case, (LAST, RECOMPUTE, FIRST), one=True),
        *outside,
    ]


def _temporaries(case: Case) -> list[Line]:
    """What comes and goes within one layer's backward pass, and within a method's module."""
    e, found = case.product_bytes, list[Line]()
    if case.active and not asked.formulas_hold(case):
        found += asked.temporaries(case)
    elif case.active:
        adapted = any(t.module.role == "down" for t in case.targets) and not case.method.in_place
        both = e + (max(e, case.trained_bytes) if adapted else e)
        parts = {"k f" if case.shape.facts.experts else "f": both, "h": 2 * case.stream_bytes}
        note = "of the feed-forward's middle, beside what has not been freed yet"
        found += case.line("one layer's gradients of activations", "B S", parts, (LAST, FIRST), note)
    if case.adapted_experts:
        sizes = {"N_e": max(t.module.weight for t in case.adapted_experts)}
        parts, note = {"N_e": case.trained_bytes}, "an adapter's product in its own format, before it is added"
        found += case.line("the largest experts' update", "", parts, (LAST, FIRST), note, sizes)
    largest = max(case.shape.linear(), key=lambda m: m.weight, default=None)
    if case.spec.quantization == "nf4" and largest:
        note = "one module at a time, for the product with its gradient"
        sizes = {"d_in": largest.d_in, "d_out": largest.d_out}
        found += case.line("unpacked weight", "", {"d_in d_out": e}, (LAST, FIRST), note, sizes)
    if passing := list(case.kept("pass")):
        module = max(case.targets, key=lambda t: sum(k.value(t.module, case.spec) for k in passing)).module
        each = {" ".join(k.factors): k.coefficient * case.adapter_product_bytes for k in passing}
        note, sizes = (
            f"while {module.short_name}, its largest module, runs",
            {"d_in": module.d_in, "d_out": module.d_out},
        )
        for moment in (PASS, RECOMPUTE) if case.spec.gradient_checkpointing else (PASS,):
            found += case.line(f"{case.method.name}'s temporaries", "", each, (moment,), note, sizes)
    return found


def _logits(case: Case) -> list[Line]:
    e = case.product_bytes
    note = "log-softmax, its gradient and that of the logits, in fp32"
    found = [
        *case.line("logits", "B S", {"V": 8}, (FORWARD,), "in fp32, and their log-softmax", kind="logits"),
        *case.line("logits at the loss", "B S", {"V": 12}, (LOSS,), note, kind="logits"),
        *case.line("the logits' gradient", "B S", {"V": e}, (HEAD,), kind="logits"),
    ]
    if case.spec.hold_outputs:
        alive = (FORWARD, LOSS, HEAD, LAST, RECOMPUTE, FIRST, EMBEDDING)
        found += case.line("held logits", "B S", {"V": e}, alive, "hold-outputs: the caller has them", kind="logits")
    return found


def _in_layers(case: Case, moments: tuple[str, ...], one: bool) -> list[Line]:
    """What all layers that a gradient reaches keep, or `one`: the one that is recomputed, or the backward pass's last."""
    others = [t for t in case.targets if t.module.layers and t not in case.adapted_experts]
    counted = [(t.module, 1 if one else t.count) for t in others]
    layers, suffix = ("", ", one layer") if one else ("L ", "")
    kept = plain.kept if asked.formulas_hold(case) else asked.kept
    experts = sum(t.module.weight * (1 if one else t.count) for t in case.adapted_experts)
    note = "the sum of weights and adapter, for the gradient of the experts' inputs"
    added = case.line(
        f"experts with their adapters{suffix}", "", {"N_e": case.product_bytes}, moments, note, {"N_e": experts}
    )
    return kept(case, layers, suffix, moments) + added + _methods_own(case, counted, moments, suffix)


def _number_bytes(case: Case, keep: Keep) -> int:
    """Bytes of one of the numbers that the method keeps; 0 for what is counted elsewhere."""
    if keep.of in ("input", "factor") and shares_input(case):
        return 0  # counted among the inputs of linear maps
    if keep.of == "weight":
        return 0 if case.trained_bytes == case.stream_bytes else case.trained_bytes
    known = {"base": case.product_bytes, "mask": 1, "factor": case.trained_bytes}
    return known.get(keep.of, case.adapter_product_bytes)


def _methods_own(case: Case, counted: list[tuple[Module, int]], moments: tuple[str, ...], suffix: str) -> list[Line]:
    """What the method itself keeps at these modules, each with how many there are of it."""
    sizes: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {"token": {}, "module": {}}
    for keep in case.kept("token", "module"):
        rest, found = tuple(f for f in keep.factors if f != "rank"), parts[keep.each]
        symbol = "Σ" + "·".join(rest) if rest else "M"
        symbol += f"({'+'.join(keep.roles)})" if keep.roles else ""
        sizes[symbol] = sum(Keep(rest, roles=keep.roles).value(m, case.spec) * n for m, n in counted)
        symbol += " r" if "rank" in keep.factors else ""
        found[symbol] = found.get(symbol, 0) + _number_bytes(case, keep) * keep.coefficient
    name, why = case.method.name + suffix, "inputs in the adapter's format, and what it makes of them"
    return [
        *case.line(name, "B S", parts["token"], moments, why, sizes),
        *case.line(f"{name}, once a module", "", parts["module"], moments, "", sizes),
    ]
