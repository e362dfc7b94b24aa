"""The closed form of a training step: what is allocated at each of its high points, as lines that a person can read.

Worked out from what autograd saves in transformers' code and PyTorch's kernels, per kind of module; a trace on fake tensors
(`memory.exact`) is the other source, and a test holds the two together. Blocks' rounding is left out. Imports no torch.
"""

from __future__ import annotations

from functools import lru_cache

from ..spec import Resolved
from . import layer, states
from .case import Case, case
from .lines import Line
from .polynomial import Polynomial, total
from .report import KINDS
from .states import EMBEDDING, FIRST, FORWARD, HEAD, LAST, LOSS, MOMENTS, PASS, RECOMPUTE

KEPT = (FORWARD, PASS, LOSS, HEAD, LAST)
"""When what all layers keep is there."""
SOMETIMES = (PASS, RECOMPUTE, EMBEDDING)
"""Moments of those runs alone that have something of their own there."""


def moments(spec: Resolved) -> dict[str, dict[str, Polynomial]]:
    """Bytes by kind at each high point of a resolved spec's step; the peak is the largest sum.

    The polynomials hold for any batch, length and rank, as long as the length stays on the spec's side of the model's
    attention window. Raises SpecError as `methods.targets` does.
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
    """The lines that `moments` adds up, for a resolved spec."""
    c = case(spec)
    return (*states.lines(c), *_around_layers(c), *_layers(c), *_temporaries(c), *_logits(c))


def _layers(c: Case) -> list[Line]:
    outside = layer.methods_own(
        c, [(t.module, t.count) for t in c.targets if not t.module.layers], KEPT, " outside layers"
    )
    if not c.checkpointing:
        return [*layer.every(c, KEPT), *layer.one(c, (FIRST,)), *outside]
    why = "checkpointing keeps nothing else of a layer"
    return [
        *c.line("layers' inputs", "L B S", {"h": c.wide}, (*KEPT, RECOMPUTE), why),
        *layer.one(c, (LAST, RECOMPUTE, FIRST)),
        *outside,
    ]


def _around_layers(c: Case) -> list[Line]:
    """Token numbers, positions, the embedding and the last norm."""
    e, always = c.wide, (*KEPT, RECOMPUTE, FIRST)
    found = c.line("token numbers", "B S", {"": 16}, always, "64-bit, with the labels")
    if c.rotary:
        tables = 2 if c.shape.facts.windowed and c.sandwiched else 1
        found += c.line("rotary tables", "S", {"d": 2 * e * tables}, always)
    if c.masked and c.spec.attention != "eager":
        found += c.line("the mask", "B S S_k", {"": 1}, always, "true and false, before it is cast")
    if c.shape.facts.dropout and c.lowest == 0:
        found += c.line("embedding", "B S", {"h": e + 1}, always, "the first norm's input, and a dropout mask")
    return found + _last_norm(c)


def _last_norm(c: Case) -> list[Line]:
    trained = any(c.trains(m) for m in c.shape.modules if m.kind == "norm" and not m.layers)
    head_trained = c.head is not None and c.trains(c.head)
    reached = c.active > 0 or trained
    parts: dict[str, float] = {"h": 0, "h_V": c.thin * head_trained * (not (c.amp and reached))}
    if reached:
        parts["h"] = c.wide if c.layer_norm else 4 + (4 if c.sandwiched else c.wide) * trained
    found = c.line("last norm and the head's input", "B S", parts, KEPT)
    if c.amp and reached:
        found += c.line("the head's weight in bf16", "", {"V h_V": 2}, (FORWARD, PASS, LOSS, HEAD), "autocast's copy")
    return found


def _temporaries(c: Case) -> list[Line]:
    """What comes and goes within one layer's backward pass, and within a method's module."""
    e, found = c.thin, list[Line]()
    adapted = any(t.module.role == "down" for t in c.targets) and not c.method.in_place
    wide = "k f" if c.shape.facts.experts else "f"
    if c.active:
        parts = {wide: e + (c.adapter if adapted and c.adapter > e else e), "h": 2 * c.wide}
        note = "of the feed-forward's middle, beside what has not been freed yet"
        found += c.line("one layer's gradients of activations", "B S", parts, (LAST, FIRST), note)
    largest = max(c.shape.linear(), key=lambda m: m.weight, default=None)
    if c.spec.quantization == "nf4" and largest:
        note = "one module at a time, for the product with its gradient"
        size = {"d_in": largest.d_in, "d_out": largest.d_out}
        found += c.line("unpacked weight", "", {"d_in d_out": e}, (LAST, FIRST), note, size)
    if passing := list(c.kept("pass")):
        module = max(c.targets, key=lambda t: sum(k.value(t.module, c.spec) for k in passing)).module
        each = {" ".join(k.factors): k.coefficient * c.adapter_numbers for k in passing}
        size = {"d_in": module.d_in, "d_out": module.d_out}
        for moment in (PASS, RECOMPUTE) if c.checkpointing else (PASS,):
            note = f"while {module.short_name}, its largest module, runs"
            found += c.line(f"{c.method.name}'s temporaries", "", each, (moment,), note, size)
    return found


def _logits(c: Case) -> list[Line]:
    tokens = "B T" if c.virtual else "B S"
    note = "log-softmax, its gradient and that of the logits, in fp32"
    found = [
        *c.line("logits", tokens, {"V": 8}, (FORWARD,), "in fp32, and their log-softmax", kind="logits"),
        *c.line("logits at the loss", tokens, {"V": 12}, (LOSS,), note, kind="logits"),
        *c.line("the logits' gradient", "B S", {"V": c.thin}, (HEAD,), kind="logits"),
    ]
    if c.spec.hold_outputs:
        alive = (FORWARD, LOSS, HEAD, LAST, RECOMPUTE, FIRST, EMBEDDING)
        found += c.line("held logits", "B S", {"V": c.thin}, alive, "hold-outputs: the caller has them", kind="logits")
    return found
