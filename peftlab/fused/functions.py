"""Finds modules that are RMS norms, or rotate heads as Llama does, by trying each kind on numbers other than the model's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import rms_norm
from torch.nn import Linear, Module, Parameter

from .. import seam
from .lora import Context

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 3  # length of the text that attention is tried on
CLOSE = 1e-5  # most that two results of the same function may differ by
SIGNED = "signed"  # the attribute of a `sin` that holds it with the sign that a head's first half gets in a rotation
Forward = Callable[..., Any]


class Found:
    """The modules of a model whose functions are known, each with its fused forward, and in words which are not."""

    def __init__(self, model: Module) -> None:
        self.norms: dict[Module, Forward] = {}
        self.rotary: dict[Module, Forward] = {}
        other_norms = other_rotary = 0
        sizes = seam.rotary_sizes(model)
        told = {id(config): str(config.to_dict()) for config in seam.configs_of(model)}
        for module in model.modules():
            if _may_be_norm(module):
                forward, norms = _norm(module)
                if forward:
                    self.norms[module] = forward
                other_norms += norms and not forward
            elif sizes and any(map(_is_map, module._modules.values())):
                forward, rotates = _rotary(module, sizes, told.get(id(getattr(module, "config", None)), ""))
                if forward:
                    self.rotary[module] = forward
                other_rotary += rotates and not forward
        self.kept = [f"norms in {other_norms} places"] if other_norms else []
        if other_rotary:
            self.kept.append(f"rotary positions in {other_rotary} attention modules")
        elif sizes and not self.rotary:
            self.kept.append("rotary positions")


class _Norm(Module):
    """What `_may_be_norm` looks for."""

    weight: Parameter


def _may_be_norm(module: Module) -> TypeGuard[_Norm]:
    """Whether it has one weight for each number of a row and nothing else, and is none of torch's own modules."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    bare = not module._modules and not any(b is not None for b in module._buffers.values())
    one_each = own.keys() == {"weight"} and own["weight"].dim() == 1
    return one_each and bare and not type(module).__module__.startswith("torch.")


_norms: dict[tuple[type, torch.dtype], tuple[Forward | None, bool]] = {}
"""What `_norm` found of each kind of module in each type."""


def _norm(module: _Norm) -> tuple[Forward | None, bool]:
    """(torch's fused RMS norm where it is this module's function, whether the module is a norm at all)"""
    dtype = module.weight.dtype
    if (type(module), dtype) not in _norms:
        like = copy.copy(module)
        like._parameters = {"weight": Parameter(torch.linspace(0.5, 2, 8, dtype=dtype))}
        sizes = torch.tensor([[1.0], [1.0], [1e-3], [1e-3]])  # in small rows epsilon counts
        probe = (torch.linspace(-3, 2, 32).view(4, 8) * sizes).to(dtype)
        close = functools.partial(torch.allclose, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        fits: list[Forward] = []
        try:
            with torch.no_grad():
                want, twice = like(probe).float(), like(2 * probe).float()
                norms = torch.allclose(twice[:2], want[:2], rtol=0.02)  # it makes rows of any size alike
                if norms:
                    fits = [forward for forward in (_rms, _rms_around_one) if close(forward(like, probe).float(), want)]
        except Exception:  # a module that is called in another way is no norm
            norms = False
        _norms[type(module), dtype] = (fits[0] if fits else None, norms)
    return _norms[type(module), dtype]


def _rms(self: _Norm, x: Tensor) -> Tensor:
    return rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, seam.epsilon(self))


def _rms_around_one(self: _Norm, x: Tensor) -> Tensor:
    """Gemma's norm, whose weight is what is added to 1."""
    return rms_norm(x.to(self.weight.dtype), self.weight.shape, 1 + self.weight, seam.epsilon(self))


def _is_map(module: Module | None) -> TypeGuard[Linear]:
    """Whether this is a linear map, in whatever way it holds its numbers."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


_tried: dict[tuple[object, ...], tuple[Forward | None, bool]] = {}
"""What `_rotary` found of each kind of module with these shapes, this config and these sizes that its model rotates."""


def _rotary(module: Module, sizes: set[int], config: str) -> tuple[Forward | None, bool]:
    """(the module's forward with `rotate` in it where that is what it does, whether the module rotates at all)"""
    kind = type(module)
    shapes = tuple((name, _is_map(m) and (m.in_features, m.out_features)) for name, m in module._modules.items())
    key = (kind, shapes, config, frozenset(sizes))
    if key not in _tried:
        same: list[bool] = []
        if seam.offer_rotation(kind):
            same = [fits for size in sorted(sizes) if (fits := _rotates_alike(module, size)) is not None]
        _tried[key] = (_turning(kind.forward) if same and all(same) else None, bool(same))
    return _tried[key]


def _rotates_alike(module: Module, size: int) -> bool | None:
    """Whether an attention module does what `rotate` does to `size` numbers of a head; None where it cannot be tried."""
    angles = torch.linspace(0.1, 3, TOKENS * size // 2).view(1, TOKENS, -1).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    calls: list[None] = []

    def counted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: int, **more: int) -> tuple[Tensor, Tensor]:
        calls.append(None)
        return rotate(q, k, cos, sin, *rest, **more)

    try:
        want = _seen(module, cos, sin)
    except Exception:  # an architecture of anybody's may need more than this, or other sizes
        return None
    try:
        got = _seen(module, cos, _marked(sin, counted))
    except Exception:
        return False
    if not calls:  # the module rotates in a way of its own, or not at all
        still = _seen(module, torch.ones_like(cos), torch.zeros_like(sin))
        return None if all(map(torch.equal, still, want)) else False
    return len(got) == len(want) and all(torch.allclose(a, b, atol=CLOSE) for a, b in zip(got, want, strict=True))


def _seen(module: Module, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """The inputs that the maps of an attention module get while a copy of it, with random numbers, reads a short text."""
    seen: list[Tensor] = []
    like: Any = copy.copy(module)
    like._modules = dict(module._modules)
    for name, child in module._modules.items():
        if _is_map(child):
            like._modules[name] = _Map(child.out_features, seen)
        elif child is not None and _may_be_norm(child):
            like._modules[name] = torch.nn.Identity()
    for held in ("_parameters", "_buffers"):
        own = getattr(module, held).items()
        setattr(like, held, {name: t if t is None else torch.rand(t.shape, generator=_drawn()) for name, t in own})
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


class _Map(Module):
    """Puts its inputs in `seen`, and gives random numbers, always the same ones for a shape."""

    def __init__(self, features: int, seen: list[Tensor]) -> None:
        super().__init__()
        self.weight = Parameter(torch.zeros(0), requires_grad=False)
        self.out_features, self.seen = features, seen

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        self.seen.append(x)
        return torch.rand(*x.shape[:-1], self.out_features, generator=_drawn())


@functools.cache
def _turning(own: Forward) -> Forward:
    """The forward of attention modules whose `own` is given, with `rotate` for its rotation."""

    def forward(self: Module, *args: object, **kwargs: Any) -> object:
        if positions := kwargs.get("position_embeddings"):
            cos, sin = positions
            kwargs["position_embeddings"] = cos, _marked(sin, rotate)
        return own(self, *args, **kwargs)

    return forward


def _marked(sin: Tensor, rotation: Forward) -> Tensor:
    """The same numbers, with the rotation that attention is to call. What is prepared for it is made once for all layers."""
    if not hasattr(sin, SIGNED):
        half = sin.shape[-1] // 2
        setattr(sin, SIGNED, torch.cat((-sin[..., :half], sin[..., half:]), -1))
    marked = sin.detach()
    setattr(marked, SIGNED, getattr(sin, SIGNED))
    setattr(marked, seam.TURN, rotation)
    return marked


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **_: object
) -> tuple[Tensor, Tensor]:
    """Queries and keys, batch × heads × length × d, turned by their positions; `sin` is `_marked`. Su et al. 2021."""
    swapped = unsqueeze_dim == 1  # heads come before length, but in memory after it all the same
    both = [x.transpose(1, 2) if swapped else x for x in (q, k)]
    turned = _Rotated.apply(torch.cat(both, 2), cos.unsqueeze(2), getattr(sin, SIGNED).unsqueeze(2))
    new_q, new_k = turned.split([x.shape[2] for x in both], 2)
    return (new_q.transpose(1, 2), new_k.transpose(1, 2)) if swapped else (new_q, new_k)


class _Rotated(torch.autograd.Function):
    """x cos + roll(x) sin, where sin has the sign that the first half of `roll` needs."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None
