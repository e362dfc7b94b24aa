"""Where a method is attached, in words."""

from __future__ import annotations

from itertools import groupby

from ..base import architecture as architectures
from ..spec import Resolved, parse_layers

WHERE = {"all-linear": "every linear layer", "query,value": "q and v", "q_proj,v_proj": "q and v"}
"""Target modules that have a name of their own."""


def where(spec: Resolved) -> str:
    """Target modules in words, and the layers where not all are chosen: `q and v of layers 0-3,7`."""
    text = WHERE.get(spec.target_modules, spec.target_modules.replace(",", ", "))
    layers = "" if spec.layers in ("", "all") else _layers(spec)
    return f"{text} of layers {layers}" if layers else text


def _layers(spec: Resolved) -> str:
    """The numbers of the chosen layers, `first:4` as 0-3, as the widget writes them; empty for all."""
    n_layers = architectures.of(spec.model).n_layers
    chosen = parse_layers(spec.layers, n_layers)
    if len(chosen) == n_layers:
        return ""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(chosen), lambda placed: placed[1] - placed[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
