"""Tries fused operations on the whole model at hand: those of a kind that give other logits, or none, are not taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .. import seam
from .maps import GROUP

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_found: dict[tuple[object, ...], tuple[str, ...]] = {}
"""The kinds that fit models of these modules, with this config, in this type and on this device."""


def rounding(dtype: torch.dtype) -> float:
    """Logits in this type that differ by no more than this share of their spread are the same."""
    return 1e-3 if dtype == torch.float32 else 0.05


def fitting(model: Module, kinds: Mapping[str, Callable[[Module], object]]) -> tuple[str, ...]:
    """Those of the `kinds` of fused operations with which a private copy gives the logits that it gives without.

    They are tried all at once, and where that fails one at a time. A model without numbers, as the trace has, cannot be
    tried: there all kinds are taken.
    """
    inner: Any = seam.writer(model)
    numbers = next(model.parameters(), None)
    if inner is None or numbers is None or numbers.is_meta or isinstance(numbers, FakeTensor):
        return tuple(kinds)
    config = inner.config
    modules = frozenset(map(type, model.modules()))
    key = (modules, str(config.to_dict()), inner.dtype, numbers.device.type, seam.attention_of(config))
    if key not in _found:
        names = tuple(kinds)
        try:
            want = _read(model, [])
            fits = _alike(model, [*kinds.values()], want)
            _found[key] = names if fits else tuple(name for name in names if _alike(model, [kinds[name]], want))
        except Exception:  # anybody's architecture, in transformers' code: what is wrong is said where it is run
            return ()
    return _found[key]


def answers_for(base: Module, adapted: Sequence[Module], fuse: Callable[[], None]) -> bool:
    """Whether `base` gives in a row each what it gives itself and what each of `adapted` does, once it is fused."""
    ids = torch.arange(6, device=next(base.parameters()).device)[None] * 5 % 23
    try:
        with torch.no_grad():
            want = torch.cat([seam.logits(model, input_ids=ids) for model in (base, *adapted)]).float()
            fuse()
            found = seam.logits(base, input_ids=ids.repeat(len(want), 1)).float()
    except Exception:  # anybody's architecture, in transformers' code
        return False
    off = (found - want).abs().amax((1, 2)) / want.std((1, 2))
    return bool(off.amax() <= rounding(next(base.parameters()).dtype))


def _alike(model: Module, kinds: list[Callable[[Module], object]], want: Tensor) -> bool:
    """Whether the model reads so with these kinds fused: one of two like rows may be off.

    In a mixture, rounding alone may send a token to another expert.
    """
    try:
        off = (_read(model, kinds) - want).abs().amax(-1) / want.std(-1)
    except Exception:
        return False
    return bool(off.unflatten(1, (2, 2)).amin(2).amax() <= rounding(next(model.parameters()).dtype))


def _read(model: Module, kinds: list[Callable[[Module], object]]) -> Tensor:
    """The logits after four rows, of which two are padded, and after one more token: 1 or 2 × rows × vocabulary.

    The model, a private copy, has these kinds of operations fused only meanwhile. What is trained asks for gradients, since
    some families change a product in place, which a part of a joined one forbids. Raises what transformers does.
    """
    device = next(model.parameters()).device
    ids = torch.arange(24, device=device).view(4, 6) * 5 % 23
    mask, last = torch.ones_like(ids), torch.full((1,), -1, device=device)
    mask[:2, :2] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with _restored(model), torch.enable_grad():
        for fuse in kinds:
            fuse(model)
        said, held = seam.read(model, None, last, input_ids=ids, attention_mask=mask, position_ids=places)
        if held is None:
            return said.detach().float().view(1, len(ids), -1)
        ids, mask, places = ids[:, :1], torch.cat((mask, mask[:, -1:]), 1), places[:, -1:] + 1
        more, _ = seam.read(model, held, last, input_ids=ids, attention_mask=mask, position_ids=places)
        return torch.cat((said, more), 1).detach().float().transpose(0, 1)


@contextmanager
def _restored(model: Module) -> Iterator[None]:
    """Within, the model may be fused, and does not train; afterwards its modules are as they were."""
    modules = [(module, type(module), module.training, vars(module).get(GROUP)) for module in model.modules()]
    attending = [(config, seam.attention_of(config)) for config in seam.configs_of(model)]
    hooks = dict(model._forward_pre_hooks)
    model.eval()
    try:
        yield
    finally:
        for module, kind, training, group in modules:
            module.__class__, module.training = kind, training
            vars(module).pop(GROUP, None)
            if group is not None:
                setattr(module, GROUP, group)
        for config, name in attending:
            seam.set_attention(config, name)
        model._forward_pre_hooks.clear()
        model._forward_pre_hooks.update(hooks)
