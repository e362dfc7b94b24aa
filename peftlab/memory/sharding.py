"""What one of several GPUs holds, what moves to CPU memory, and how much the GPUs send.

A moment of a step maps kinds to the bytes that one GPU alone would hold. Every GPU has `batch_size` examples of its own, so
activations, logits and workspace stay as they are. `strategies` says what is divided, and by whom.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .. import methods
from ..base import architecture as architectures
from ..base import models
from ..base.architecture import Architecture
from ..count import BYTES
from ..errors import SpecError
from ..spec import Resolved
from .polynomial import Polynomial, constant, total
from .strategies import PHASES, STATES, STRATEGIES, Buffer, Strategy, Tensors

Moments = Mapping[str, Mapping[str, Polynomial]]


@dataclass(frozen=True)
class Sharded:
    """A run on `n_gpus` GPUs, as one of them sees it."""

    moments: dict[str, dict[str, Polynomial]]
    """Bytes on one GPU. The kind `communication` is the buffers."""
    buffers: tuple[Buffer, ...]
    """What `communication` consists of, each with its derivation and source."""
    in_cpu: Polynomial
    """Bytes of CPU memory for one GPU; `n_gpus` times that where one host has them all."""
    sent: Polynomial
    """Bytes that one GPU sends in an optimizer step: (N − 1)/N of a tensor each time that ZeRO, section 7, counts it."""
    note: str
    """What the strategy does, with its sources."""


def plan(moments: Moments, spec: Resolved, largest_layer: int, trainable: Polynomial) -> Sharded:
    """What one of the run's GPUs holds, from what one alone would.

    A name in `moments` begins with forward, backward, optimizer or after; any other is taken for backward.
    `largest_layer` is the bytes of the weights gathered at once: a layer's, or the embedding's or head's where that is
    larger. `trainable` is the number of trained parameters. Raises SpecError for settings that exclude each other.
    """
    strategy = _strategy(spec)
    n, passes = spec.n_gpus, spec.accumulation
    run = _tensors(moments, spec, largest_layer, trainable)
    buffers = tuple(strategy.buffers(run))
    divided = set(strategy.divided) - set(strategy.whole_between if passes > 1 else ())
    moved = strategy.offloads.get(spec.offload, ())
    share = {kind: 1 / n if kind in divided else 1 for kind in STATES}
    left = {**share, **dict.fromkeys(moved, 0)}
    left["temporaries"] = left["optimizer"]
    found = {}
    for name, kinds in moments.items():
        phase = next((p for p in PHASES if name.startswith(p)), "backward")
        found[name] = {kind: whole * left.get(kind, 1) for kind, whole in kinds.items()}
        found[name]["communication"] = total(b.size for b in buffers if phase in b.phases)
    nothing = Polynomial()
    largest = {kind: max((kinds.get(kind, nothing) for kinds in moments.values()), key=run.at) for kind in moved}
    weights_each_pass, gradients_each_pass, each_step = strategy.sent
    sent = run.weights * (weights_each_pass * passes) + run.gradients * (gradients_each_pass * passes + each_step)
    in_cpu = total(size * share[kind] for kind, size in largest.items())
    return Sharded(found, buffers, in_cpu, sent * ((n - 1) / n), strategy.note)


def _tensors(moments: Moments, spec: Resolved, largest_layer: int, trainable: Polynomial) -> Tensors:
    each = BYTES[spec.trained_precision]
    gradients = trainable * each
    first = next(iter(moments.values()))
    weights = total(first.get(kind, Polynomial()) for kind in STATES[:2])  # the same at every moment
    named = models.find(spec.model).config is not None  # a bare count has no layers to look at
    by_layer = gradients * _layer_share(architectures.of(spec.model), spec) if named else constant(largest_layer)
    return Tensors(spec, each, largest_layer, weights, gradients, by_layer)


def _layer_share(shape: Architecture, spec: Resolved) -> float:
    """The largest share of the trained parameters that one layer has, or one module outside the layers."""
    trained: Counter[str | int] = Counter()
    for t in methods.targets(shape, spec):
        for place in t.layers or (t.module.name,):
            trained[place] += methods.find(spec.method).trained(t.module, spec)
    return max(trained.values()) / sum(trained.values())


def _strategy(spec: Resolved) -> Strategy:
    """The run's strategy. Raises SpecError where the settings exclude each other."""
    sharding, offload = spec.sharding, spec.offload
    strategy = STRATEGIES[sharding]
    if sharding == "none" and spec.n_gpus > 1:
        raise SpecError(f"sharding=none: {spec.n_gpus} GPUs would train as many models; set it to ddp, or n-gpus to 1")
    if offload not in ("none", *strategy.offloads):
        able = " or ".join(key for key, other in STRATEGIES.items() if offload in other.offloads)
        also = f", or offload to {' or '.join(strategy.offloads)}" if strategy.offloads else ""
        raise SpecError(f"offload={offload}: sharding={sharding} moves no such thing; set sharding to {able}{also}")
    if spec.quantization == "int8" and "frozen_weights" in strategy.divided:
        raise SpecError(
            f"sharding={sharding}: int8 weights cannot be divided (peft issue 2833); set it to zero2, or quantization to nf4"
        )
    return strategy
