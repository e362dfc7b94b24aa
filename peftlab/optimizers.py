"""The optimizers a run can use: torch's own, and bitsandbytes' for 8-bit, paged and fp32 states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .spec import Resolved

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer as TorchOptimizer

BLOCK = 256  # numbers that share a scale in an 8-bit state: bitsandbytes' block, arXiv 2110.02861 section 2
SMALLEST_8BIT = 4096  # parameters of a tensor below which bitsandbytes keeps its states in 32 bits
SMALLEST_PAGED = 100_000  # parameters of a tensor below which bitsandbytes does not page its states


@dataclass(frozen=True)
class Optimizer:
    kind: str  # name of the class in `library`.optim
    states: int  # numbers kept for each trained parameter; 0 for Adafactor, which keeps those of rows and columns
    bits: int | None = None  # of a state; None where it has its parameter's own format
    paged: bool = False  # large states live in memory that the GPU and the CPU share, outside PyTorch's allocator
    library: str = "torch"
    together: bool = False  # on CUDA, torch updates all parameters at once
    options: Mapping[str, float] = field(default_factory=lambda: {"weight_decay": 0.0})
    in_graph: Mapping[str, bool] | None = None  # more options in a CUDA graph; None where it counts steps in Python

    def make(
        self, parameters: Iterable[Tensor] | Iterable[dict[str, Any]], rate: float, **more: bool
    ) -> TorchOptimizer:
        """The library's optimizer of these parameters, or groups of parameters, at the learning rate `rate`."""
        return getattr(import_module(f"{self.library}.optim"), self.kind)(parameters, lr=rate, **self.options, **more)


_bitsandbytes = partial(Optimizer, library="bitsandbytes")
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer("AdamW", 2, together=True, in_graph={"fused": True, "capturable": True}),
    "adamw-8bit": _bitsandbytes("AdamW8bit", 2, 8),
    "paged-adamw-8bit": _bitsandbytes("PagedAdamW8bit", 2, 8, paged=True),
    "adafactor": Optimizer("Adafactor", 0),
    "lion": _bitsandbytes("Lion", 1, 32),
    "sgd": Optimizer("SGD", 0, together=True, in_graph={"fused": True}),
    "sgd-momentum": Optimizer("SGD", 1, together=True, options={"momentum": 0.9}, in_graph={"fused": True}),
}
ADAMW_FP32 = _bitsandbytes("AdamW", 2, 32)  # its states stay in fp32 when its parameters do not


def find(spec: Resolved) -> Optimizer:
    """The run's optimizer. `optimizer_precision` fp32 matters to AdamW alone; the others' states have one format."""
    if spec.optimizer == "adamw" and spec.optimizer_precision == "fp32":
        return ADAMW_FP32
    return OPTIMIZERS[spec.optimizer]


def capturable(spec: Resolved) -> Mapping[str, bool] | None:
    """Options of the run's optimizer as part of a CUDA graph; None where it cannot be one."""
    return None if spec.optimizer_precision == "fp32" else find(spec).in_graph


class BlockwiseStates:
    """What a bitsandbytes optimizer keeps, made at its first step, without its arithmetic: for tracing on fake tensors."""

    def __init__(self, parameters: Sequence[Tensor], kind: Optimizer) -> None:
        self.parameters, self.kind = parameters, kind
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def step(self) -> None:
        import torch

        for parameter in self.parameters:
            if parameter.grad is None or parameter in self.state:
                continue
            n, made = parameter.numel(), self.state.setdefault(parameter, {})
            small = self.kind.bits == 32 or n < SMALLEST_8BIT
            for i in range(self.kind.states):
                if not (self.kind.paged and n >= SMALLEST_PAGED):
                    made[f"state{i}"] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
                if not small:
                    made[f"scales{i}"] = parameter.new_zeros(-(-n // BLOCK), dtype=torch.float32)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.parameters:
            parameter.grad = None
