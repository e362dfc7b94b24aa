"""Serving many fine-tunings at once: their adapters on one base model, against a full copy for each.

Weights, adapters and the cache of keys and values are counted. Left out are the little that a forward pass holds besides and
what a server reserves ahead (vLLM pads every adapter to its largest rank).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base import architecture as architectures
from ..base import models
from ..count import BYTES, count
from ..errors import SpecError
from ..spec import Resolved
from .closed_form import predict

CACHED_BYTES = 2
"""A number in the cache is 16-bit, whatever the weights are."""


@dataclass(frozen=True)
class Serving:
    """Bytes on the GPUs that serve."""

    adapters: int
    """Fine-tunings that are served."""
    streams: int
    """Answers that are written at once, whichever adapters they use."""
    copy: int
    """Weights of one whole model, in the run's precision and quantization."""
    base: int
    """Weights that all adapters share: `copy`, or nothing where the method changes every weight."""
    adapter: int
    """One adapter as it is saved; for a method that trains the model's own tensors, the changed ones."""
    cache_per_stream: int
    """Keys and values of one answer, in every layer."""

    @property
    def all_adapters(self) -> int:
        return self.adapters * self.adapter

    @property
    def cache(self) -> int:
        """Keys and values of all streams."""
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
    """What serving takes of so many fine-tunings, answers at once, and tokens for each answer: prompt, answer, virtual ones.

    Raises SpecError for a model that keeps no cache, for a bare count, and for tokens beyond what the model reads.
    """
    for name, value in (("adapters", adapters), ("streams", streams), ("context", context)):
        if value < 1:
            raise SpecError(f"{name}={value}: serving takes at least 1; try 1")
    entry, shape = models.find(spec.model), architectures.of(spec.model)
    if not entry.is_causal:
        raise SpecError(f"model={spec.model}: it writes no text token by token, and so keeps no cache; try gpt2")
    if shape.context and context > shape.context:
        raise SpecError(f"context={context}: {entry.name} reads {shape.context:,} tokens; try {shape.context}")
    report = count(spec)
    changed = report.total_parameters - report.frozen_parameters
    copy = predict(spec).frozen_weights + changed * BYTES[spec.precision]
    facts = shape.facts
    layer = 2 * facts.kv_heads * facts.head_size * CACHED_BYTES  # a key and a value
    within = min(facts.window or context, context)  # tokens that a layer with a window keeps
    kept = (shape.n_layers - facts.windowed) * context + facts.windowed * within
    base = copy if report.frozen_parameters else 0
    return Serving(adapters, streams, copy, base, adapter=report.adapter_bytes, cache_per_stream=kept * layer)
