"""A kind of module of a model, with its shapes, and how modules are named."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Module:
    """One kind of module, with every layer that repeats it. Each parameter of fused experts is one by itself."""

    name: str
    """The dotted name, with `*` for the layer's number; of experts, the parameter's."""
    kind: str
    """linear, conv1d, experts, embedding (of the tokens), norm or other."""
    parameters: Mapping[str, tuple[int, ...]]
    """Name of each of its own parameters → shape; experts' only one is called weight."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that have this module; empty for one that stands alone."""
    tied: bool = False
    """Whether its weight is another module's too (a head tied to the embedding) and is counted there."""
    head: bool = False
    """Whether it maps the last hidden states to the vocabulary."""
    classifier: bool = False
    """Whether it is new in a model for classification, and is trained whole beside every adapter."""
    role: str = ""
    """query, down, head, embedding, norm, …; empty for a linear map that has none of `roles.ROLES`."""
    stacks: int = 1
    """How many stacks of layers read it: an embedding may be the encoder's and the decoder's."""
    cached: int = 0
    """Numbers of keys and values that it makes for a token, kept as they are; 0 where they are made of its output."""
    ranks: int = 1
    """How many of an adapter's ranks are laid side by side for it: 2 for a gate and an up projection in one parameter."""
    transposed: bool = False
    """Whether experts store their weights as in × out."""

    def __hash__(self) -> int:
        return hash((self.name, self.kind, self.layers))

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "conv1d")

    @property
    def features(self) -> tuple[int, int]:
        """(inputs, outputs) of the map, or of one expert's; those of a norm are its width.

        GPT-2's Conv1D stores its weight as in × out, and an embedding's input is the vocabulary.
        """
        shape = self.parameters["weight"]
        a, b = shape[-2:] if len(shape) > 1 else shape * 2
        return (a, b) if self.transposed or self.kind in ("conv1d", "embedding") else (b, a)

    @property
    def _times(self) -> int:
        """How many maps get an adapter of the usual rank each."""
        return self.ranks * (self.parameters["weight"][0] if self.kind == "experts" else 1)

    @property
    def d_in(self) -> int:
        """Features of the input, over all experts."""
        return self.features[0] * self._times

    @property
    def d_out(self) -> int:
        return self.features[1] * self._times

    @property
    def width(self) -> int:
        """Features that come out for a token."""
        return self.features[1]

    @property
    def full_rank(self) -> int:
        """The most that the rank of its weight can be, or of one expert's."""
        return min(self.features)

    @property
    def count(self) -> int:
        """How many modules of this kind the model has."""
        return len(self.layers) or 1

    @cached_property
    def elements(self) -> int:
        """Elements of everything but the bias, for one layer."""
        return sum(math.prod(s) for n, s in self.parameters.items() if n != "bias")

    @property
    def weight(self) -> int:
        """As `elements`, but 0 where the weight is tied."""
        return 0 if self.tied else self.elements

    @property
    def bias(self) -> int:
        return math.prod(self.parameters["bias"]) if "bias" in self.parameters else 0

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """Name of the module that it is in."""
        return self.name.rpartition(".")[0]

    @property
    def stack(self) -> str:
        """Name of the list of layers that it is in; empty for one that stands alone."""
        return self.name.partition(".*.")[0] if self.layers else ""

    def is_below(self, place: str) -> bool:
        """Whether it is somewhere in the module of that name."""
        return self.name.startswith(f"{place}.")

    def ends_in(self, parts: str) -> bool:
        """Whether these are the last parts of its name."""
        return f".{self.name}".endswith(f".{parts}")

    def names(self) -> Iterator[tuple[int | None, str]]:
        """(layer, full dotted name) of each module of this kind."""
        if not self.layers:
            yield None, self.name
        for layer in self.layers:
            yield layer, self.name.replace("*", str(layer), 1)

    def own_names(self, name: str) -> Iterator[str]:
        """Full names of the parameters of the one called `name`."""
        yield from [name] if self.kind == "experts" else (f"{name}.{own}" for own in self.parameters)


def told_apart(paths: list[str]) -> list[str]:
    """For each dotted path, its shortest end that no other path has; the whole path where there is none."""
    ends = [[".".join(path.split(".")[-n:]) for n in range(1, path.count(".") + 2)] for path in paths]
    every = Counter(end for of_one in ends for end in of_one)
    return [next((end for end in of_one if every[end] == 1), of_one[-1]) for of_one in ends]


def runs(numbers: tuple[int, ...]) -> list[list[int]]:
    """[first, last] of each run of consecutive numbers."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return [[start, end] for start, end in zip(starts, ends, strict=True)]
