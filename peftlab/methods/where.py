"""Where a method is attached, in words."""

from __future__ import annotations

from typing import Any

from ..base import architecture as architectures
from ..spec import parse_layers

WHERE = {"all-linear": "every linear layer", "query,value": "q and v", "q_proj,v_proj": "q and v"}
"""Target modules that have a name of their own."""


def where(spec: Any) -> str:
    """Target modules in words."""
    text = WHERE.get(spec.target_modules, spec.target_modules.replace(",", ", "))
    layers = "" if spec.layers in (None, "all") else _layers(spec)
    return f"{text} of layers {layers}" if layers else text


def _layers(spec: Any) -> str:
    """The numbers of the chosen layers, `first:4` as 0-3, as the widget writes them; empty for all."""
    n_layers = architectures.of(spec.model).n_layers
    chosen = parse_layers(spec.layers, n_layers)
    runs: list[list[int]] = []
    for layer in chosen:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    said = (str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return ",".join(said) if len(chosen) < n_layers else ""
