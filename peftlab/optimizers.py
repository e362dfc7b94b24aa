"""The optimizers a run can use: torch's own, and bitsandbytes' for 8-bit, paged and fp32 states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .spec import Resolved

BLOCK = 256
"""Numbers that share a scale in an 8-bit state: bitsandbytes' block, arXiv 2110.02861 section 2."""
SMALLEST_8BIT = 4096
"""Parameters of a tensor below which bitsandbytes keeps its states in 32 bits."""
SMALLEST_PAGED = 100_000


@dataclass(frozen=True)
class Optimizer:
    make: Callable[..., Any]
    """Of (parameters or groups, learning rate)."""
    states: int
    """Numbers kept for each trained parameter; 0 for Adafactor, whose rows and columns are no multiple of them."""
    bits: int | None = None
    """Of a state; None where it has its parameter's own format."""
    paged: bool = False
    """Large states live in memory that the GPU and the CPU share, outside PyTorch's allocator."""
    library: str = "torch"
    together: bool = False
    """On CUDA, torch updates all parameters at once."""


def _torch(name: str, **options: Any) -> Callable[..., Any]:
    def make(parameters: Any, rate: float, **more: Any) -> Any:
        import torch

        return getattr(torch.optim, name)(parameters, lr=rate, **options, **more)

    return make


def _bitsandbytes(name: str) -> Callable[..., Any]:
    def make(parameters: Any, rate: float) -> Any:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(parameters, lr=rate, weight_decay=0.0)

    return make


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_torch("AdamW", weight_decay=0.0), 2, together=True),
    "adamw-8bit": Optimizer(_bitsandbytes("AdamW8bit"), 2, bits=8, library="bitsandbytes"),
    "paged-adamw-8bit": Optimizer(_bitsandbytes("PagedAdamW8bit"), 2, bits=8, paged=True, library="bitsandbytes"),
    "adafactor": Optimizer(_torch("Adafactor", weight_decay=0.0), 0),
    "lion": Optimizer(_bitsandbytes("Lion"), 1, bits=32, library="bitsandbytes"),
    "sgd": Optimizer(_torch("SGD"), 0, together=True),
    "sgd-momentum": Optimizer(_torch("SGD", momentum=0.9), 1, together=True),
}
ADAMW_FP32 = Optimizer(_bitsandbytes("AdamW"), 2, bits=32, library="bitsandbytes")
"""AdamW whose states stay in fp32 when its parameters do not."""
CAPTURABLE: dict[str, dict[str, Any]] = {
    "adamw": {"fused": True, "capturable": True},
    "sgd": {"fused": True},
    "sgd-momentum": {"fused": True},
}
"""Those that can be part of a CUDA graph, and the options for it. The others count steps in Python."""


def capturable(spec: Resolved) -> dict[str, Any] | None:
    """Options of a resolved spec's optimizer as part of a CUDA graph; None where it cannot be one."""
    return None if spec.optimizer_precision == "fp32" else CAPTURABLE.get(spec.optimizer)


def fused(spec: Resolved) -> dict[str, Any]:
    """Options with which a resolved spec's optimizer takes its step in one operation on a CPU."""
    return {"fused": True} if capturable(spec) else {}


def find(spec: Resolved) -> Optimizer:
    """Of a resolved spec. `optimizer_precision` fp32 matters to AdamW alone; the others' states have one format."""
    if spec.optimizer == "adamw" and spec.optimizer_precision == "fp32":
        return ADAMW_FP32
    return OPTIMIZERS[spec.optimizer]


class BlockwiseStates:
    """What a bitsandbytes optimizer keeps, made at its first step, without its arithmetic: for tracing on fake tensors."""

    def __init__(self, parameters: Sequence[Any], kind: Optimizer) -> None:
        self.parameters, self.kind = parameters, kind
        self.state: dict[Any, dict[str, Any]] = {}

    def step(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None and parameter not in self.state:
                self.state[parameter] = self._states(parameter)

    def _states(self, parameter: Any) -> dict[str, Any]:
        import torch

        n, made = parameter.numel(), {}
        small = self.kind.bits == 32 or n < SMALLEST_8BIT
        for i in range(self.kind.states):
            if not (self.kind.paged and n >= SMALLEST_PAGED):
                made[f"state{i}"] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
            if not small:
                made[f"scales{i}"] = parameter.new_zeros(-(-n // BLOCK), dtype=torch.float32)
        return made

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None
