"""The closed form of a training step: what is allocated at each of its high points, as lines that a person can read.

Worked out from what autograd saves in transformers' code and PyTorch's kernels, per kind of module; a trace on fake tensors
(`memory.exact`) is the other source, and a test holds the two together. Blocks' rounding is left out. Imports no torch.
"""

from __future__ import annotations

from functools import lru_cache

from ..methods import Keep, Target
from ..spec import RunSpec
from . import states
from .case import STREAMS, Case, case
from .lines import Line, Size, line
from .polynomial import Polynomial, total
from .report import KINDS
from .states import FIRST, FORWARD, HEAD, LAST, LOSS, MOMENTS, PASS

KEPT = (FORWARD, PASS, LOSS, HEAD, LAST)
"""When what all layers keep is there."""


def moments(spec: RunSpec) -> dict[str, dict[str, Polynomial]]:
    """Bytes by kind at each high point of a resolved spec's step; the peak is the largest sum.

    The polynomials hold for any batch, length and rank, as long as the length stays on the spec's side of the model's
    attention window. Raises SpecError as `methods.targets` does.
    """
    found = derivation(spec)
    return {
        moment: {
            kind: total(part.size for part in found if part.kind == kind and moment in part.moments)
            for kind in KINDS
            if kind != "communication"
        }
        for moment in MOMENTS
        if moment != PASS or any(part.moments == (PASS,) for part in found)
    }


@lru_cache(maxsize=256)
def derivation(spec: RunSpec) -> tuple[Line, ...]:
    """The lines that `moments` adds up."""
    c = case(spec)
    return (*states.lines(c), *_around_layers(c), *_layers(c), *_temporaries(c), *_logits(c))


def _layers(c: Case) -> list[Line]:
    if not c.checkpointing:
        return [*_kept(c, "L ", KEPT), *_kept(c, "", (FIRST,))]
    inputs = line(
        c.sizes, "layer inputs", "activations", "L B S", {"h": c.wide}, KEPT, "checkpointing keeps nothing else of a layer"
    )
    first = line(c.sizes, "layer inputs", "activations", "B S", {"h": c.wide}, (FIRST,))
    return [*inputs, *first, *_kept(c, "", (PASS, LAST, FIRST))]


def _kept(c: Case, layers: str, alive: tuple[str, ...]) -> list[Line]:
    """What the layers keep for the backward pass: all of them (`L `), or one that is recomputed or the last to go."""
    if not c.active:
        return []
    one = "" if layers else "one layer's "

    def kept(name: str, times: str, parts: dict[str, float], note: str = "") -> list[Line]:
        return line(c.sizes, one + name, "activations", times, parts, alive, note)

    attention, quadratic, why = _attention(c)
    found = [
        *kept("norms", f"{layers}B S", _norms(c), _why_norms(c)),
        *kept("attention", f"{layers}B S", attention, why),
        *kept("attention matrices", f"{layers}B S S", quadratic, "every token with every other"),
        *kept("feed-forward", f"{layers}B S", _feed_forward(c), f"{c.shape.facts.activation} and the product after it"),
        *_windows(c, layers, one, alive),
        *_inputs(c, layers, one, alive),
        *_own(c, layers, one, alive),
    ]
    if c.shape.facts.dropout:
        found += kept("dropout", f"{layers}B S", {"h": 2}, "a mask of one byte a number, after each sub-layer")
    return found


def _why_norms(c: Case) -> str:
    return "LayerNorm keeps its input" if c.layer_norm else "RMSNorm keeps its input in fp32, and its product where w learns"


def _norms(c: Case) -> dict[str, float]:
    """Bytes a token for the norms of one layer."""
    main = c.norms()
    trained = sum(c.trains(m) for m in main)
    if c.layer_norm:
        return {"h": c.wide * len(main), "": 2 * c.wide * len(main)}
    again = 4 if c.sandwiched else c.wide
    parts = {"h": 4 * len(main) + again * trained, "": 4.0 * len(main)}
    for start, width, rows in (("q_", "q", "n_q"), ("k_", "kv", "n_kv")):
        for m in c.norms(start):
            parts[width] = 4 + (4 if c.sandwiched else c.thin) * c.trains(m)
            parts[rows] = 4.0 if m.parameters["weight"][-1] == c.shape.facts.head_size else 0
    return parts


def _attention(c: Case) -> tuple[dict[str, float], dict[str, float], str]:
    """Bytes a token, bytes a pair of tokens, and the kernel, for one layer without a mask."""
    facts, e = c.shape.facts, c.thin
    grouped = facts.kv_heads != facts.heads
    fused_rotary = c.rotary and any(m.role == "query+key+value" for m in c.layer_modules)
    if c.spec.attention == "eager":
        pairs = {"n_q": 4.0 + (e if e < 4 else 0)}
        if facts.attention_dropout:
            pairs["n_q"] += 1 + e
        return {"q": 3 * e if grouped else e, "kv": 0 if grouped else 2 * e}, pairs, "softmax in fp32, and its cast"
    if e == 4 and grouped:
        return {"q": 3 * e}, {"n_q": 4}, "grouped heads in fp32 have no kernel: plain products"
    parts = {"q": 2 * e + (e if fused_rotary else 0), "kv": 2 * e + (e if fused_rotary else 0), "n_q": 4}
    kernel = "flash" if e == 2 else "the memory-efficient kernel"
    return parts, {}, f"{kernel} keeps queries, keys, values, its output and a sum in fp32"


def _windows(c: Case, layers: str, one: str, alive: tuple[str, ...]) -> list[Line]:
    """What a mask adds: the kernel that takes it wants it in the data's format, and a head of keys for each of queries."""
    facts = c.shape.facts
    if not c.masked or not c.active or c.spec.attention == "eager":
        return []
    times = "L_w " if layers else ""
    copied = 1 < facts.kv_heads < facts.heads
    already = c.thin == 4 and facts.kv_heads != facts.heads  # the plain products have copies of them
    e = 0 if already else c.thin
    parts = {"q": 2 * e, "kv": -2 * e} if copied else {}
    note = "a mask keeps flash away"
    wide = line(c.sizes, f"{one}expanded keys and values", "activations", f"{times}B S", parts, alive, note)
    mask = line(c.sizes, f"{one}masks", "activations", f"{times}B S S_k", {"": c.thin}, alive, note)
    return [*wide, *mask]


def _feed_forward(c: Case) -> dict[str, float]:
    """Bytes a token between the first and the last linear map of one layer's feed-forward."""
    facts, e = c.shape.facts, c.thin
    if facts.experts:
        experts = next(m for m in c.layer_modules if "gate_up_proj" in m.parameters)
        trained = c.trains(experts)
        return {"k f": e * (4 if trained else 3), "k h": e * (2 if trained else 1), "E": 4, "k": 60}
    if c.gated:
        return {"f": 3 * e}
    return {"f": e * {"relu": 1, "gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3}.get(facts.activation, 1)}


def _inputs(c: Case, layers: str, one: str, alive: tuple[str, ...]) -> list[Line]:
    """Inputs of linear maps whose weight is trained, or that an adapter of the base's own format reads."""
    widths: dict[str, tuple[int, float]] = {}
    shared = c.method.keeps and not c.amp and c.adapter == c.wide and not _dropped(c)
    readers = {id(t.module) for t in c.targets} if shared and any(k.of == "input" for k in c.method.keeps) else set()
    for m in c.layer_modules:
        trained = c.trains(m) or id(m) in readers or c.spec.quantization == "int8"
        if not m.is_linear and m.short_name != "gate":
            continue
        if not trained or m.kind == "norm":
            continue
        role = m.role.split("+")[0]
        place = STREAMS.get(role, "m" if m.short_name == "gate" else m.name)
        if role == "attention output" and _output_is_kept(c) or role == "down" and c.shape.facts.activation == "relu":
            continue
        if c.amp and place in ("a", "m"):
            place = m.name
        count = sum(n >= c.lowest for n in m.layers) if layers else 1
        old = widths.get(place, (0, 0))
        width = m.parameters["weight"][1] if m.kind == "other" else m.d_in
        widths[place] = (width, max(old[1], count))
    sizes = {**c.sizes, "Σd_in": Size(sum(w * n for w, n in widths.values()))}
    return line(
        sizes, f"{one}inputs of linear maps", "activations", "B S", {"Σd_in": c.thin}, alive,
        "for the gradient of their weights; maps that read the same tensor keep it once",
    )  # fmt: skip


def _output_is_kept(c: Case) -> bool:
    """Whether attention itself keeps its output, which the next linear map reads."""
    grouped = c.shape.facts.kv_heads != c.shape.facts.heads
    return c.spec.attention != "eager" and not (c.thin == 4 and grouped)


def _dropped(c: Case) -> bool:
    return bool(c.spec.dropout) and "rank" in c.method.settings


def _own(c: Case, layers: str, one: str, alive: tuple[str, ...]) -> list[Line]:
    """What the method keeps, module by module, and autocast's copies of the weights."""
    sizes, each_token, each_module = dict(c.sizes), dict[str, float](), dict[str, float]()
    for keep in c.method.keeps:
        if keep.each not in ("token", "module"):
            continue
        size = c.thin if keep.of == "base" else c.adapter_numbers
        if keep.of == "input":
            size = 0 if c.adapter == c.wide and not c.amp else size
            size = c.adapter_numbers + 1 if _dropped(c) else size
        found = each_token if keep.each == "token" else each_module
        key = _summed(c, keep, bool(layers), sizes)
        found[key] = found.get(key, 0) + size * keep.coefficient
    name = c.method.name
    casts = sum(m.weight * (c.active if layers else 1) for m in c.layer_modules if m.weight and m.kind != "norm")
    sizes["N_cast"] = Size(casts)
    why = "its modules' inputs in the adapter's format, and what it makes of them"
    return [
        *line(sizes, f"{one}{name}", "activations", "B S", each_token, alive, why),
        *line(sizes, f"{one}{name}, once a module", "activations", "", each_module, alive),
        *line(sizes, f"{one}weights in bf16", "activations", "", {"N_cast": 2 * c.amp}, alive, "autocast's copies"),
    ]


def _summed(c: Case, keep: Keep, whole: bool, sizes: dict[str, Size]) -> str:
    """The symbol for a sum over the adapted modules, put in `sizes`."""
    rank, rest = "rank" in keep.factors, tuple(f for f in keep.factors if f != "rank")
    over = [t for t in c.targets if not keep.roles or t.module.role in keep.roles]
    over = over if whole else [t for t in over if t.module.layers]
    plain = Keep(rest)
    value = sum(plain.value(t.module, c.spec) * (t.count if whole else 1) for t in over)
    symbol = "Σ" + ("·".join(rest) or "1") + (f"({'+'.join(keep.roles)})" if keep.roles else "")
    sizes[symbol] = Size(value)
    return f"{symbol} r" if rank else symbol


def _around_layers(c: Case) -> list[Line]:
    """Token numbers, positions, the embedding and the last norm."""
    sizes, facts, e = c.sizes, c.shape.facts, c.wide
    always = (*KEPT, FIRST)
    found = line(sizes, "token numbers", "activations", "B S", {"": 16}, always, "64-bit, with the labels")
    if c.rotary:
        tables = 2 if c.shape.facts.windowed and c.sandwiched else 1
        found += line(sizes, "rotary tables", "activations", "S", {"d": 2 * e * tables}, always)
    last = [m for m in c.shape.modules if m.kind == "norm" and not m.layers]
    trained = any(c.trains(m) for m in last)
    head = next((m for m in c.shape.modules if m.head), None)
    if c.active or trained:
        parts: dict[str, float] = {"h": e if c.layer_norm else 4 + (4 if c.sandwiched else e) * trained}
        if head and c.trains(head) and not c.amp:
            parts["h_V"] = e
        found += line(sizes, "last norm and the head's input", "activations", "B S", parts, KEPT)
    elif head and c.trains(head):
        found += line(sizes, "the head's input", "activations", "B S", {"h_V": c.thin}, KEPT)
    if c.amp and head and (c.active or trained):
        found += line(sizes, "the head's weight in bf16", "activations", "", {"V h_V": 2}, (FORWARD, PASS, LOSS, HEAD))
    if facts.dropout and c.lowest == 0 and c.layer_norm:
        found += line(sizes, "embedding", "activations", "B S", {"h": e + 1}, always)
    if c.masked and c.spec.attention != "eager":
        found += line(sizes, "the mask", "activations", "B S S_k", {"": 1}, always, "true and false, before it is cast")
    return found


def _temporaries(c: Case) -> list[Line]:
    """What comes and goes within one layer's backward pass, and within a method's module."""
    e = c.thin
    parts: dict[str, float] = {"f": 2 * e, "h": 2 * c.wide}
    if any(t.module.role == "down" for t in c.targets) and not c.method.in_place and c.adapter > e:
        parts["f"] = e + c.adapter
    if c.shape.facts.experts:
        parts["k f"] = parts.pop("f")
    found = line(c.sizes, "one layer's gradients of activations", "activations", "B S", parts, (LAST, FIRST)) if c.active else []
    largest = max((m for m in c.shape.linear()), key=lambda m: m.weight, default=None)
    if c.spec.quantization == "nf4" and largest:
        sizes = {**c.sizes, "d_in": Size(largest.d_in), "d_out": Size(largest.d_out)}
        note = "one module at a time, for the product with its gradient"
        found += line(sizes, "unpacked weight", "activations", "", {"d_in d_out": e}, (LAST, FIRST), note)
    passing = list(c.kept("pass"))
    if passing:
        module = max(c.targets, key=lambda t: sum(k.value(t.module, c.spec) for k in passing)).module
        sizes = {**c.sizes, "d_in": Size(module.d_in), "d_out": Size(module.d_out)}
        each = {" ".join(k.factors): k.coefficient * c.adapter_numbers for k in passing}
        note = "while its largest module runs"
        found += line(sizes, f"{c.method.name}'s temporaries", "activations", "", each, (PASS,), note)
    return found


def _logits(c: Case) -> list[Line]:
    e = c.thin
    found = [
        *line(c.sizes, "logits", "logits", "B S", {"V": 8}, (FORWARD,), "in fp32, and their log-softmax"),
        *line(c.sizes, "logits", "logits", "B S", {"V": 12}, (LOSS,), "log-softmax, its gradient and the logits', in fp32"),
        *line(c.sizes, "logits' gradient", "logits", "B S", {"V": e}, (HEAD,), ""),
    ]
    if c.spec.hold_outputs:
        found += line(c.sizes, "held logits", "logits", "B S", {"V": e}, (FORWARD, LOSS, HEAD, LAST, FIRST), "hold_outputs")
    return found


__all__ = ["Line", "Target", "derivation", "moments"]
