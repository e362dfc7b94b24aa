"""Lines of what layers keep between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Iterable

from ..base.architecture import Module
from ..methods import Keep
from .case import Case
from .lines import Line, Sum

STREAMS = {"query": "attention", "key": "attention", "value": "attention", "gate": "feed-forward", "up": "feed-forward"}
"""Linear maps that read the same tensor: what the norm before attention gives, and the one before the feed-forward."""
PLAIN = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3}
"""Tensors that activation functions written out in Python keep; one kernel keeps one, its input or for relu its output."""
ROUTING = 60
"""Bytes of sorting, places and shares for each expert that a token goes to."""
Counted = Iterable[tuple[Module, int]]


def every(c: Case, moments: tuple[str, ...]) -> list[Line]:
    """What all layers that a gradient reaches keep."""
    counted = [(t.module, t.count) for t in c.targets if t.module.layers]
    return _kept(c, "L ", "", moments) + methods_own(c, counted, moments)


def one(c: Case, moments: tuple[str, ...]) -> list[Line]:
    """What a single one keeps: recomputed, or the last to be gone through."""
    counted = [(t.module, 1) for t in c.targets if t.module.layers]
    return _kept(c, "", ", one layer", moments) + methods_own(c, counted, moments, ", one layer")


def _kept(c: Case, layers: str, suffix: str, moments: tuple[str, ...]) -> list[Line]:
    if not c.active:
        return []

    def kept(name: str, times: str, parts: Sum, note: str = "", **sizes: float) -> list[Line]:
        return c.line(name + suffix, times, parts, moments, note, sizes)

    found = kept("norms", f"{layers}B S", _norms(c), NORM[c.layer_norm])
    for masked, several in ((False, "L_u " if c.masked else "L "), (True, "L_w ")):
        if not layers and masked != (2 * c.masked > c.active):
            continue
        name, times = "masked attention" if masked else "attention", several if layers else ""
        tokens, pairs, why = _attention(c, masked)
        found += kept(name, f"{times}B S", tokens, why)
        found += kept(f"{name}, squared", f"{times}B S S_k", pairs, "every token with every other")
    found += kept(
        "feed-forward", f"{layers}B S", _feed_forward(c), f"{c.shape.facts.activation} and the product after it"
    )
    note = "for their weights' gradients; maps that read the same tensor keep it once"
    found += kept("inputs of linear maps", "B S", {"Σd_in": c.thin}, note, **{"Σd_in": _inputs(c, bool(layers))})
    if c.shape.facts.dropout:
        found += kept("dropout", f"{layers}B S", {"h": 2}, "a mask of one byte a number, after each sub-layer")
    if c.amp:
        n = sum(
            m.weight * (c.active if layers else 1)
            for m in c.layer_modules
            if m.kind != "norm" and not (c.quantized and m.is_linear)
        )
        found += kept("weights in bf16", "", {"N_cast": 2}, "autocast's copies", N_cast=n)
    return found


NORM = {
    True: "LayerNorm keeps its input",
    False: "RMSNorm keeps its input in fp32, and what it makes of it where its scale is trained",
}


def _norms(c: Case) -> Sum:
    """Bytes a token for the norms of one layer."""
    main = c.norms()
    if c.layer_norm:
        return {"h": c.wide * len(main), "": 2 * c.wide * len(main)}
    trained = sum(c.trains(m) for m in main)
    parts: dict[str, float] = {"h": 4 * len(main) + (4 if c.sandwiched else c.wide) * trained, "": 4 * len(main)}
    for start, width, rows in (("q_", "q", "n_q"), ("k_", "kv", "n_kv")):
        for m in c.norms(start):
            parts[width] = 4 + (4 if c.sandwiched else c.thin) * c.trains(m)
            parts[rows] = 4 * (m.parameters["weight"][-1] == c.shape.facts.head_size)  # one for each head
    return parts


def _attention(c: Case, masked: bool) -> tuple[Sum, Sum, str]:
    """Bytes a token, bytes a pair of tokens, and the kernel, for one layer."""
    facts, e = c.shape.facts, c.thin
    grouped = facts.kv_heads != facts.heads
    if c.spec.attention == "eager":
        old = any(m.kind == "conv1d" for m in c.layer_modules)  # GPT-2's own, in the base's format throughout
        pairs = e if e == 4 or old else 4 + e
        dropped = 1 + e if facts.attention_dropout else 0
        return (
            {"q": 3 * e if grouped else e, "kv": 0 if grouped else 2 * e},
            {"n_q": pairs + dropped},
            "softmax in fp32",
        )
    if masked:  # true and false as 0 and -inf, in the data's format; a head of keys for each of queries
        copied = 1 < facts.kv_heads < facts.heads
        fused = c.method.before_layers and any(
            m.role == "query+key+value" for m in c.layer_modules
        )  # queries hold it all
        parts = {"q": e * (4 if copied else 2), "kv": (0 if copied else 2 * e) + 2 * e * fused, "n_q": 4}
        return parts, {"": e}, "a mask keeps flash away; the memory-efficient kernel keeps it too"
    if not _output_is_kept(c):
        return (
            {"q": 3 * e},
            {"n_q": 4},
            "grouped heads in fp32 have no kernel: plain products, with copies of keys and values",
        )
    turned = c.rotary and any(m.role == "query+key+value" for m in c.layer_modules)  # copies of a part of one tensor
    parts = {"q": e * (2 + turned), "kv": e * (2 + turned), "n_q": 4}
    kernel = "flash" if e == 2 else "the memory-efficient kernel"
    return parts, {}, f"{kernel} keeps queries, keys, values, its output and a sum in fp32"


def _output_is_kept(c: Case) -> bool:
    """Whether attention itself keeps its output, which the next linear map reads."""
    plain = c.thin == 4 and c.shape.facts.kv_heads != c.shape.facts.heads and not c.masked
    return c.spec.attention != "eager" and not plain


def _feed_forward(c: Case) -> Sum:
    """Bytes a token between the first and the last linear map of one layer's feed-forward."""
    e = c.thin
    if c.shape.facts.experts:
        trained = any(c.trains(m) for m in c.layer_modules if "gate_up_proj" in m.parameters)
        return {"k f": e * (3 + trained), "k h": e * (1 + trained), "E": 4, "k": ROUTING}
    if c.gated:
        return {"f": 3 * e}
    return {"f": e * PLAIN.get(c.shape.facts.activation, 1)}


def _inputs(c: Case, whole: bool) -> int:
    """Numbers a token, over all layers or in one: inputs that a weight's gradient needs, or an adapter without a copy."""
    shared = [k for k in c.kept("token") if k.of in ("input", "factor") and _is_shared(c)]
    readers = {id(t.module) for t in c.targets if any(k.value(t.module, c.spec) for k in shared)}
    widths: dict[str, int] = {}
    for m in c.layer_modules:
        router = m.kind == "other" and len(m.parameters.get("weight", ())) == 2
        if not (m.is_linear or router) or not (c.trains(m) or id(m) in readers or c.spec.quantization == "int8"):
            continue
        role = m.role.split("+")[0]
        kept = role == "attention output" and _output_is_kept(c)
        if kept or (role == "down" and c.shape.facts.activation == "relu"):
            continue
        stream = STREAMS.get(role, "feed-forward" if router else m.name)
        if c.amp and stream in STREAMS.values():
            stream = m.name  # autocast makes each map a copy of its own
        count = sum(n >= c.lowest for n in m.layers) if whole else 1
        widths[stream] = max(widths.get(stream, 0), m.d_in * count)
    return sum(widths.values())


def _is_shared(c: Case) -> bool:
    """Whether an adapter reads the base's own tensor, for want of a difference in format."""
    dropped = c.spec.dropout and any(k.dropout for k in c.method.keeps)
    return not c.amp and c.adapter == c.wide and not dropped


def _bytes(c: Case, keep: Keep) -> int:
    if keep.of in ("input", "factor") and _is_shared(c):
        return 0  # counted among the inputs of linear maps
    if keep.of == "weight":
        return 0 if c.adapter == c.wide else c.adapter
    return {"base": c.thin, "mask": 1, "factor": c.adapter}.get(keep.of, c.adapter_numbers)


def methods_own(c: Case, counted: Counted, moments: tuple[str, ...], suffix: str = "") -> list[Line]:
    """What the method keeps at these modules, each so many times."""
    counted, sizes = list(counted), dict[str, float]()
    parts: dict[str, dict[str, float]] = {"token": {}, "module": {}}
    for keep in c.kept("token", "module"):
        key = _summed(c, keep, counted, sizes)
        found = parts[keep.each]
        found[key] = found.get(key, 0) + _bytes(c, keep) * keep.coefficient
    name, why = c.method.name + suffix, "inputs in the adapter's format, and what it makes of them"
    return [
        *c.line(name, "B S", parts["token"], moments, why, sizes),
        *c.line(f"{name}, once a module", "", parts["module"], moments, "", sizes),
    ]


def _summed(c: Case, keep: Keep, counted: Counted, sizes: dict[str, float]) -> str:
    """The symbol for a sum over modules, put in `sizes`; M is their number."""
    rest = tuple(f for f in keep.factors if f != "rank")
    symbol = "Σ" + "·".join(rest) if rest else "M"
    symbol += f"({'+'.join(keep.roles)})" if keep.roles else ""
    sizes[symbol] = sum(Keep(rest, roles=keep.roles).value(m, c.spec) * n for m, n in counted)
    return f"{symbol} r" if "rank" in keep.factors else symbol
