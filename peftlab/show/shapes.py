"""What the LoRA tab's script counts, draws and writes from: a model's shapes, the registry's terms, and words."""

import re
from collections import Counter
from collections.abc import Mapping
from html import escape

from ..base import architecture, models
from ..count import BYTES, why_not
from ..methods import METHODS, Method
from ..methods.selection import RANK_LIMITS, RANK_REFUSAL, USUAL_RANK, WHERE
from ..resolve import resolve
from ..spec import RunSpec, parse_layers

FAMILY = tuple(key for key, method in METHODS.items() if "rank" in method.settings)
"""The methods that have a rank."""
WORDS = {
    "sentence": "{what} on {where} trains {trained} of {total} numbers: {percent}. The adapter is {size}.",
    "where": WHERE,
    "no_target": "no target module is ticked: nothing would be trained; tick at least one",
    "no_layer": "no layer is chosen: nothing would be trained; choose at least one",
    "bad_rank": "rank={rank}: a rank is a whole number from 1 to 65,536; try 8",
    "bad_alpha": "alpha={alpha}: ΔW is multiplied by alpha, so at 0 the adapter does nothing; it must be above 0 and at most "
    "1,000,000; try 16",
    "rank": RANK_REFUSAL,
    "usual_rank": USUAL_RANK,
    "matrix": "<b>{name}</b>, drawn to scale: one adapter has {one} numbers against {base}: {share}.",
    "before": "It breaks even at rank {even} = dk / (d + k), {times} times rank {rank}.",
    "past": "Rank {rank} is past break-even, {even} = dk / (d + k): the adapter is larger than the matrix, and still can "
    "express no more than the matrix trained whole.",
    "swapped": "It is stored as inputs × outputs (Conv1D) and drawn as outputs × inputs, the way it multiplies.",
    "scale": "ΔW = (alpha / r) · BA. With alpha {alpha} and rank {rank}, LoRA multiplies BA by alpha / r = {plain}; rsLoRA by "
    "alpha / √r = {root}, so that the update does not fade as the rank grows.",
    "no_alpha": "This method has no alpha: its trained vectors are the scale.",
    "spoken": "W is {d_out} by {d_in} and frozen; B is {d_out} by {rank} and A is {rank} by {d_in}, both trained; their "
    "product, the update, is as large as W. Drawn to one scale.",
    "axis": "An adapter's parameters rise with its rank and reach the matrix's own at rank {even}",
    "toy": "Rank {rank}: {numbers} trained numbers stand for 25. Touch a number of BA to see what made it.",
    "toy_past": "Rank {rank}: {numbers} numbers for 25, past break-even (5 · 5 / (5 + 5) = 2.5).",
    **{key: said for key, (_, said) in RANK_LIMITS.items()},
}


def value(spec: RunSpec, refused: Mapping[str, str] | None = None) -> dict[str, object]:
    """What the page needs to know of `spec` and its model, and which of its numbers were `refused`, with their text.

    Raises SpecError where LoRA has nothing to do there.
    """
    spec = of_family(spec)
    of = resolve(spec)
    shape = architecture.of(of.model)
    low_rank = METHODS[of.method].low_rank
    able, wanted = shape.adaptable(low_rank), shape.targets(of.target_modules, low_rank)
    linear = able + [m for m in wanted if m not in able]
    names = architecture.told_apart([m.name for m in linear])
    return {
        "key": of.model,
        "model": escape(models.find(of.model).name),
        "total": shape.total_parameters,
        "n_layers": shape.n_layers,
        "modules": [
            {
                "name": name,
                "label": escape(label).replace(".", ".<wbr>"),
                "path": escape(m.name),
                "role": m.role,
                "d_in": m.d_in,
                "d_out": m.d_out,
                "full_rank": m.full_rank,
                "swapped": m.kind == "conv1d",
                "experts": m.kind == "experts",
                "parameters": m.weight + m.bias,
                "layers": m.layers,
            }
            for name, label, m in zip(names, _labels(names, linear), linear, strict=True)
        ],
        "rest": _rest(shape, linear),
        "methods": {key: _method(METHODS[key], spec.model) for key in FAMILY},
        "bytes": BYTES[of.adapter_precision],
        "adam": 2 * BYTES["fp32"],  # two moments
        "at": {
            "method": spec.method,
            "rank": of.rank,
            "alpha": spec.alpha,
            "targets": [name for name, m in zip(names, linear, strict=True) if m in wanted],
            "layers": parse_layers(of.layers, shape.n_layers),
            "layers_said": spec.layers,
            "refused": {
                n: re.sub(r"[^\w.+-]", "", text)[:40] for n, text in (refused or {}).items() if n in ("rank", "alpha")
            },
        },
    }


def _labels(names: list[str], linear: list[architecture.Module]) -> list[str]:
    """What tells modules apart without the numbers of layers, where that can be."""
    plain = [
        ".".join(part for part in m.name.split(".") if part not in ("*", "block", "layer") and not part.isdigit())
        for m in linear
    ]
    return architecture.told_apart(plain) if len(set(plain)) == len(plain) else names


def of_family(spec: RunSpec) -> RunSpec:
    """`spec`, with LoRA in place of a method that has no rank."""
    return spec if spec.method in FAMILY else spec.but(method="lora")


def _rest(shape: architecture.Architecture, linear: list[architecture.Module]) -> list[dict[str, object]]:
    """What LoRA leaves alone by default: embeddings, norms, the head."""
    rest: Counter[str] = Counter()
    for m in shape.modules:
        if m not in linear:
            rest[m.role or m.short_name] += (m.weight + m.bias) * m.count
    return [{"name": name, "parameters": n} for name, n in rest.items() if n]


def _method(method: Method, model: str | None) -> dict[str, object]:
    """How a method counts, and its rule for alpha as (constant, per rank); None where it has no alpha.

    `experts` is None where it leaves experts in one parameter frozen, else why it cannot adapt them; empty where it can.
    """
    usual = RunSpec(model=model, method=method.key)
    one, two = (resolve(usual.but(rank=rank)).alpha for rank in (1, 2))
    of = resolve(usual)
    return {
        "name": method.name,
        "terms": [[t.coefficient, t.factors] for t in method.terms],
        "saved": [[t.coefficient, t.factors] for t in method.saved or method.terms],
        "limit": method.rank_limit,
        "experts": why_not(method.key, model or models.DEFAULT) if method.low_rank else None,
        "usual": of.rank,
        "bytes": BYTES[of.adapter_precision],
        "alpha": None if "alpha" in of.unread else [2 * one - two, two - one],
        "root": any("√" in box for box in method.drawing.branch),
    }
