"""What a module does in its layer, told by its shapes and its siblings; by words of its name only where no shape can tell."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .modules import Module

WORDS = {
    "query": r"w?q|query",
    "key": r"w?k|key",
    "value": r"w?v|value",
    "key+value": r"c?kv",
    "query+key+value": r"w?qkv|query_key_value|c_attn",
}
"""Role → the words by which families tell apart what no shape does: queries, keys and values."""
ROLES = (*WORDS, "attention output", "gate", "up", "gate+up", "down")
"""The roles of maps in a layer; a fused one has several, joined by +."""
OUT = re.compile(r"(^|[._])(w?o|out|output|dense)([._]|$)", re.IGNORECASE)
"""Words that tell an attention's last map from others of the same shape, such as its gate."""


def told(modules: Sequence[Module], hidden: int, widths: Collection[int]) -> dict[Module, str]:
    """The role of each linear map and each experts' parameter that has one.

    `hidden` is the width of what layers pass on; `widths` are the numbers of the config that a feed-forward may be as wide as.
    """
    found: dict[Module, str] = {}
    for layer in _layers(modules):
        found |= {m: role for m, role in _of_layer(layer, hidden, widths).items() if m not in found}
    return found


def _layers(modules: Sequence[Module]) -> Iterator[list[Module]]:
    """The modules of each layer, for every combination of them that the model has."""
    seen = set()
    for stack in dict.fromkeys(m.stack for m in modules if m.layers):
        own = [m for m in modules if m.stack == stack]
        for n in sorted({n for m in own for n in m.layers}):
            layer = [m for m in own if n in m.layers]
            if (names := tuple(m.name for m in layer)) not in seen:
                seen.add(names)
                yield layer


def _of_layer(layer: list[Module], hidden: int, widths: Collection[int]) -> dict[Module, str]:
    maps = [m for m in layer if m.is_linear or m.kind == "experts"]
    found = _attention(maps, hidden)
    places = {place_of(m) for m, role in found.items() if role != "attention output"}
    convolved = {m.parent for m in layer if m.kind == "other" and len(m.parameters.get("weight", ())) == 3}
    rest = [m for m in maps if m not in found and m.parent not in convolved and not any(map(m.is_below, places))]
    return found | _feed_forward(rest, hidden, widths)


def _attention(maps: list[Module], hidden: int) -> dict[Module, str]:
    """Roles in each block whose maps make queries, keys and values, by one map or several."""
    said = {m: role for m in maps if m.is_linear and (role := _said(m))}
    found: dict[Module, str] = {}
    for place in sorted(set(map(place_of, said)), key=len):
        block = {m: role for m, role in said.items() if place_of(m) == place}
        inner = any(place.startswith(f"{place_of(m)}.") for m in found)
        if inner or {part for role in block.values() for part in role.split("+")} != {"query", "key", "value"}:
            continue  # such as an indexer inside attention, or the key and value of RWKV, which has no query
        for role in dict.fromkeys(block.values()):
            alike = [m for m, own in block.items() if own == role]
            # of a low-rank pair only the second makes heads
            found |= dict.fromkeys([m for m in alike if m.d_in < hidden] or alike, role)
        rest = [m for m in maps if m not in said and m.is_linear and m.d_out == hidden]
        near = nearest(place, rest)
        if last := [m for m in near if OUT.search(m.name.removeprefix(place)) and "gate" not in m.short_name] or near:
            found[last[-1]] = "attention output"
    return found


def _said(module: Module) -> str:
    """What a name says of queries, keys and values; a map inside a wrapper has the wrapper's name."""
    name = module.parent if module.short_name == "linear" else module.name
    leaf = name.rpartition(".")[2]
    return next(
        (r for r, words in reversed(WORDS.items()) if re.search(rf"(^|_)({words})(_|$)", leaf, re.IGNORECASE)), ""
    )


def latent(module: Module, modules: Collection[Module]) -> int:
    """How wide the first of a low-rank pair is whose second makes keys and values; 0 where `module` is no such second."""
    alike = [m for m in modules if (m.parent, m.layers) == (module.parent, module.layers) and m is not module]
    return next((m.width for m in alike if m.is_linear and m.width >= module.d_in and _said(m) == "key+value"), 0)


def place_of(module: Module) -> str:
    """The block that a map belongs to."""
    return module.parent.rpartition(".")[0] if module.short_name == "linear" else module.parent


def nearest(place: str, modules: list[Module]) -> list[Module]:
    """Those of `modules` that share most of the path `place`, inside the same layer."""
    while place:
        if near := [m for m in modules if m.is_below(place)]:
            return near
        place = "" if place.endswith(".*") else place.rpartition(".")[0]
    return []


def _feed_forward(maps: list[Module], hidden: int, widths: Collection[int]) -> dict[Module, str]:
    """Roles in each network as wide as the config says: one or two maps widen, and the last narrows again."""
    found: dict[Module, str] = {}
    for last in maps:
        inner, outer = last.features
        if outer != hidden or not any(inner % width == 0 or width == 2 * inner for width in widths):
            continue
        alike = [m for m in maps if m.kind == last.kind and m.features[1] in (inner, 2 * inner) and m not in found]
        if inner == outer:  # then a square map before it tells nothing
            alike = [m for m in alike if m.features[0] != m.features[1]]
        first = nearest(last.parent, [m for m in alike if m is not last])[:2]
        if len(first) == 1:
            found[first[0]] = "gate+up" if first[0].features[1] == 2 * inner else "up"
        elif first:
            gate = next((m for m in first if "gate" in m.short_name), first[0])
            found |= {m: "gate" if m is gate else "up" for m in first}
        if first:
            found[last] = "down"
    return found
