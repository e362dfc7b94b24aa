"""Formulas for what a plain transformer's own modules keep: attention and a feed-forward, one after the other, with norms.

Worked out from what autograd saves in transformers' code and PyTorch's kernels; for a plain transformer as in Korthikanti et
al. 2022, arXiv 2205.05198 section 4.
"""

from __future__ import annotations

from ..base.architecture import Module
from .case import Case
from .lines import Line, Sum
from .states import ALWAYS, FORWARD, HEAD, KEPT, LOSS, PASS

STREAMS = {"query": "attention", "key": "attention", "value": "attention", "gate": "feed-forward", "up": "feed-forward"}
"""Roles of linear maps that read the same tensor, which the norm before attention or the feed-forward gives."""
PLAIN = {"gelu_new": 4, "gelu_fast": 4, "quick_gelu": 3}
"""Tensors kept by activation functions that are written out in Python. One kernel keeps a single tensor: its input, or for
relu its output."""
ROUTING = 60
"""Bytes for each expert that a token goes to: sorting, places and shares."""


def around(case: Case) -> list[Line]:
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


def kept(case: Case, layers: str, suffix: str, moments: tuple[str, ...]) -> list[Line]:
    """What the base's own modules keep: in all layers where `layers` is "L ", in one where it is empty."""
    if not case.active:
        return []

    def kept(name: str, times: str, parts: Sum, note: str = "", **sizes: float) -> list[Line]:
        return case.line(name + suffix, times, parts, moments, note, sizes)

    facts = case.shape.facts
    of_norms = (
        "its input" if case.layer_norm else "its input in fp32, and what it makes of it where its scale is trained"
    )
    found = kept("norms", f"{layers}B S", _norms(case), f"{'Layer' if case.layer_norm else 'RMS'}Norm keeps {of_norms}")
    for masked, several in ((False, "L_u " if case.masked else "L "), (True, "L_w ")):
        if not layers and masked != (2 * case.masked > case.active):
            continue  # one layer stands for the kind that most layers are of
        name, times = "masked attention" if masked else "attention", several if layers else ""
        tokens, pairs, why = _attention(case, masked)
        found += kept(name, f"{times}B S", tokens, why)
        found += kept(f"{name}, squared", f"{times}B S S_k", pairs, "every token with every other")
    found += kept("feed-forward", f"{layers}B S", _feed_forward(case), f"{facts.activation} and the product after it")
    note = "for their weights' gradients; maps that read the same tensor keep it once"
    inputs = _inputs(case, bool(layers))
    found += kept("inputs of linear maps", "B S", {"Σd_in": case.product_bytes}, note, **{"Σd_in": inputs})
    if facts.dropout:
        found += kept("dropout", f"{layers}B S", {"h": 2}, "a mask of one byte a number, after each sub-layer")
    if case.amp:
        packed = case.spec.quantization != "none"
        cast = sum(m.weight for m in case.layer_modules if m.kind != "norm" and not (packed and m.is_linear))
        n = cast * (case.active if layers else 1)
        found += kept("weights in bf16", "", {"N_cast": 2}, "autocast's copies", N_cast=n)
    return found


def _norms(case: Case) -> Sum:
    """Bytes a token for the norms of one layer: their input, and in fp32 one or two numbers for each row."""
    n = len(case.norms)
    if case.layer_norm:
        return {"h": case.stream_bytes * n, "": 2 * case.stream_bytes * n}
    trained = sum(case.trains(m) for m in case.norms)
    parts: dict[str, float] = {"h": 4 * n + (4 if case.sandwiched else case.stream_bytes) * trained, "": 4 * n}
    widths = {"q_": ("q", "n_q"), "k_": ("kv", "n_kv")}
    for m in (m for m in case.layer_modules if m.kind == "norm" and m not in case.norms):
        width, rows = widths[m.short_name[:2]]
        parts[width] = 4 + (4 if case.sandwiched else case.product_bytes) * case.trains(m)
        parts[rows] = 4 * (m.parameters["weight"][-1] == case.shape.facts.head_size)  # else the norm is over all heads
    return parts


def _attention(case: Case, masked: bool) -> tuple[Sum, Sum, str]:
    """Bytes a token of a layer, bytes a pair of tokens, and the kernel. Fused ones keep no pairs (arXiv 2307.08691, 3.1)."""
    facts, e = case.shape.facts, case.product_bytes
    fused_map = any(m.role == "query+key+value" for m in case.layer_modules)
    if case.spec.attention == "eager":
        gpt2 = any(m.kind == "conv1d" for m in case.layer_modules)  # its own attention has no softmax in fp32
        tokens = {"q": 3 * e} if facts.kv_heads != facts.heads else {"q": e, "kv": 2 * e}
        softmax = e if e == 4 or gpt2 else 4 + e
        return tokens, {"n_q": softmax + (1 + e if facts.attention_dropout else 0)}, "softmax in fp32"
    if masked:  # true and false as 0 and -inf, in the data's format; a head of keys for each of queries
        copied = 1 < facts.kv_heads < facts.heads
        whole = case.method.before_layers and fused_map  # queries hold the tensor that keys and values are parts of
        parts = {"q": e * (4 if copied else 2), "kv": (0 if copied else 2 * e) + 2 * e * whole, "n_q": 4}
        return parts, {"": e}, "a mask keeps flash away; the memory-efficient kernel keeps it too"
    if not _keeps_output(case):
        plain = "grouped heads in fp32 have no kernel: plain products, with copies of keys and values"
        return {"q": 3 * e}, {"n_q": 4}, plain
    rotated = case.rotary and fused_map  # rotation copies queries and keys out of one tensor, which values keep alive
    kernel = "flash" if e == 2 else "the memory-efficient kernel"
    note = f"{kernel} keeps queries, keys, values, its output and a sum in fp32"
    return {"q": e * (2 + rotated), "kv": e * (2 + rotated), "n_q": 4}, {}, note


def _keeps_output(case: Case) -> bool:
    """Whether attention itself keeps its output, which the next linear map reads."""
    grouped = case.shape.facts.kv_heads != case.shape.facts.heads
    plain = case.product_bytes == 4 and grouped and not case.masked
    return case.spec.attention != "eager" and not plain


def _feed_forward(case: Case) -> Sum:
    """Bytes a token between the first and the last linear map of one layer's feed-forward."""
    e, facts = case.product_bytes, case.shape.facts
    if facts.experts:
        trained = bool(case.adapted_experts) or any(case.trains(m) for m in case.layer_modules if m.kind == "experts")
        return {"k f": e * (3 + trained), "k h": e * (1 + trained), "E": 4, "k": ROUTING}
    return {"f": e * (3 if case.shape.with_role("gate") else PLAIN.get(facts.activation, 1))}


def _inputs(case: Case, whole: bool) -> int:
    """Numbers a token, in all layers or in one: inputs that a linear map or its gradient needs and nothing else keeps."""
    reading = {id(m) for m in readers(case)}
    relu = case.shape.facts.activation == "relu"
    widths: dict[str, int] = {}
    for m in case.layer_modules:
        router = m.kind == "other" and len(m.parameters.get("weight", ())) == 2
        needed = case.trains(m) or id(m) in reading or case.spec.quantization == "int8"
        role = m.role.split("+")[0]
        kept = (role == "attention output" and _keeps_output(case)) or (role == "down" and relu)
        if kept or not needed or not (m.is_linear or router):
            continue
        stream = STREAMS.get(role, "feed-forward" if router else m.name)
        if case.amp and stream in STREAMS.values():
            stream = m.name  # autocast makes each map a copy of its own
        count = sum(n >= case.lowest for n in m.layers) if whole else 1
        widths[stream] = max(widths.get(stream, 0), m.d_in * count)
    return sum(widths.values())


def readers(case: Case) -> list[Module]:
    """The modules whose adapters keep the base's own input."""
    shared = [k for k in case.kept("token") if k.of in ("input", "factor") and shares_input(case)]
    return [t.module for t in case.targets if any(k.value(t.module, case.spec) for k in shared)]


def shares_input(case: Case) -> bool:
    """Whether an adapter reads the base's own tensor: both have one format, and no dropout comes between them."""
    dropped = case.spec.dropout and any(k.dropout for k in case.method.keeps)
    return not case.amp and case.trained_bytes == case.stream_bytes and not dropped
