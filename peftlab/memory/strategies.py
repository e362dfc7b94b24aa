"""How several GPUs share a run: what each way divides, moves to CPU memory, holds besides and sends. One registry.

Read in DeepSpeed 0.19.6 (deepspeed/runtime/zero), PyTorch 2.13 and bitsandbytes 0.50.2, with their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..base import architecture as architectures
from ..base import models
from ..count import BYTES
from ..spec import Resolved
from .conventions import NF4_BITS
from .polynomial import Polynomial, constant

PHASES = ("forward", "backward", "optimizer", "after")
STATES = ("frozen_weights", "trainable_weights", "gradients", "optimizer")
BUCKET = 500_000_000
"""Numbers in DeepSpeed's reduce_bucket_size: allocated whole, however few are trained."""
LIVE = 1_000_000_000
"""Numbers in DeepSpeed's stage3_max_live_parameters. Prefetching, stage3_prefetch_bucket_size = 5e7 at a time, runs ahead
until so many are gathered, and stops after the tensor that passes the limit."""


@dataclass(frozen=True)
class Buffer:
    """Memory that exists because several GPUs work together."""

    size: Polynomial
    """Bytes on each GPU."""
    derivation: str
    """The formula, with the run's own numbers."""
    source: str
    phases: tuple[str, ...] = PHASES
    """When it is there."""


@dataclass(frozen=True)
class Case:
    """What the buffers of a run depend on. Sizes in bytes."""

    spec: Resolved
    """Resolved."""
    each: int
    """Of one trained parameter's gradient."""
    layer: int
    """Of the weights gathered at once."""
    weights: Polynomial
    gradients: Polynomial
    layer_gradients: Polynomial
    """Of the layer, or the module outside the layers, that has most of them; `layer` where that is not known."""

    def at(self, size: Polynomial | float) -> float:
        """Its value for this run."""
        spec = self.spec
        return constant(size).value(spec.batch_size, spec.sequence_length, spec.rank)

    def mb(self, size: Polynomial | float) -> str:
        return f"{self.at(size) / 1e6:,.0f} MB"


def _ddp(case: Case) -> list[Buffer]:
    shown = f"all gradients once more, in buckets = {case.mb(case.gradients)}"
    return [Buffer(case.gradients, shown, "torch DistributedDataParallel, gradient_as_bucket_view=False")]


def _bucket(case: Case, phases: tuple[str, ...]) -> Buffer:
    shown = f"reduce_bucket_size = 500 million × {case.each} bytes = {case.mb(BUCKET * case.each)}"
    return Buffer(constant(BUCKET * case.each), shown, "DeepSpeed, stage_1_and_2.py setup_buckets; stage3.py", phases)


def _zero(case: Case) -> list[Buffer]:
    shown = f"a gradient on its way to CPU memory, at most a layer's = {case.mb(case.layer_gradients)}"
    leaving = Buffer(case.layer_gradients, shown, "DeepSpeed, stage_1_and_2.py temp_grad_buffer_for_gpu_offload")
    return [_bucket(case, ("backward",)), *([leaving] if case.spec.offload == "optimizer" else [])]


def _zero3(case: Case) -> list[Buffer]:
    each = BYTES[case.spec.precision]
    size, shown = case.weights, f"all weights, gathered = {case.mb(case.weights)}"
    if case.at(size) > (limit := LIVE * each + case.layer):
        parts = f"1,000 million × {each} bytes + {case.mb(case.layer)} = {case.mb(limit)}"
        size, shown = constant(limit), f"stage3_max_live_parameters + largest layer = {parts}"
    gathered = Buffer(size, shown, "DeepSpeed, partitioned_param_coordinator.py", ("forward", "backward"))
    return [_bucket(case, PHASES), gathered, *_scales(case)]


def _fsdp(case: Case) -> list[Buffer]:
    source = "torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py"
    three, two = (f"{n} × largest layer = {n} × {case.mb(case.layer)}" for n in (3, 2))
    made = f"2 × a layer's gradients = 2 × {case.mb(case.layer_gradients)}: made, and being sent"
    return [
        Buffer(constant(3 * case.layer), f"{three}: received, copied out, and the one before", source, ("forward",)),
        Buffer(constant(2 * case.layer), f"{two}: at work, and the next", source, ("backward",)),
        Buffer(case.layer_gradients * 2, made, source, ("backward",)),
        *_scales(case),
    ]


def _scales(case: Case) -> list[Buffer]:
    """NF4's scales are no part of the tensor that is divided. A bare count's 4 bits have none."""
    if case.spec.quantization != "nf4" or models.find(case.spec.model).config is None:
        return []
    quantized = sum(m.weight * m.count for m in architectures.of(case.spec.model).linear())
    size, n = quantized * (NF4_BITS[case.spec.double_quantization] - 4) / 8, case.spec.n_gpus
    shown = f"{n - 1}/{n} of NF4's scales, which every GPU has whole = {n - 1}/{n} × {case.mb(size)}"
    return [Buffer(constant(size * (n - 1) / n), shown, "bitsandbytes, Params4bit.__torch_function__")]


@dataclass(frozen=True)
class Strategy:
    note: str
    """What it does, with its sources."""
    divided: tuple[str, ...] = ()
    """Kinds of which each GPU holds one part in `n_gpus`."""
    whole_between: tuple[str, ...] = ()
    """Of these, the ones that are whole after all while passes accumulate."""
    offloads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Setting of `offload` → kinds that move to CPU memory."""
    buffers: Callable[[Case], list[Buffer]] = lambda case: []
    sent: tuple[int, int, int] = (0, 0, 0)
    """Times that weights are sent each pass, gradients each pass, and gradients, or what they changed, each step."""


STRATEGIES: dict[str, Strategy] = {
    "none": Strategy("One GPU."),
    "ddp": Strategy(
        "Everything is on every GPU, and gradients are averaged (arXiv 2006.15704).",
        buffers=_ddp,
        sent=(0, 0, 2),
    ),
    "zero1": Strategy(
        "Optimizer states are divided (ZeRO, arXiv 1910.02054 section 5.1). DeepSpeed keeps them in fp32, and an fp32 copy of "
        "the trained weights too, whatever the settings say; that is not counted here.",
        divided=("optimizer",),
        offloads={"optimizer": ("optimizer",)},
        buffers=_zero,
        sent=(0, 0, 2),
    ),
    "zero2": Strategy(
        "As zero1, and a gradient stays only where it is applied (section 5.2), or in CPU memory (ZeRO-Offload, arXiv "
        "2101.06840).",
        divided=("optimizer", "gradients"),
        offloads={"optimizer": ("optimizer", "gradients")},
        buffers=_zero,
        sent=(0, 1, 1),
    ),
    "zero3": Strategy(
        "As zero2, and weights are gathered when needed (section 5.3). DeepSpeed leaves tensors under 100,000 numbers whole, "
        "small adapters among them. NF4 needs bnb_4bit_quant_storage in the base's format (peft's DeepSpeed guide).",
        divided=STATES,
        offloads={"optimizer": ("optimizer", "gradients"), "parameters": STATES},
        buffers=_zero3,
        sent=(2, 1, 0),
    ),
    "fsdp": Strategy(
        "Weights are gathered a layer at a time (PyTorch's FSDP2). While passes accumulate, transformers' Trainer leaves "
        "gradients whole. NF4 needs bnb_4bit_quant_storage in the base's format (peft's FSDP guide).",
        divided=STATES,
        whole_between=("gradients",),
        offloads={"parameters": STATES},
        buffers=_fsdp,
        sent=(2, 0, 1),
    ),
}
