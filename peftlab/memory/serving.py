"""Serving many fine-tunings at once: their adapters on one base model, against a full copy for each.

Weights, adapters and the cache of keys and values; the little that a forward pass holds besides is left out, as is what a
server reserves ahead (vLLM pads every adapter to its largest rank).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base import architecture as architectures
from ..base import models
from ..base.architecture import Facts
from ..count import BYTES, count
from ..errors import SpecError
from ..resolve import resolve
from ..spec import Resolved
from .closed_form import predict

CACHED_BYTES = 2
"""A number in the cache is 16-bit, whatever the weights are."""


@dataclass(frozen=True)
class Serving:
    """Bytes on the GPUs that serve."""

    spec: Resolved
    """Resolved."""
    adapters: int
    """Fine-tunings that are served."""
    streams: int
    """Answers that are written at once, whichever adapters they use."""
    context: int
    """Tokens that each stream keeps, prompt, answer and virtual tokens together."""
    copy: int
    """The weights of one whole model, in the run's precision and quantization."""
    base: int
    """Those that all adapters share: `copy`, or nothing where the method changes every weight."""
    adapter: int
    """One adapter, as it is saved; where a method trains the model's own tensors, the ones it changed."""
    cache_per_token: int
    """Keys and values of one token in every layer."""
    cache_per_stream: int
    """Of `context` tokens. A layer with a window keeps no more of them than that."""

    @property
    def all_adapters(self) -> int:
        return self.adapters * self.adapter

    @property
    def cache(self) -> int:
        """Of all streams."""
        return self.streams * self.cache_per_stream

    @property
    def on_one_base(self) -> int:
        """Base, adapters and cache."""
        return self.base + self.all_adapters + self.cache

    @property
    def as_copies(self) -> int:
        """A full model for every fine-tuning, and the same cache."""
        return self.adapters * self.copy + self.cache


def serve(spec: Resolved, adapters: int, streams: int, context: int) -> Serving:
    """Raises SpecError for a model that keeps no cache, for a bare count, and for tokens beyond what the model reads."""
    spec = resolve(spec)
    for name, value in (("adapters", adapters), ("streams", streams), ("context", context)):
        if value < 1:
            raise SpecError(f"{name}={value}: serving takes at least 1; try 1")
    entry, shape = models.find(spec.model), architectures.of(spec.model)
    if not entry.is_causal:
        raise SpecError(f"model={spec.model}: it writes no text token by token, and so keeps no cache; try gpt2")
    if shape.context and context > shape.context:
        raise SpecError(f"context={context}: {entry.name} reads {shape.context:,} tokens; try {shape.context}")
    report = count(spec)
    borrowed = report.trainable_parameters - report.added_parameters  # trained, but the base model's own
    copy = predict(spec).frozen_weights + borrowed * BYTES[spec.precision]
    layer = 2 * shape.facts.kv_heads * shape.facts.head_size * CACHED_BYTES
    return Serving(
        spec,
        adapters,
        streams,
        context,
        copy=copy,
        base=0 if borrowed == report.total_parameters else copy,
        adapter=report.adapter_bytes,
        cache_per_token=shape.n_layers * layer,
        cache_per_stream=_kept(shape.n_layers, shape.facts, context) * layer,
    )


def _kept(n_layers: int, facts: Facts, context: int) -> int:
    """Tokens in the cache, summed over the layers."""
    near = min(facts.window or context, context)
    return (n_layers - facts.windowed) * context + facts.windowed * near
