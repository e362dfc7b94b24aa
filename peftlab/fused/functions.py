"""Which modules of a model are RMS norms or rotate heads as Llama does: found by trying each kind on numbers.

A norm is tried with weights of its own type, an attention module with stand-ins for the maps it is made of, in its real
sizes. Neither needs the model's numbers, so a model on the meta device can be tried too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import rms_norm

from .. import seam

if TYPE_CHECKING:
    from torch import Tensor

HEADS_FIRST = 1
"""Where cos and sin get a dimension for the heads, if queries are batch × heads × length × d."""
TOKENS = 3
"""Length of the text that attention is tried on."""
CLOSE = 1e-5
Forward = Callable[..., Any]


class Found:
    """The modules of a model whose functions are known, each with the fused forward to be given to it."""

    def __init__(self, model: Any) -> None:
        self.forwards: dict[Any, Forward] = {}
        self.norms = self.rotary = 0
        own = {"norms": 0, "attention": 0}
        sizes = seam.rotary_sizes(model)
        told = {id(config): str(config.to_dict()) for config in seam.configs_of(model)}
        for module in model.modules():
            if _may_be_norm(module):
                forward, norms = _norm(module)
                self.norms += forward is not None
                own["norms"] += norms and forward is None
            elif sizes and _may_attend(module):
                forward, attends = _rotary(module, sizes, told.get(id(getattr(module, "config", None)), ""))
                self.rotary += forward is not None
                own["attention"] += attends and forward is None
            else:
                continue
            if forward:
                self.forwards[module] = forward
        self._own, self._positions = own, bool(sizes)

    def kept(self) -> Iterator[str]:
        """What was tried and is not known, in words."""
        if n := self._own["norms"]:
            yield f"norms in {n} places"
        if n := self._own["attention"]:
            yield f"rotary positions in {n} attention modules"
        elif self._positions and not self.rotary:
            yield "rotary positions"


def _may_be_norm(module: Any) -> bool:
    """One weight for each number of a row, nothing else, and none of torch's own modules."""
    own = {name for name, p in module._parameters.items() if p is not None}
    bare = not module._modules and not any(b is not None for b in module._buffers.values())
    return own == {"weight"} and bare and module.weight.dim() == 1 and not type(module).__module__.startswith("torch.")


_norms: dict[tuple[type, torch.dtype], tuple[Forward | None, bool]] = {}


def _norm(module: Any) -> tuple[Forward | None, bool]:
    """(torch's fused RMS norm where it is this module's function, whether it is a norm at all)

    Tried once for each kind and type.
    """
    dtype = module.weight.dtype
    if (type(module), dtype) not in _norms:
        like = copy.copy(module)
        like._parameters = {"weight": torch.nn.Parameter(torch.linspace(0.5, 2, 8, dtype=dtype))}
        probe = torch.linspace(-3, 2, 32).view(4, 8) * torch.tensor(
            [[1.0], [1.0], [1e-3], [1e-3]]
        )  # epsilon counts too
        probe, close = probe.to(dtype), functools.partial(torch.allclose, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        fits: list[Forward] = []
        try:
            with torch.no_grad():
                want, twice = like(probe).float(), like(2 * probe).float()
                norms = torch.allclose(twice[:2], want[:2], rtol=0.02)  # the size of a row is gone
                if norms:
                    fits = [forward for forward in (_rms, _rms_around_one) if close(forward(like, probe).float(), want)]
        except Exception:  # it is called in another way, so it is something else
            norms = False
        _norms[type(module), dtype] = (fits[0] if fits else None, norms)
    return _norms[type(module), dtype]


def _rms(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, seam.epsilon(self))


def _rms_around_one(self: Any, x: Tensor) -> Tensor:
    """Gemma's, whose weight is what is added to 1."""
    return rms_norm(x.to(self.weight.dtype), self.weight.shape, 1 + self.weight, seam.epsilon(self))


def _may_attend(module: Any) -> bool:
    return any(map(_is_map, module._modules.values()))


def _is_map(module: Any) -> bool:
    """A linear map, whatever holds its numbers."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


_tried: dict[tuple[Any, ...], tuple[Forward | None, bool]] = {}


def _rotary(module: Any, sizes: set[int], config: str) -> tuple[Forward | None, bool]:
    """(the module's forward with `rotate` in it where that is what it does, whether it rotates at all)

    Tried once for each kind of module, its shapes and its config, with each of the `sizes` that the model rotates by.
    """
    kind: Any = type(module)
    shapes = tuple((name, _is_map(m) and (m.in_features, m.out_features)) for name, m in module._modules.items())
    key = (kind, shapes, config, frozenset(sizes))
    if key not in _tried:
        same: list[bool] = []
        if seam.offer_rotation(kind):
            same = [fits for size in sorted(sizes) if (fits := _rotates_alike(module, size)) is not None]
        _tried[key] = (_turning(kind) if same and all(same) else None, bool(same))
    return _tried[key]


def _rotates_alike(module: Any, size: int) -> bool | None:
    """Whether `rotate` of `size` numbers of a head is what an attention module does; None where it does not run so."""
    angles = torch.linspace(0.1, 3, TOKENS * size // 2).view(1, TOKENS, -1).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    calls: list[None] = []

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(None)
        return rotate(*args, **kwargs)

    try:
        want = _seen(module, cos, sin)
    except Exception:  # anybody's architecture: it may need more than this, or other sizes
        return None
    try:
        got = _seen(module, cos, _marked(sin, counted))
    except Exception:
        return False
    if not calls:  # it rotates in a way of its own, or not at all
        still = _seen(module, torch.ones_like(cos), torch.zeros_like(sin))
        return None if all(map(torch.equal, still, want)) else False
    return len(got) == len(want) and all(torch.allclose(a, b, atol=CLOSE) for a, b in zip(got, want, strict=True))


def _seen(module: Any, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """What the maps of an attention module are given, when it reads a short text with other numbers in place of its own."""
    seen: list[Tensor] = []
    like = copy.copy(module)
    like._modules = {name: _stand_in(child, seen) for name, child in module._modules.items()}
    for held in ("_parameters", "_buffers"):
        own = getattr(module, held)
        setattr(
            like, held, {name: t if t is None else torch.rand(t.shape, generator=_drawn()) for name, t in own.items()}
        )
    like.training = False
    if config := getattr(module, "config", None):
        like.config = copy.deepcopy(config)
        seam.set_attention(like.config, "eager")
    first = next(child for child in module._modules.values() if _is_map(child))
    states = torch.rand(1, TOKENS, first.in_features, generator=_drawn())
    with torch.no_grad():
        type(module).forward(like, hidden_states=states, position_embeddings=(cos, sin), attention_mask=None)
    return seen


def _drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _stand_in(child: Any, seen: list[Tensor]) -> Any:
    if child is None:
        return None
    if _is_map(child):
        return _Map(child.out_features, seen)
    return torch.nn.Identity() if _may_be_norm(child) else child


class _Map(torch.nn.Module):
    """Gives random numbers, always the same for its shape, and notes what it is given."""

    def __init__(self, features: int, seen: list[Tensor]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(0), requires_grad=False)
        self.out_features, self.seen = features, seen

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        self.seen.append(x)
        return torch.rand(*x.shape[:-1], self.out_features, generator=_drawn())


@functools.cache
def _turning(kind: Any) -> Forward:
    """The forward of attention modules of a kind, with `rotate` for its rotation."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if positions := kwargs.get("position_embeddings"):
            cos, sin = positions
            kwargs["position_embeddings"] = cos, _marked(sin, rotate)
        return kind.forward(self, *args, **kwargs)

    return forward


def _marked(sin: Tensor, rotation: Callable[..., Any]) -> Tensor:
    """The same numbers, with the rotation that is to be done by them. Layers share what is made once for them."""
    signed = getattr(sin, "signed", None)
    if signed is None:
        half = sin.shape[-1] // 2
        signed = sin.signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # type: ignore[attr-defined]
    marked = sin.detach()
    marked.signed = signed  # type: ignore[attr-defined]
    setattr(marked, seam.TURN, rotation)
    return marked


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = HEADS_FIRST, **_: Any
) -> tuple[Tensor, Tensor]:
    """Rotary positions of queries and keys, batch × heads × length × d, by a `_marked` sin. Su et al. 2021."""
    signed: Tensor = sin.signed  # type: ignore[attr-defined]
    swapped = unsqueeze_dim == HEADS_FIRST  # in memory, length comes before heads all the same
    both = [x.transpose(1, 2) if swapped else x for x in (q, k)]
    turned = _Rotated.apply(torch.cat(both, 2), cos.unsqueeze(2), signed.unsqueeze(2))
    new_q, new_k = turned.split([x.shape[2] for x in both], 2)
    return (new_q.transpose(1, 2), new_k.transpose(1, 2)) if swapped else (new_q, new_k)


class _Rotated(torch.autograd.Function):
    """x cos + roll(x) sin, with the sign of `roll`'s first half in sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None
