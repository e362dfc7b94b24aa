"""The exact source: one training step on fake tensors, every allocation counted. Importing this imports torch.

Two shallow copies of the model are traced, and every phase of the step is extended linearly to the full depth. The first step
makes the optimizer's states; the second is the one reported.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .. import architecture as architectures
from .. import methods
from ..catalog import models
from ..errors import SpecError
from ..spec import RunSpec
from . import kernels, step

BLOCK = 512
"""The CUDA allocator rounds every tensor up to this many bytes."""
PHASES = ("forward", "backward", "optimizer")
KINDS = ("frozen_weights", "trainable_weights", "gradients", "optimizer", "activations", "logits")


class Ledger(TorchDispatchMode):
    """Counts the bytes of live storages by kind, and keeps the composition at the highest point."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.sizes: dict[int, int] = {}
        self.kinds: dict[int, str] = {}
        self.live = dict.fromkeys(KINDS, 0)
        self.peak = dict(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.see, out)
        if func is torch.ops.aten.bernoulli_.float:  # a dropout mask: one byte an element on CUDA
            self.shrink(out)
        return out

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self.sizes or not size:
            return
        wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        self.sizes[key], self.kinds[key] = size, "logits" if wide else "activations"
        self.live[self.kinds[key]] += size
        self.mark()
        weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        if key in self.sizes:
            self.live[self.kinds.pop(key)] -= self.sizes.pop(key)

    def shrink(self, mask: torch.Tensor) -> None:
        key, size = mask.untyped_storage()._cdata, -(-mask.numel() // BLOCK) * BLOCK
        if self.sizes.get(key, 0) > size:
            self.live[self.kinds[key]] -= self.sizes[key] - size
            self.sizes[key] = size

    def name(self, tensors: Any, kind: str) -> None:
        """From now on these tensors are of that kind."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self.sizes:
                self.live[self.kinds[key]] -= self.sizes[key]
                self.kinds[key] = kind
                self.live[kind] += self.sizes[key]

    def mark(self) -> None:
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def phase(self) -> dict[str, int]:
        """The composition at the highest point since the last call."""
        highest, self.peak = self.peak, dict(self.live)
        return highest


_one_at_a_time = threading.Lock()


@lru_cache(maxsize=256)
def trace(spec: RunSpec) -> Mapping[str, Mapping[str, int]]:
    """Phase → kind → bytes at that phase's highest point, and `after` the step, for a resolved spec.

    Raises SpecError for a model without a config and for what cannot be traced.
    """
    entry = models.find(spec.model or "")
    if entry.config is None:
        raise SpecError(f"model={spec.model}: a bare count has no layers to trace; name a model such as llama-3.1-70b")
    if spec.optimizer not in step.OPTIMIZERS:
        raise SpecError(
            f"optimizer={spec.optimizer}: the trace knows {', '.join(step.OPTIMIZERS)}; choose one of these"
        )
    depth = architectures.of(spec.model or "").n_layers
    period = _period(entry.config)
    few, more = (2 * period, 4 * period) if period == 1 else (period, 2 * period)
    with _one_at_a_time:
        if more >= depth:
            return _trace(spec, depth)
        low, high = _trace(spec, few), _trace(spec, more)
    reach = (depth - few) / (more - few)
    return {
        phase: {kind: round(low[phase][kind] + reach * (high[phase][kind] - low[phase][kind])) for kind in KINDS}
        for phase in low
    }


def _period(config: Mapping[str, Any]) -> int:
    """After how many layers the kinds of layer repeat: 6 in Gemma 3, whose sixth sees further than its window."""
    kinds = config.get("layer_types")
    if not kinds:
        return int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 1)
    return next(p for p in range(1, len(kinds) + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds)))


def _shallow(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    cut = {**config, **{name: depth for name in ("num_hidden_layers", "n_layer") if name in config}}
    if cut.get("layer_types"):
        cut["layer_types"] = cut["layer_types"][:depth]
    return cut


def _trace(spec: RunSpec, depth: int) -> dict[str, dict[str, int]]:
    kernels.register()
    model = _meta(spec, depth)
    ledger = Ledger(model.config.vocab_size)
    found: dict[str, dict[str, int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        _fake(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        ledger.name((*model.parameters(), *model.buffers()), "frozen_weights")
        ledger.name(trained, "trainable_weights")
        optimizer = step.optimizer(trained, spec)
        for _ in range(2):
            ledger.phase()
            for phase in step.run(model, optimizer, spec, "cpu"):
                found[phase] = ledger.phase()
                if phase == "backward":
                    ledger.name((p.grad for p in trained if p.grad is not None), "gradients")
                if phase == "optimizer":
                    states = (t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
                    ledger.name(states, "optimizer")
        found["after"] = dict(ledger.live)
    return found


def _meta(spec: RunSpec, depth: int) -> Any:
    """The model at that depth with the method attached, on the meta device, in the run's types."""
    entry = models.find(spec.model or "")
    assert entry.config is not None
    config = _shallow(entry.config, depth)
    shape = architectures.build(config)
    plain = spec.but(layers="all") if spec.layers else spec
    method = methods.METHODS["lora" if spec.method == "pissa" else spec.method or ""]  # its start needs W's numbers
    model = architectures.build_meta(config).to(step.DTYPES[spec.precision or "fp32"]).requires_grad_(False)
    model.config._attn_implementation = kernels.NAME
    chosen = methods.targets(shape, plain, entry.name)
    model = method.attach(model, chosen, plain.but(method=method.key))
    if spec.quantization not in (None, "none"):
        names = {name for m in shape.linear() for _, name in m.names()}
        kernels.quantize(model, names, spec.quantization or "", bool(spec.double_quantization))
    return step.prepare(model, spec)


def _fake(model: Any) -> None:
    """Fresh fake tensors in place of the meta ones; what was tied stays tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in made:
                    new = torch.empty_like(old, device="cpu")
                    is_parameter = held is module._parameters
                    made[id(old)] = torch.nn.Parameter(new, old.requires_grad) if is_parameter else new
                held[name] = old if old is None else made[id(old)]
