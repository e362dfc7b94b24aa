"""The arithmetic that a fine-tuning run takes.

Counted are the matrix products, at two operations for a multiplication and its addition, as in Kaplan et al. 2020 (arXiv
2001.08361, section 2.1) and PaLM (arXiv 2204.02311, appendix B). Left out are norms, activation functions, the optimizer and
what a method computes once a pass from its weights alone (DoRA's norm, OFT's rotation).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .. import methods
from ..base import architecture as architectures
from ..base import models
from ..base.architecture import Architecture, Module
from ..catalog import entry_of
from ..catalog.gpus import GPUS
from ..errors import SpecError
from ..spec import Resolved
from .case import decoder, follows_layers

Place = tuple[float, int]
"""(layer, stage in it) at which a token meets a module. The embedding is in layer -1, the head after the last."""
STAGES = {"query": 1, "key": 1, "value": 1, "attention output": 2, "gate": 3, "up": 3, "down": 4}
"""Order within a layer, by role. Norms come first. Experts and their router have no role and stand where a gate would."""
ATTENTION = 1
"""The stage after whose projections queries meet keys."""


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of a run. Those of one token are a mean over the tokens of an example."""

    spec: Resolved
    length: int
    """Tokens of an example, virtual ones too, if every example fills `sequence_length`: an upper bound."""
    forward: float
    """A token's forward pass, adapters included."""
    recomputed: float
    """Its second pass through the layers, with gradient checkpointing. An upper bound: PyTorch stops at the last
    tensor that it needs, which can spare each layer its last product."""
    input_gradients: float
    """The backward pass through the products: as much as forward, in attention twice that, and nothing below the lowest
    trained parameter."""
    weight_gradients: float
    """The backward pass to the weights that are trained."""

    @property
    def n_gpus(self) -> int:
        """GPUs that share the examples."""
        return 1 if self.spec.sharding == "none" else self.spec.n_gpus

    @property
    def tokens(self) -> int:
        """Tokens that all GPUs process in the whole run: an upper bound, as `length` is."""
        return self.spec.batch_size * self.spec.accumulation * self.spec.steps * self.n_gpus * self.length

    @property
    def per_token(self) -> float:
        return self.forward + self.recomputed + self.input_gradients + self.weight_gradients

    @property
    def total(self) -> float:
        """Operations of the whole run on all GPUs."""
        return self.per_token * self.tokens


def compute(spec: Resolved) -> Compute:
    """The arithmetic of a run. A bare count follows Kaplan et al.: 6N a token, or 4N with frozen weights; no attention.

    Raises SpecError where the method has nothing to train, and for models that do not write text from left to right.
    """
    entry, method = models.find(spec.model), methods.find(spec.method)
    if entry.config is None:
        if method.in_place and method.key != "full":
            raise SpecError(f"model={spec.model}: a bare count has no layers for {method.key} to choose; name a model")
        once = 2.0 * (entry.total_parameters or 0)  # a third of 6N; gradients of frozen weights are never computed
        recomputed, weights = once * spec.gradient_checkpointing, once * method.in_place
        return Compute(spec, spec.sequence_length, once, recomputed, input_gradients=once, weight_gradients=weights)
    return _of_layers(spec, methods.targets(architectures.of(spec.model), spec, decoder(spec.model).name))


def _of_layers(spec: Resolved, chosen: list[methods.Target]) -> Compute:
    method, shape = methods.find(spec.method), architectures.of(spec.model)
    facts, n = shape.facts, shape.n_layers
    embedding = any(t.module.kind == "embedding" for t in chosen)
    inserted = spec.virtual_tokens if embedding else 0
    length, prefix = spec.sequence_length + inserted, spec.virtual_tokens - inserted  # every token sees the prefix
    places = [place for t in chosen if method.trained(t.module, spec) for place in _places(t.module, t.layers, shape)]
    # under checkpointing the engine makes the embedding's output require a gradient, and so all that follows
    lowest = (-math.inf, 0) if spec.gradient_checkpointing else min(places)
    forward = recomputed = inputs = weights = 0.0
    for m in shape.modules:
        once = 2.0 * _elements(m, shape)
        forward += once * m.count
        recomputed += once * len(m.layers)
        inputs += once * sum(place > lowest for place in _places(m, m.layers, shape))
    for t in chosen:
        if method.in_place:
            elements = _elements(t.module, shape)
            trained = method.trained(t.module, spec) >= elements or (t.module.tied and embedding)
            weights += 2.0 * elements * t.count * trained
            continue
        reads, writes = _adapter(t.module, spec)
        for place in _places(t.module, t.layers, shape):
            forward += 2.0 * (reads + writes)
            recomputed += 2.0 * (reads + writes) * bool(t.layers)
            inputs += 2.0 * (writes + reads * (place > lowest))
            weights += 2.0 * (reads + writes)
    seen = (n - facts.windowed) * _seen(length) + facts.windowed * _seen(length, facts.window) + n * prefix
    attention = 4.0 * facts.heads * facts.head_size * seen
    reached = sum((layer, ATTENTION) >= lowest for layer in range(n)) / n
    again = (recomputed + attention) * spec.gradient_checkpointing
    return Compute(spec, length, forward + attention, again, inputs + 2 * attention * reached, weights)


def _elements(m: Module, shape: Architecture) -> float:
    """Weights of one `m` that a token is multiplied with: all of a linear map, the chosen ones of a layer's experts."""
    if m.is_linear:
        return m.d_in * m.d_out
    experts = shape.facts.experts
    found = [s for name, s in m.parameters.items() if experts and s[0] == experts and not name.endswith("bias")]
    share = shape.facts.experts_per_token / experts if experts else 0
    return sum(math.prod(s) * (share if len(s) == 3 else 1) for s in found)  # two dimensions are the router's


def _adapter(m: Module, spec: Resolved) -> tuple[int, int]:
    """Weights of the adapter on one `m`: of the matrix that reads, and of the one that writes. VeRA's count as trained."""
    if spec.rank:
        return spec.rank * m.d_in, spec.rank * m.d_out
    if spec.bottleneck:
        return (spec.bottleneck * (m.d_in if m.head else m.d_out),) * 2
    return (spec.block_size * m.d_in if spec.block_size else 0), 0


def _places(m: Module, layers: tuple[int, ...], shape: Architecture) -> Iterator[Place]:
    """Where a token meets `m` in these layers, or outside them."""
    for layer in layers:
        yield layer, STAGES.get(m.role.split("+")[0], 0 if m.kind == "norm" else 3)
    if not m.layers:
        yield shape.n_layers if follows_layers(m, shape) else -1, 2 * m.head + m.is_linear


def _seen(length: int, window: int = 0) -> float:
    """Mean number of positions that a token attends to, itself among them, under a causal mask and a window."""
    w = min(window or length, length)
    return w - w * (w - 1) / (2 * length)


def peak(gpu: str) -> float:
    """Dense bf16 operations a second. Raises SpecError for a GPU without bf16."""
    found = entry_of("gpu", gpu, GPUS)
    if found.bf16_tflops is None:
        raise SpecError(f"gpu={gpu}: {found.name} has no bf16, whose peak is the measure; choose one that has, as l4")
    return found.bf16_tflops * 1e12
