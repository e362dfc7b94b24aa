"""What a training step's memory depends on, read from the run's settings and the architecture's shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from .. import methods
from ..base import architecture as architectures
from ..base import models
from ..base.architecture import Architecture, Module
from ..base.models import BaseModel
from ..count import BYTES
from ..errors import SpecError
from ..methods import SIZES, Keep, Method, Target
from ..spec import Resolved
from .lines import BATCH, LENGTH, RANK, Line, Polynomial, Size, Sizes, Sum, formula, product, total

SYMBOLS = {
    "B": "examples in a batch", "S": "tokens of an example, with virtual ones",
    "S_k": "keys that a token sees", "r": "rank", "L": "layers that a gradient reaches", "L_w": "those with a mask",
    "L_u": "those without", "h": "width", "q": "width of all queries", "kv": "width of all keys", "n_q": "query heads",
    "n_kv": "key heads", "d": "width of a head", "f": "width of the feed-forward, or of one expert", "E": "experts",
    "k": "experts for a token", "V": "vocabulary", "h_V": "width of the head's input", "M": "adapted modules",
    "Σd_in": "inputs of those modules together", "Σd_out": "their outputs together", "N": "trained parameters",
    "N_frozen": "frozen parameters", "N_packed": "quantized ones", "d_in": "a module's inputs", "d_out": "its outputs",
}  # fmt: skip
"""What the symbols of the formulas stand for, except those that their line's name explains."""


def decoder(model: str) -> BaseModel:
    """The entry of a model that writes text. Raises SpecError for any other."""
    entry = models.find(model)
    if not entry.is_causal:
        raise SpecError(
            f"model={entry.said}: only models that write text are trained here; name a decoder such as gpt2"
        )
    return entry


def follows_layers(module: Module, shape: Architecture) -> bool:
    """Whether a module outside the layers runs after them: the head, the last norm, or a map of the hidden state."""
    return module.head or module.kind == "norm" or (module.is_linear and module.d_in == shape.hidden_size)


@dataclass(frozen=True)
class Case:
    """One training step of one model with one method."""

    spec: Resolved
    shape: Architecture
    method: Method
    targets: tuple[Target, ...]
    """The modules in which the method has something to train."""

    @classmethod
    def of(cls, spec: Resolved) -> Case:
        """The step of a run. Raises SpecError for a model without layers, and as `methods.targets` does."""
        entry, method, shape = decoder(spec.model), methods.find(spec.method), architectures.of(spec.model)
        chosen = methods.targets(shape, spec, entry.name)
        return cls(spec, shape, method, tuple(t for t in chosen if method.trained(t.module, spec)))

    @property
    def amp(self) -> bool:
        """Whether autocast runs matrix products in bf16 on fp32 weights."""
        return self.spec.precision == "amp"

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number in the residual stream and in what norms give; autocast leaves those in fp32."""
        return BYTES[self.spec.precision]

    @property
    def product_bytes(self) -> int:
        """Bytes of a number that a matrix product of the base gives."""
        return 2 if self.amp else self.stream_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained parameter."""
        return BYTES[self.spec.trained_precision]

    @property
    def adapter_product_bytes(self) -> int:
        """Bytes of a number that the adapter's matrix products take and give."""
        return 2 if self.amp else self.trained_bytes

    @cached_property
    def lowest(self) -> int:
        """The first layer that a gradient reaches; the number of layers where none does."""
        if self.spec.gradient_checkpointing:
            return 0  # the layers' inputs are made to require gradients
        # the last map of a layer sends no gradient to anything that the layer keeps
        inside = [min(t.layers) + (t.module.role == "down") for t in self.targets if t.module.layers]
        after = all(follows_layers(t.module, self.shape) for t in self.targets if not t.module.layers)
        return min([*inside, self.shape.n_layers]) if after else 0

    @cached_property
    def active(self) -> int:
        """Layers that keep anything for the backward pass."""
        return self.shape.n_layers - self.lowest

    @property
    def masked(self) -> int:
        """Active layers whose attention gets a mask: all after a prefix, else those with a window that the text fills."""
        if self.method.before_layers:
            return self.active
        facts = self.shape.facts
        full = facts.window and self.spec.sequence_length + self.inserted >= facts.window
        return min(facts.windowed, self.active) if full else 0

    @property
    def inserted(self) -> int:
        """Virtual tokens that run through the layers with the text; a prefix is only looked at."""
        return 0 if self.method.before_layers else self.spec.virtual_tokens

    @cached_property
    def layer_modules(self) -> tuple[Module, ...]:
        return tuple(m for m in self.shape.modules if m.layers)

    @cached_property
    def norms(self) -> list[Module]:
        """Norms of a layer on the residual stream, those of queries and keys left out."""
        return [m for m in self.layer_modules if m.kind == "norm" and not m.short_name.startswith(("q_", "k_"))]

    @cached_property
    def layer_norm(self) -> bool:
        """Whether norms are LayerNorm, which is one kernel; RMSNorm is written out in Python, in fp32."""
        return any("bias" in m.parameters for m in self.shape.modules if m.kind == "norm")

    @property
    def sandwiched(self) -> bool:
        """Whether sub-layers have a norm after them too, as in Gemma, whose norms scale by 1 + w in fp32."""
        return len(self.norms) > 2

    @property
    def rotary(self) -> bool:
        """Whether positions rotate queries and keys; other models add a table of positions to the input."""
        return not any(m.kind == "other" and not m.layers for m in self.shape.modules)

    @cached_property
    def feed_forward_width(self) -> int:
        """Width of the feed-forward, or of one expert."""
        experts = [m.width // m.ranks for m in self.layer_modules if m.kind == "experts" and m.ranks > 1]
        maps = [m for m in self.layer_modules if m.role in ("up", "gate+up") and m.is_linear]
        return next(iter(experts), 0) or next((m.d_out // len(m.role.split("+")) for m in maps), 0)

    @cached_property
    def adapted_experts(self) -> list[Target]:
        """Experts in one parameter that get an adapter: their weights with it added are tensors of their own."""
        return [] if self.method.in_place else [t for t in self.targets if t.module.kind == "experts"]

    @cached_property
    def head(self) -> Module | None:
        return next((m for m in self.shape.modules if m.head), None)

    @cached_property
    def embedding(self) -> Module | None:
        return next((m for m in self.shape.modules if m.role == "embedding"), None)

    def trains(self, module: Module | None) -> bool:
        """Whether the base's own weight of this module is trained; a tied head's weight is the embedding's."""
        tied = module is not None and module.head and module.tied and id(self.embedding) in self._own_weights
        return tied or id(module) in self._own_weights

    @cached_property
    def _own_weights(self) -> set[int]:
        """`id` of each module of the base whose weight is trained, and not its bias alone."""
        weights = [term for term in self.method.terms if {"elements", "weight", "d_in"} & {*term.factors}]
        own = [t.module for t in self.targets if self.method.in_place or t.module.kind == "norm"]
        return {id(m) for m in own if any(term.value(m, self.spec) for term in weights)}

    @cached_property
    def trained(self) -> Polynomial:
        """Number of trained parameters, as a polynomial in the rank."""
        own: list[Polynomial | float] = [math.prod(sizes) for sizes in self.method.shared.values()]
        for term in self.method.terms:
            but_rank = replace(term, factors=tuple(f for f in term.factors if f != "rank"))
            each = sum(but_rank.value(t.module, self.spec) * t.count for t in self.targets)
            own.append(Polynomial({(0, 0, term.factors.count("rank")): each}))
        return total(own)

    @property
    def n_trained(self) -> int:
        """Number of trained parameters at this run's rank."""
        return round(self.trained.value(1, 1, self.spec.rank))

    @cached_property
    def tensors(self) -> list[tuple[int, tuple[float, ...]]]:
        """(how many, shape) of the trained tensors at this run's rank, as far as the method's terms tell."""
        found: list[tuple[int, tuple[float, ...]]] = [(1, shape) for shape in self.method.shared.values()]
        for t in self.targets:
            for term in (term for term in self.method.terms if term.value(t.module, self.spec) > 0):
                if term.factors in (("elements",), ("weight",)):
                    found += [(t.count, shape) for name, shape in t.module.parameters.items() if name != "bias"]
                else:
                    first, *rest = (getattr(t.module if f in SIZES else self.spec, f) for f in term.factors)
                    found.append((t.count, (first * term.coefficient, *rest)))
        return found

    @cached_property
    def sizes(self) -> Sizes:
        """What the symbols of SYMBOLS are in this run, without those that a line brings along."""
        facts, head = self.shape.facts, self.head
        numbers: dict[str, Size | float] = {
            "L": self.active, "h": self.shape.hidden_size, "q": facts.heads * facts.head_size,
            "kv": facts.kv_heads * facts.head_size, "f": self.feed_forward_width, "n_q": facts.heads,
            "n_kv": facts.kv_heads, "d": facts.head_size, "V": head.d_out if head else 0,
            "h_V": head.d_in if head else 0, "L_w": self.masked, "L_u": self.active - self.masked,
            "E": facts.experts, "k": facts.experts_per_token,
        }  # fmt: skip
        virtual = self.spec.virtual_tokens
        text, lengthened = Size(LENGTH, "S"), Size(LENGTH + virtual, f"(S + {virtual})")
        return numbers | {
            "B": Size(BATCH, "B"),
            "S": lengthened if self.inserted else text,
            "S_k": lengthened if virtual else text,
            "r": Size(RANK, "r"),
            "N": Size(self.trained, f"{self.n_trained:,}"),
        }

    def line(
        self, name: str, times: str, parts: Sum, moments: tuple[str, ...], note: str = "",
        sizes: Sizes | None = None, kind: str = "activations",
    ) -> list[Line]:  # fmt: skip
        """`times` × the sum of those `parts` that are not zero, of this run's sizes and `sizes`; empty where all are zero."""
        known = {**self.sizes, **(sizes or {})}
        parts = {key: c for key, c in parts.items() if c and any(product(known, key).terms.values())}
        size = product(known, times) * total(c * product(known, key) for key, c in parts.items())
        if not any(size.terms.values()):
            return []
        return [Line(name, kind, formula(times, parts), formula(times, parts, known), size, moments, note)]

    def kept(self, *each: str) -> Iterator[Keep]:
        """What the method keeps for each of `each` (see `methods.Keep`) in a step with this run's dropout."""
        return (k for k in self.method.keeps if k.each in each and k.dropout in (None, bool(self.spec.dropout)))
