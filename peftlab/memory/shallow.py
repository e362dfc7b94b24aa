"""A model with few of its layers: which are enough to know what all of them do, and what stands for the others."""

from __future__ import annotations

import re
import weakref
from collections.abc import Hashable, Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACE = re.compile(r"layer|idx|index")
"""A whole number of this name says where in the model a module is, and not of which kind."""


def layers(model: nn.Module) -> nn.ModuleList:
    """The list of the model's layers: of those as long as its config says, or of all, the one with the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise LookupError("it has no list of layers")
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    told = [found for found in lists if len(found) == depth]  # an encoder of images beside it may be larger
    return max(told or lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def is_split(model: nn.Module) -> bool:
    """Whether the parts of a layer lie in several lists, as in XLM: its attention in one, its feed-forward in another."""
    found = layers(model)
    beside = next(children for m in model.modules() if found in (children := [*m.children()]))
    return sum(isinstance(m, nn.ModuleList) and len(m) == len(found) > 1 for m in beside) > 1


def kinds(model: PreTrainedModel) -> list[Hashable]:
    """For each layer what tells it from layers of other kinds: its modules, and its entries in lists of the config."""
    found = layers(model)
    if is_split(model):
        return [*range(len(found))]
    listed = [v for v in vars(model.config).values() if isinstance(v, list | tuple) and len(v) == len(found)]
    return [(*map(_kind, layer.named_modules()), *(repr(each[i]) for each in listed)) for i, layer in enumerate(found)]


def _kind(named: tuple[str, nn.Module]) -> Hashable:
    name, module = named
    shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False))
    said = {n: v for n, v in vars(module).items() if v is None or isinstance(v, bool | str | int)}
    return (
        name,
        type(module),
        shapes,
        tuple((n, v) for n, v in said.items() if type(v) is not int or not PLACE.search(n)),
    )


def shorten(kinds: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """The layers worth tracing, and for each layer the place among them of the one to copy: one of its kind with two
    neighbours like its own on both sides. They are five of a plain stack, two blocks of Gemma 3's six.
    """
    kept: list[int] = []
    copies: list[int] = []
    i = 0
    while i < len(kinds):
        periods = ((p, _repeats(kinds, i, p)) for p in range(1, min(8, len(kinds) - i) + 1))
        period, repeats = max(periods, key=lambda found: (found[0] * (found[1] - 1), -found[0]))
        n, first = period * repeats, len(kept)
        short = min(n, period * (1 + -(-4 // period)))
        places = list(range(short))
        if short < n:  # the first two and the last two stand for themselves, the others for one of their kind
            inner = (next(q for q in range(2, short - 2) if q % period == j % period) for j in range(2, n - 2))
            places = [0, 1, *inner, short - 2, short - 1]
        kept += [*range(i, i + short - 2), *range(i + n - 2, i + n)] if n > 1 else [i]
        copies += [first + place for place in places]
        i += n
    return kept, copies


def _repeats(kinds: Sequence[Hashable], start: int, period: int) -> int:
    """How often in a row the `period` layers from `start` on come."""
    blocks = (kinds[i : i + period] for i in range(start, len(kinds), period))
    return sum(1 for _ in takewhile(kinds[start : start + period].__eq__, blocks))


class Skipped(nn.Module):
    """In place of a layer that is not traced: it gives back its input, in the form in which the layer before gave its own.

    Everything else that the model asks of a layer, the layer still answers.
    """

    def __init__(self, layer: nn.Module, last: list[Any]) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple, so that its parameters are not the model's any more
        self.last = last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_states(args, kwargs)
        if not self.last:
            return hidden
        return (hidden, *(each() if isinstance(each, weakref.ref) else each for each in self.last[1:]))


def hidden_states(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """What a layer is given to change."""
    return args[0] if args else kwargs["hidden_states"]


def changed(out: Any) -> Tensor:
    """What a layer has made of them: its output, or the first of several."""
    return out[0] if isinstance(out, list | tuple) else out


def skip(stack: nn.ModuleList, kept: Iterable[int]) -> None:
    """Leaves only the layers `kept` in the list, and a Skipped in place of each other."""
    last: list[Any] = []  # of the last layer's output, where that is a tuple, be it of one

    def remember(module: nn.Module, args: object, out: Any) -> None:
        several = out if isinstance(out, list | tuple) else ()
        last[:] = [weakref.ref(each) if isinstance(each, Tensor) else each for each in several]

    for i in kept:
        stack[i].register_forward_hook(remember)
    for i in set(range(len(stack))).difference(kept):
        stack[i] = Skipped(stack[i], last)
