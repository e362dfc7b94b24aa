"""What a step's memory depends on, read from the spec and the architecture's shapes: for the closed form's lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from .. import methods
from ..base import architecture as architectures
from ..base import models
from ..base.architecture import Architecture, Module
from ..count import BYTES
from ..errors import SpecError
from ..methods import SIZES, Keep, Method, Target, Term
from ..spec import Resolved
from .lines import Line, Size, Sum, line
from .polynomial import BATCH, LENGTH, RANK, Polynomial, constant, total

SYMBOLS = {
    "B": "examples in a batch", "S": "tokens of an example, with virtual ones", "T": "tokens without virtual ones",
    "S_k": "keys that a token sees", "r": "rank", "L": "layers that a gradient reaches", "L_w": "those with a mask",
    "L_u": "those without", "h": "width", "q": "width of all queries", "kv": "width of all keys", "n_q": "query heads",
    "n_kv": "key heads", "d": "width of a head", "f": "width of the feed-forward, or of one expert", "E": "experts",
    "k": "experts for a token", "V": "vocabulary", "h_V": "width of the head's input", "M": "adapted modules",
    "Σd_in": "inputs of those modules together", "Σd_out": "their outputs together", "N": "trained parameters",
    "N_frozen": "frozen parameters", "N_packed": "quantized ones", "d_in": "a module's inputs", "d_out": "its outputs",
}  # fmt: skip
"""What the symbols of lines stand for, of those that are not explained by the line's name."""


@dataclass(frozen=True)
class Case:
    spec: Resolved
    """Resolved."""
    shape: Architecture
    method: Method
    targets: tuple[Target, ...]
    """Only those with something to train."""

    @property
    def wide(self) -> int:
        """Bytes of a number in the residual stream and in what norms give; autocast leaves those in fp32."""
        return BYTES[self.spec.precision]

    @property
    def amp(self) -> bool:
        return self.spec.precision == "amp"

    @property
    def thin(self) -> int:
        """Bytes of a number that a matrix product gives."""
        return 2 if self.amp else self.wide

    @property
    def adapter(self) -> int:
        """Bytes of a trained parameter."""
        return BYTES[self.spec.adapter_precision] if self.spec.adapter_precision else self.wide

    @property
    def adapter_numbers(self) -> int:
        """Bytes of a number that the adapter's products take and give."""
        return 2 if self.amp else self.adapter

    @property
    def checkpointing(self) -> bool:
        return self.spec.gradient_checkpointing

    @property
    def quantized(self) -> bool:
        return self.spec.quantization != "none"

    @cached_property
    def lowest(self) -> int:
        """The first layer that a gradient reaches; as many as there are layers where none does."""
        if self.checkpointing:
            return 0  # inputs are made to require gradients
        return min(self._reached(t) for t in self.targets)

    def _reached(self, target: Target) -> int:
        module = target.module
        if module.layers:
            return min(target.layers) + (module.role == "down")  # nothing before the last map of its layer
        after = module.head or module.kind == "norm" or (module.is_linear and module.d_in == self.shape.hidden_size)
        return self.shape.n_layers if after else 0

    @cached_property
    def layer_modules(self) -> tuple[Module, ...]:
        return tuple(m for m in self.shape.modules if m.layers)

    def norms(self, *starts: str) -> list[Module]:
        """Norms of a layer, by the start of their names: q_ and k_ for those of queries and keys; the others without."""
        found = [m for m in self.layer_modules if m.kind == "norm"]
        if starts:
            return [m for m in found if m.short_name.startswith(starts)]
        return [m for m in found if not m.short_name.startswith(("q_", "k_"))]

    @cached_property
    def layer_norm(self) -> bool:
        """Whether its norms are LayerNorm, one kernel; RMSNorm is written out, in fp32."""
        return any("bias" in m.parameters for m in self.shape.modules if m.kind == "norm")

    @property
    def sandwiched(self) -> bool:
        """Norms after a sub-layer too, as in Gemma, whose scales are 1 + w, in fp32."""
        return len(self.norms()) > 2

    @property
    def rotary(self) -> bool:
        """Positions turn queries and keys; models with a table of positions add them to the input."""
        return not any(m.kind == "other" and not m.layers for m in self.shape.modules)

    @cached_property
    def ffn(self) -> int:
        """Width of the feed-forward, or of one expert."""
        for m in self.layer_modules:
            if m.role == "up":
                return m.d_out
            if m.role == "gate+up":
                return m.d_out // 2
            if "gate_up_proj" in m.parameters:
                return m.parameters["gate_up_proj"][1] // 2
        return 0

    @property
    def gated(self) -> bool:
        return bool(self.shape.with_role("gate")) or self.shape.facts.experts > 0

    def trains(self, module: Module) -> bool:
        """Whether the module's weight is trained where it is; a tied head's is the embedding's."""
        tied = module.head and module.tied and self.embedding is not None and id(self.embedding) in self._own_weights
        return tied or id(module) in self._own_weights

    @cached_property
    def _own_weights(self) -> set[int]:
        named = {"weight", "d_in"}
        return {
            id(t.module)
            for t in self.targets
            if (self.method.in_place or t.module.kind == "norm")
            and any(named & set(term.factors) and term.value(t.module, self.spec) for term in self.method.terms)
        }

    @property
    def virtual(self) -> int:
        """Learned vectors in front of the text, as tokens."""
        return 0 if self.method.before_layers else self.spec.virtual_tokens

    @property
    def masked(self) -> int:
        """Active layers whose attention gets a mask: those with a window that the text fills, or all after a prefix."""
        if self.method.before_layers:
            return self.active
        facts = self.shape.facts
        full = facts.window and self.spec.sequence_length + self.virtual >= facts.window
        return min(facts.windowed, self.active) if full else 0

    @cached_property
    def active(self) -> int:
        """Layers that keep anything for the backward pass."""
        return self.shape.n_layers - self.lowest

    @cached_property
    def head(self) -> Module | None:
        return next((m for m in self.shape.modules if m.head), None)

    @cached_property
    def embedding(self) -> Module | None:
        return next((m for m in self.shape.modules if m.role == "embedding"), None)

    @cached_property
    def sizes(self) -> dict[str, Size]:
        facts, shape = self.shape.facts, self.shape
        head = self.head
        keys = self.spec.virtual_tokens
        lengthened = Size(LENGTH + keys, f"(S + {keys})")
        plain = {
            "L": self.active, "h": shape.hidden_size, "q": facts.heads * facts.head_size,
            "kv": facts.kv_heads * facts.head_size, "f": self.ffn, "n_q": facts.heads, "n_kv": facts.kv_heads,
            "d": facts.head_size, "V": head.d_out if head else 0, "h_V": head.d_in if head else 0,
            "L_w": self.masked, "L_u": self.active - self.masked, "E": facts.experts, "k": facts.experts_per_token,
        }  # fmt: skip
        return {
            **{name: Size(value) for name, value in plain.items()},
            "B": Size(BATCH, "B"),
            "S": lengthened if self.virtual else Size(LENGTH, "S"),
            "T": Size(LENGTH, "S"),
            "S_k": lengthened if keys else Size(LENGTH, "S"),
            "r": Size(RANK, "r"),
        }

    @cached_property
    def trained(self) -> Polynomial:
        """Trained parameters."""
        shared = sum(_product(sizes) for sizes in self.method.shared.values())
        return (
            total(self.symbolic(term, t.module) * t.count for t in self.targets for term in self.method.terms) + shared
        )

    def symbolic(self, term: Term, module: Module) -> Polynomial:
        """A term's value with the rank left open."""
        if "rank" not in term.factors:
            return constant(term.value(module, self.spec))
        rest = tuple(f for f in term.factors if f != "rank")
        known = constant(Term(rest, term.coefficient, term.roles).value(module, self.spec))
        for _ in range(len(term.factors) - len(rest)):
            known = known * RANK
        return known

    @cached_property
    def tensors(self) -> list[tuple[int, tuple[float, ...]]]:
        """(how many, shape) of the trained tensors, as far as the method's terms tell, at this run's rank."""
        found: list[tuple[int, tuple[float, ...]]] = [(1, tuple(s)) for s in self.method.shared.values()]
        for t in self.targets:
            for term in self.method.terms:
                if term.value(t.module, self.spec) <= 0:
                    continue
                if term.factors == ("weight",):
                    found += [(t.count, s) for n, s in t.module.parameters.items() if n != "bias"]
                else:
                    found.append((t.count, self._lengths(term, t.module)))
        return found

    def _lengths(self, term: Term, module: Module) -> tuple[float, ...]:
        first, *rest = (getattr(module, f) if f in SIZES else getattr(self.spec, f) for f in term.factors)
        return (first * term.coefficient, *rest)

    def line(
        self, name: str, times: str, parts: Sum, moments: tuple[str, ...], note: str = "",
        sizes: Mapping[str, float] = MappingProxyType({}), kind: str = "activations",
    ) -> list[Line]:  # fmt: skip
        """A line with this case's sizes and, beside them, `sizes`."""
        known = {**self.sizes, **{symbol: Size(value) for symbol, value in sizes.items()}}
        return line(known, name, kind, times, parts, moments, note)

    def kept(self, *each: str) -> Iterator[Keep]:
        """The method's own numbers, of a step with this run's dropout."""
        return (k for k in self.method.keeps if k.each in each and k.dropout in (None, bool(self.spec.dropout)))


def _product(sizes: tuple[int, ...]) -> int:
    n = 1
    for size in sizes:
        n *= size
    return n


def case(spec: Resolved) -> Case:
    """Of a resolved spec. Raises SpecError for a bare count, which has no layers."""
    entry, method = models.find(spec.model), methods.find(spec.method)
    if not entry.is_causal:
        raise SpecError(
            f"model={spec.model}: only models that write text are trained here; name a decoder such as gpt2"
        )
    shape = architectures.of(spec.model)
    chosen = methods.targets(shape, spec, entry.name)
    return Case(spec, shape, method, tuple(t for t in chosen if method.trained(t.module, spec)))
