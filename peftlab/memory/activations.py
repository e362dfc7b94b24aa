"""The closed form of a training step: what is allocated at each of its high points, as lines that a person can read.

Worked out from what autograd saves in transformers' code and PyTorch's kernels, per kind of module. A trace on fake tensors
(`memory.exact`) is the other source, and a test compares the two. The rounding of blocks is left out. Imports no torch.
"""

from __future__ import annotations

from functools import lru_cache

from ..base.architecture import Module
from ..spec import Resolved
from . import layer, states
from .case import Case
from .lines import Line
from .polynomial import Polynomial, total
from .report import KINDS
from .states import EMBEDDING, FIRST, FORWARD, HEAD, LAST, LOSS, MOMENTS, PASS, RECOMPUTE

KEPT = (FORWARD, PASS, LOSS, HEAD, LAST)
"""Moments at which everything is there that all layers keep."""
ALWAYS = (*KEPT, RECOMPUTE, FIRST)
SOMETIMES = (PASS, RECOMPUTE, EMBEDDING)
"""Moments that only those runs have that hold something at this moment alone."""


def moments(spec: Resolved) -> dict[str, dict[str, Polynomial]]:
    """Bytes by kind at each high point of a step; the peak is the largest sum.

    The polynomials hold for any batch, length and rank, as long as the length stays on the spec's side of the model's
    attention window. Raises SpecError as `Case.of` does.
    """
    found = derivation(spec)
    kinds = [kind for kind in KINDS if kind != "communication"]
    return {
        moment: {k: total(part.size for part in found if part.kind == k and moment in part.moments) for k in kinds}
        for moment in MOMENTS
        if moment not in SOMETIMES or any(part.moments == (moment,) for part in found)
    }


@lru_cache(maxsize=256)
def derivation(spec: Resolved) -> tuple[Line, ...]:
    """The lines that `moments` adds up. Raises SpecError as `Case.of` does."""
    case = Case.of(spec)
    return (*states.lines(case), *_around_layers(case), *_layers(case), *_temporaries(case), *_logits(case))


def _layers(case: Case) -> list[Line]:
    others = [(t.module, t.count) for t in case.targets if not t.module.layers]
    outside = layer.methods_own(case, others, KEPT, " outside layers")
    if not case.spec.gradient_checkpointing:
        return [*layer.every(case, KEPT), *layer.one(case, (FIRST,)), *outside]
    why, inputs = "checkpointing keeps nothing else of a layer", {"h": case.stream_bytes}
    return [
        *case.line("layers' inputs", "L B S", inputs, (*KEPT, RECOMPUTE), why),
        *layer.one(case, (LAST, RECOMPUTE, FIRST)),
        *outside,
    ]


def _around_layers(case: Case) -> list[Line]:
    """Token numbers, positions, the mask, the embedding and the last norm."""
    e, facts = case.stream_bytes, case.shape.facts
    found = case.line("token numbers", "B S", {"": 16}, ALWAYS, "64-bit, with the labels")
    if case.rotary:  # a cosine and a sine; Gemma's layers with a window have a table of their own
        tables = 2 if facts.windowed and case.sandwiched else 1
        found += case.line("rotary tables", "S", {"d": 2 * e * tables}, ALWAYS)
    if case.masked and case.spec.attention != "eager":
        found += case.line("the mask", "B S S_k", {"": 1}, ALWAYS, "true and false, before it is cast")
    if facts.dropout and case.lowest == 0:
        found += case.line("embedding", "B S", {"h": e + 1}, ALWAYS, "the first norm's input, and a dropout mask")
    return found + _last_norm(case)


def _last_norm(case: Case) -> list[Line]:
    trained = any(case.trains(m) for m in case.shape.modules if m.kind == "norm" and not m.layers)
    reached = case.active > 0 or trained
    cast = case.amp and reached
    parts: dict[str, float] = {"h": 0, "h_V": case.product_bytes * (case.trains(case.head) and not cast)}
    if reached:
        scaled = 4 if case.sandwiched else case.stream_bytes
        parts["h"] = case.stream_bytes if case.layer_norm else 4 + scaled * trained
    found = case.line("last norm and the head's input", "B S", parts, KEPT)
    if cast:
        found += case.line(
            "the head's weight in bf16", "", {"V h_V": 2}, (FORWARD, PASS, LOSS, HEAD), "autocast's copy"
        )
    return found


def _temporaries(case: Case) -> list[Line]:
    """What comes and goes within one layer's backward pass, and within a method's module."""
    e, found = case.product_bytes, list[Line]()
    if case.active:
        adapted = any(t.module.role == "down" for t in case.targets) and not case.method.in_place
        both = e + (max(e, case.trained_bytes) if adapted else e)
        parts = {"k f" if case.shape.facts.experts else "f": both, "h": 2 * case.stream_bytes}
        note = "of the feed-forward's middle, beside what has not been freed yet"
        found += case.line("one layer's gradients of activations", "B S", parts, (LAST, FIRST), note)
    largest = max(case.shape.linear(), key=lambda m: m.weight, default=None)
    if case.spec.quantization == "nf4" and largest:
        note, sizes = "one module at a time, for the product with its gradient", _sides(largest)
        found += case.line("unpacked weight", "", {"d_in d_out": e}, (LAST, FIRST), note, sizes)
    if passing := list(case.kept("pass")):
        module = max(case.targets, key=lambda t: sum(k.value(t.module, case.spec) for k in passing)).module
        each = {" ".join(k.factors): k.coefficient * case.adapter_product_bytes for k in passing}
        note = f"while {module.short_name}, its largest module, runs"
        for moment in (PASS, RECOMPUTE) if case.spec.gradient_checkpointing else (PASS,):
            found += case.line(f"{case.method.name}'s temporaries", "", each, (moment,), note, _sides(module))
    return found


def _sides(module: Module) -> dict[str, float]:
    return {"d_in": module.d_in, "d_out": module.d_out}


def _logits(case: Case) -> list[Line]:
    tokens, e = "B T" if case.inserted else "B S", case.product_bytes
    note = "log-softmax, its gradient and that of the logits, in fp32"
    found = [
        *case.line("logits", tokens, {"V": 8}, (FORWARD,), "in fp32, and their log-softmax", kind="logits"),
        *case.line("logits at the loss", tokens, {"V": 12}, (LOSS,), note, kind="logits"),
        *case.line("the logits' gradient", "B S", {"V": e}, (HEAD,), kind="logits"),
    ]
    if case.spec.hold_outputs:
        alive = (FORWARD, LOSS, HEAD, LAST, RECOMPUTE, FIRST, EMBEDDING)
        found += case.line("held logits", "B S", {"V": e}, alive, "hold-outputs: the caller has them", kind="logits")
    return found
