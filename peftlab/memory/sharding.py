"""What one of several GPUs holds, what moves to CPU memory, and how much the GPUs send.

A moment of a step is a mapping from kind to the bytes that one GPU alone would hold. Every GPU has `batch_size` examples of
its own, so activations, logits and workspace stay as they are. What is divided, and by whom, is in `strategies`.
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
from ..resolve import resolve
from ..spec import Resolved
from .polynomial import Polynomial, constant, total
from .strategies import PHASES, STATES, STRATEGIES, Buffer, Case, Strategy

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
    """A name in `moments` begins with forward, backward, optimizer or after; any other is taken for backward.

    `largest_layer` is the bytes of the weights gathered at once: a layer's, or the embedding's or head's where that is
    larger. `trainable` is the number of trained parameters. Raises SpecError for settings that exclude each other.
    """
    spec = resolve(spec)
    strategy = _strategy(spec)
    n, passes = spec.n_gpus, spec.accumulation
    case = _case(moments, spec, largest_layer, trainable)
    buffers = tuple(strategy.buffers(case))
    divided = set(strategy.divided) - set(strategy.whole_between if passes > 1 else ())
    share = {kind: 1 / n if kind in divided else 1 for kind in STATES}
    moved = strategy.offloads.get(spec.offload, ())
    found = {}
    for name, kinds in moments.items():
        phase = next((p for p in PHASES if name.startswith(p)), "backward")
        held = {}
        for kind, whole in kinds.items():
            like = "optimizer" if kind == "temporaries" else kind
            held[kind] = whole * (0 if like in moved else share.get(like, 1))
        found[name] = held | {"communication": total(b.size for b in buffers if phase in b.phases)}
    in_cpu = total(_largest(moments, kind, case) * share[kind] for kind in moved)
    weights_each_pass, gradients_each_pass, each_step = strategy.sent
    sent = case.weights * (weights_each_pass * passes) + case.gradients * (gradients_each_pass * passes + each_step)
    return Sharded(found, buffers, in_cpu, sent * ((n - 1) / n), strategy.note)


def _case(moments: Moments, spec: Resolved, largest_layer: int, trainable: Polynomial) -> Case:
    each = BYTES[spec.trained_precision]
    gradients = trainable * each
    first = next(iter(moments.values()))
    weights = total(first.get(kind, Polynomial()) for kind in STATES[:2])  # the same at every moment
    entry = models.find(spec.model)
    share = _layer_share(architectures.of(entry.key), spec) if entry.config else 0
    by_layer = gradients * share if share else constant(largest_layer)  # a bare count has no layers to look at
    return Case(spec, each, largest_layer, weights, gradients, by_layer)


def _largest(moments: Moments, kind: str, case: Case) -> Polynomial:
    return max((kinds.get(kind, Polynomial()) for kinds in moments.values()), key=case.at)


def _layer_share(shape: Architecture, spec: Resolved) -> float:
    """Of the trained parameters, what the layer that has most of them has, or a module outside the layers."""
    trained: Counter[str | int] = Counter()
    for t in methods.targets(shape, spec):
        for place in t.layers or (t.module.name,):
            trained[place] += methods.find(spec.method).trained(t.module, spec)
    return max(trained.values()) / sum(trained.values())


def _strategy(spec: Resolved) -> Strategy:
    """Raises SpecError where the settings exclude each other."""
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
