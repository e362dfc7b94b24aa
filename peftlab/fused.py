"""The same functions in fewer operations, put in place of a model's own: norms, rotary positions, masks, linear maps and
the loss.

A model of 30 layers launches thousands of small kernels a step, and each takes longer than its arithmetic. Everything here
is torch's own operations, so nothing is compiled. Results differ from the model's own by rounding alone, which is tried on
each norm and each way to rotate before it is taken.
"""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import rms_norm
from torch.nn.functional import linear, scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

    from .spec import RunSpec

ROTARY = "apply_rotary_pos_emb"
"""What transformers' attention modules call, whatever the family."""
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear maps that most families give the same input."""
HEADS_FIRST = 1
"""Where cos and sin get a dimension for the heads, if queries are batch × heads × length × d."""
ATTENTION = "peftlab"
"""Our name among transformers' ways to attend."""
LOGITS = 32_000_000
"""Logits that a loss makes at a time."""


def quicken(model: Any, logits: bool = False) -> dict[str, int]:
    """Fuses what it knows in a private copy of a model, and says how many of each kind. The copy's modules stay themselves.

    Unless it is asked for its `logits`, the copy may have a `head` from then on: in training it gives hidden states then, for
    `cross_entropy`.
    """
    configs = {id(c): c for c in (getattr(module, "config", None) for module in model.modules())}.values()
    counts = {"norms": 0, "rotary": 0, "attention": sum(map(_attention, configs)), "lora": 0, "joined": 0}
    for module in model.modules():
        if forward := _norm(module):
            counts["norms"] += 1
        elif forward := _rotary(module.__class__):
            counts["rotary"] += 1
        if forward:
            module.__class__ = _with_forward(module.__class__, forward)
    sites = [_Site(run) for module in model.modules() for run in _runs(module)]
    for site in sites:
        counts["lora"] += len(site.adapted)
        counts["joined"] += len(site.members) > 1
        site.take()
    if adapted := [site for site in sites if site.adapted]:
        model.register_forward_pre_hook(lambda *_: _share_near(adapted))
    if not logits and (last := _last_map(model)):
        last.__class__ = Head
    return counts


def head(model: Any) -> Head | None:
    """The map to logits that a quickened model leaves to its loss."""
    return next((module for module in model.modules() if isinstance(module, Head)), None)


def cross_entropy(out: Tensor, labels: Tensor, head: Head | None) -> Tensor:
    """Summed over the labels, rows × length, that are not negative. `out` is logits, or hidden states that `head` maps to them.

    With a head, LOGITS of them are there at a time, and none outlives this.
    """
    out, labels = out.flatten(0, 1), labels.flatten()
    if head is None or not head.training:
        return torch.nn.functional.cross_entropy(out.float(), labels, reduction="sum")
    return _CrossEntropy.apply(out, head.weight, head.bias, labels)


def suits(spec: RunSpec) -> bool:
    """Not mixed precision, where types differ from one operation to the next."""
    return spec.precision != "amp"


def try_out(model: Any) -> None:
    """Tries on numbers what `quicken` takes, so that it can be done to a model that has none."""
    for module in model.modules():
        _norm(module)
        _rotary(module.__class__)


def together(base: Any, adapted: Sequence[Any]) -> Any:
    """`base`, a private copy, for batches of a row of its own and one for each of `adapted`: the base's maps once for all,
    and to each row its own LoRA. To generate with. None where an adapted model is more than plain LoRA over this base.
    """
    frozen = {p.data_ptr() for p in base.parameters()}
    updates: dict[str, list[tuple[int, Any]]] = {}
    for row, model in enumerate(adapted, 1):
        known: set[int] = set()
        for name, module in model.named_modules():
            if _is_plain_lora(module) and not _is_nf4(module.base_layer):
                updates.setdefault(name.removeprefix("base_model.model."), []).append((row, module))
                known.update(id(p) for p in module.parameters())
        if any(id(p) not in known and p.data_ptr() not in frozen for p in model.parameters()):
            return None
    quicken(base)
    for name, found in updates.items():
        module = base.get_submodule(name)
        if not hasattr(module, "site"):
            _Site([module]).take()
        module.site.add_rows(module, found, len(adapted) + 1)
    return base


def adjoin(model: Any) -> None:
    """Puts weights that read the same input side by side in memory, so that one product can do for all. Numbers stay."""
    for module in model.modules():
        for names in SIBLINGS:
            weights: list[Any] = [getattr(getattr(module, name, None), "weight", None) for name in names]
            if any(
                w is None or w.requires_grad or w.shape[1:] != weights[0].shape[1:] or w.dtype != weights[0].dtype
                for w in weights
            ):
                continue
            if all(itertools.starmap(_follows, itertools.pairwise(weights))):
                continue
            whole = torch.cat([w.detach() for w in weights])
            for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
                weight.data = part


@cache
def _with_forward(kind: Any, forward: Callable[..., Any]) -> type:
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


_norms: dict[tuple[type, torch.dtype], Callable[..., Any] | None] = {}


def _norm(module: Any) -> Callable[..., Any] | None:
    """torch's fused RMS norm, where it is this module's function; tried once for each kind and type."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "weight"):
        return None
    dtype = module.weight.dtype
    if (type(module), dtype) not in _norms:
        like = copy.copy(module)
        like._parameters = {"weight": torch.nn.Parameter(torch.linspace(0.5, 2, 8, dtype=dtype))}
        probe = torch.linspace(-3, 2, 32).to(dtype).view(4, 8)
        close = functools.partial(torch.allclose, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        with torch.no_grad():
            want = like(probe).float()
            fits = [forward for forward in (_rms, _rms_around_one) if close(forward(like, probe).float(), want)]
        _norms[type(module), dtype] = fits[0] if fits else None
    return _norms[type(module), dtype]


def _eps(module: Any) -> float:
    return getattr(module, "variance_epsilon", None) or module.eps


def _rms(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, _eps(self))


def _rms_around_one(self: Any, x: Tensor) -> Tensor:
    """Gemma's, whose weight is what is added to 1."""
    return rms_norm(x.to(self.weight.dtype), self.weight.shape, 1 + self.weight, _eps(self))


@cache
def _rotary(kind: Any) -> Callable[..., Any] | None:
    """The forward of an attention module with `rotate` for its own, where that pairs a head's two halves as Llama's does."""
    forward = getattr(kind, "forward", None)
    own = getattr(sys.modules.get(kind.__module__), ROTARY, None)
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names or own is None:
        return None
    q, k = (torch.linspace(-1, 2, heads * 24).view(1, heads, 3, 8) for heads in (2, 1))
    angles = torch.linspace(0, 3, 12).view(1, 3, 4).repeat(1, 1, 2)
    try:
        want = own(q, k, angles.cos(), angles.sin())
    except (TypeError, RuntimeError, ValueError):
        return None
    got = rotate(q, k, angles.cos(), angles.sin())
    if not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True)):
        return None
    fused = FunctionType(forward.__code__, {**forward.__globals__, ROTARY: rotate}, "forward", forward.__defaults__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = HEADS_FIRST, **_: Any
) -> tuple[Tensor, Tensor]:
    """Rotary positions of queries and keys, batch × heads × length × d. Su et al. 2021."""
    signed = getattr(sin, "signed", None)
    if signed is None:  # the layers share one sin
        half = sin.shape[-1] // 2
        signed = sin.signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # type: ignore[attr-defined]
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


class Head(torch.nn.Linear):
    """The frozen map to logits, which a model in training skips."""

    __module__ = torch.nn.Linear.__module__

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else super().forward(x)


class _Given(torch.nn.Module):
    def __init__(self, out: Any) -> None:
        super().__init__()
        self.out = out

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.out


def _last_map(model: Any) -> Any:
    """The map to logits, where it is linear, frozen, and the last thing that the model does."""
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    causal: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    last = causal and causal.get_output_embeddings()
    if type(last) is not torch.nn.Linear or any(p.requires_grad for p in last.parameters()):
        return None
    name = next((name for name, child in causal.named_children() if child is last), "")
    like, logits = copy.copy(causal), torch.empty(1, 1, 1)
    body = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=torch.empty(1, 1, 1))  # type: ignore[arg-type]
    like._modules = {causal.base_model_prefix: _Given(body), name: _Given(logits)}
    try:
        found = like(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False, return_dict=True).logits
    except Exception:  # anybody's architecture, in transformers' code
        return None
    return last if found is logits else None


class _CrossEntropy(torch.autograd.Function):
    """Sum of −log softmax(x Wᵀ + bias) at the labels, with frozen W. The gradient of x is made on the way, while the logits
    are there. Hsu et al. 2024 (Liger).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        grad, total = torch.empty_like(x), torch.zeros((), device=x.device)
        pieces = -(-x.shape[0] * weight.shape[0] // LOGITS)
        for rows, at, out in zip(x.chunk(pieces), labels.chunk(pieces), grad.chunk(pieces), strict=True):
            asked, at = (at >= 0)[:, None], at.clamp(min=0)[:, None]
            logp = torch.log_softmax(linear(rows, weight, bias).float(), -1)
            total -= (logp.gather(1, at) * asked).sum()
            p = logp.exp_().scatter_add_(1, at, -torch.ones_like(at, dtype=logp.dtype))
            torch.mm(p.to(x.dtype), weight, out=out).mul_(asked)
            del logp, p
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, total: Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        return grad * total, None, None, None


def _attention(config: Any) -> bool:
    """Has a private config's attention take its mask as the kernels want it: not at all, or ready to be added."""
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    _register()
    config._attn_implementation = ATTENTION
    return True


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, _mask)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Any:
    """transformers' own, but that the heads of a single token which share keys are read as that many tokens of one head."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rows, heads, length, _ = query.shape
    if mask is None or length > 1 or any(more.get(name) is not None for name in ("softcap", "position_bias")):
        return sdpa_attention_forward(module, query, key, value, mask, **more)
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(grouped, key, value, mask.to(query.dtype), scale=more.get("scaling"))
    return out.reshape(rows, 1, heads, -1), None


def _mask(**asked: Any) -> Tensor | None:
    """Of scaled_dot_product_attention: None where it is causal and no more, as transformers has it outside of recordings."""
    from transformers.masking_utils import sdpa_mask

    length, window = asked["q_length"], asked.get("local_size")
    whole = asked.get("attention_mask") is None and asked["kv_length"] == length and (not window or length < window)
    if whole and not asked.get("use_vmap") and _recording():
        return None
    mask = sdpa_mask(**asked)
    if mask is None or length > 1:
        return mask
    return torch.zeros_like(mask, dtype=asked["dtype"]).masked_fill_(~mask, -torch.inf)


def _recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_plain_lora(module: Any) -> bool:
    """peft's LoRA on a linear map, in NF4 or not quantized, without dropout and variants."""
    if not type(module).__module__.startswith("peft.tuners.lora.") or not hasattr(module, "base_layer"):
        return False
    if module.active_adapters != ["default"] or module.lora_variant or module.merged:
        return False
    dropout, base = module.lora_dropout["default"], module.base_layer
    plain = isinstance(dropout, torch.nn.Identity) and not module.lora_bias["default"]
    return plain and (_is_whole(base) or _is_nf4(base))


def _is_whole(module: Any) -> bool:
    """Whether it is a linear map that is not quantized, or LoRA over one."""
    return type(_base(module)) is torch.nn.Linear


def _is_nf4(module: Any) -> bool:
    return type(module).__name__ == "Linear4bit"


def _runs(parent: Any) -> Iterator[list[Any]]:
    """Linear maps among a module's own, frozen or adapted by LoRA: those whose weights are side by side together, and any
    other that is adapted.
    """
    run: list[Any] = []
    for name, module in [*parent.named_children(), ("", None)]:
        known = _is_plain_lora(module) or (type(module) is torch.nn.Linear and name != "base_layer")
        known = known and not any(p.requires_grad for p in _base(module).parameters())
        if run and not (known and _adjoined(run[-1], module)):
            if len(run) > 1 or _is_plain_lora(run[0]):
                yield run
            run = []
        if known:
            run.append(module)


def _base(module: Any) -> Any:
    return getattr(module, "base_layer", module)


def _adjoined(a: Any, b: Any) -> bool:
    return _is_whole(a) and _is_whole(b) and _follows(_base(a).weight, _base(b).weight)


def _follows(a: Tensor, b: Tensor) -> bool:
    """Whether matrix `b` begins in memory where `a` ends, and has rows of the same length."""
    same = a.shape[1] == b.shape[1] and a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous()
    stored = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same and stored and a.storage_offset() + a.numel() == b.storage_offset()


class _Site:
    """Linear maps of one input, which are computed together when the first of them is called."""

    def __init__(self, members: list[Any]) -> None:
        self.members = members
        bases = [_base(member) for member in members]
        self.outs = [base.out_features for base in bases]
        self.bias = self.weight = None
        if _is_nf4(bases[0]):
            self.dtype = bases[0].compute_dtype
        else:
            first = bases[0].weight
            self.dtype = first.dtype
            self.weight = first.detach().as_strided((sum(self.outs), first.shape[1]), (first.shape[1], 1))
        if self.weight is not None and any(base.bias is not None for base in bases):
            self.bias = torch.cat([first.new_zeros(b.out_features) if b.bias is None else b.bias for b in bases])
        self.adapted = [member for member in members if member is not _base(member)]
        starts = [sum(self.outs[:i]) for i in range(len(members))]
        self.parts = [slice(s, s + n) for s, n, m in zip(starts, self.outs, members, strict=True) if m in self.adapted]
        self.near: tuple[Tensor, ...] = ()
        self.rows: list[tuple[slice, Tensor, Tensor, Tensor]] = []
        self.held: tuple[Tensor, dict[int, Tensor]] | None = None

    def take(self) -> None:
        """Has the members ask here."""
        for member in self.members:
            member.site = self
            member.__class__ = _with_forward(member.__class__, _linear)

    def add_rows(self, member: Any, found: list[tuple[int, Any]], rows: int) -> None:
        """To each row of a batch of `rows` the LoRA that was `found` for it; the others keep the member's own map."""
        i = self.members.index(member)
        start, weight = sum(self.outs[:i]), self.weight
        a = torch.cat([lora.lora_A["default"].weight for _, lora in found])
        b = torch.cat([lora.scaling["default"] * lora.lora_B["default"].weight for _, lora in found], 1)
        owner = torch.tensor([row for row, lora in found for _ in range(len(lora.lora_A["default"].weight))])
        mask = (owner == torch.arange(rows)[:, None])[:, None]
        self.rows.append((slice(start, start + self.outs[i]), a.to(weight), b.to(weight), mask.to(weight)))

    def out(self, member: Any, x: Tensor) -> Tensor:
        """One member's map of `x`, and those of the others put by until they are asked for the same `x`."""
        held = self.held
        if held is None or held[0] is not x or id(member) not in held[1]:
            whole = self._whole(x)
            held = (x, dict(zip(map(id, self.members), whole.split(self.outs, -1), strict=True)))
        y = held[1].pop(id(member))
        self.held = held if held[1] else None
        return y

    def _whole(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return _Added.apply(_base(self.members[0])(x), x, *self.near)
        if self.adapted:
            return _LoRA.apply(x, self.weight, self.bias, self.parts, *self.near)
        y = linear(x, self.weight, self.bias)
        for part, a, b, mask in self.rows:
            y.flatten(0, 1)[:, part].addmm_((linear(x, a) * mask).flatten(0, 1), b.T)
        return y


def _linear(self: Any, x: Tensor) -> Tensor:
    return self.site.out(self, x)


def _share_near(sites: list[_Site]) -> None:
    """Gives each site the A of its members, one below the other, and each s B, in the base's type; all made at once."""
    far = [
        p
        for site in sites
        for ab in ("lora_A", "lora_B")
        for p in (getattr(m, ab)["default"].weight for m in site.adapted)
    ]
    scales = [m.scaling["default"] for site in sites for m in site.adapted]
    near = iter(_Near.apply(sites[0].dtype, [len(site.adapted) for site in sites], scales, *far))
    for site in sites:
        site.near = tuple(itertools.islice(near, 1 + len(site.adapted)))


class _Near(torch.autograd.Function):
    """For each site, A of its members and B of its members → all A in one and s B, in another type; gradients come back in
    the type of the parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, sizes: list[int], scales: list[float], *far: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.scales, ctx.kept = sizes, scales, far[0].dtype
        ctx.ranks, near, parts, at = [], [], [], 0
        for size in sizes:
            ranks = [len(a) for a in far[at : at + size]]
            whole = far[at].new_empty((sum(ranks), far[at].shape[1]), dtype=dtype)
            own = [torch.empty_like(b, dtype=dtype) for b in far[at + size : at + 2 * size]]
            near += [whole, *own]
            parts += [*whole.split(ranks), *own]
            ctx.ranks.append(ranks)
            at += 2 * size
        torch._foreach_copy_(parts, list(far))
        torch._foreach_mul_(_last(parts, sizes), scales)
        return tuple(near)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        parts, rest = [], iter(grads)
        for size, ranks in zip(ctx.sizes, ctx.ranks, strict=True):
            parts += [*next(rest).split(ranks), *itertools.islice(rest, size)]
        far = [torch.empty_like(g, dtype=ctx.kept) for g in parts]
        torch._foreach_copy_(far, parts)
        torch._foreach_mul_(_last(far, ctx.sizes), ctx.scales)
        return None, None, None, *far


def _last(pairs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Of runs of `size` A and `size` B each, the Bs."""
    ends = itertools.accumulate(2 * size for size in sizes)
    return [b for size, end in zip(sizes, ends, strict=True) for b in pairs[end - size : end]]


class _LoRA(torch.autograd.Function):
    """x Wᵀ + bias with frozen W, and (x Aᵀ) Bᵀ added to the `parts` of it that are adapted, all in one type."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[slice], a: Tensor, *bs: Tensor
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low, y = linear(rows, a), linear(rows, weight, bias)
        ctx.save_for_backward(rows, weight, a, low, *bs)
        ctx.shape, ctx.parts = x.shape, parts
        for part, mine, b in zip(parts, low.split([b.shape[1] for b in bs], 1), bs, strict=True):
            y[:, part].addmm_(mine, b.T)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, weight, a, low, *bs = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_low, grad_bs = torch.empty_like(low), []
        ranks = [b.shape[1] for b in bs]
        for part, mine, to, b in zip(ctx.parts, low.split(ranks, 1), grad_low.split(ranks, 1), bs, strict=True):
            torch.mm(grad[:, part], b, out=to)
            grad_bs.append(torch.mm(grad[:, part].T, mine))
        grad_x = torch.mm(grad, weight).addmm_(grad_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, torch.mm(grad_low.T, rows), *grad_bs


class _Added(torch.autograd.Function):
    """y + (x Aᵀ) Bᵀ, all in one type: what LoRA adds to a map that is computed elsewhere."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = linear(rows, a)
        ctx.save_for_backward(rows, a, low, b)
        ctx.shape = x.shape
        return torch.addmm(y.reshape(-1, y.shape[-1]), low, b.T).view(y.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, a, low, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_low = torch.mm(flat, b)
        grad_x = torch.mm(grad_low, a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad, grad_x, torch.mm(grad_low.T, rows), torch.mm(flat.T, low)
