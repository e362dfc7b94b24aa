"""How several GPUs share a run: what each way divides, moves to CPU memory, holds besides and sends. One registry.

Read in the code of DeepSpeed 0.19.6 (deepspeed/runtime/zero), PyTorch 2.13 and bitsandbytes 0.50.2, with their defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .. import units
from ..base import architecture as architectures
from ..base import models
from ..count import BYTES
from ..spec import Resolved
from .conventions import quantizable, quantized_bits
from .polynomial import Polynomial, constant

PHASES = ("forward", "backward", "optimizer", "after")
STATES = ("frozen_weights", "trainable_weights", "gradients", "optimizer")
BUCKET = 500_000_000
"""Numbers in DeepSpeed's reduce_bucket_size. The bucket is allocated whole, however few parameters are trained."""
LIVE = 1_000_000_000
"""Numbers in DeepSpeed's stage3_max_live_parameters. Prefetching runs ahead, stage3_prefetch_bucket_size = 5e7 numbers at a
time, until so many are gathered; it stops after the tensor that passes the limit."""


@dataclass(frozen=True)
class Buffer:
    """Memory that exists because several GPUs work together."""

    size: Polynomial
    """Bytes on each GPU."""
    derivation: str
    """The formula, with the run's own numbers."""
    source: str
    phases: tuple[str, ...] = PHASES
    """Phases of the step in which it is there."""


@dataclass(frozen=True)
class Tensors:
    """Sizes in bytes of the tensors that the GPUs send each other, on which the buffers depend."""

    spec: Resolved
    each: int
    """One trained parameter's gradient."""
    layer: int
    """The weights that are gathered at once."""
    weights: Polynomial
    gradients: Polynomial
    layer_gradients: Polynomial
    """The gradients of the layer, or the module outside the layers, that has most of them; `layer` for a bare count."""

    def at(self, size: Polynomial | float) -> float:
        """The value of `size` for this run."""
        spec = self.spec
        return constant(size).value(spec.batch_size, spec.sequence_length, spec.rank)

    def shown(self, size: Polynomial | float) -> str:
        return units.size(self.at(size))


def _ddp(run: Tensors) -> list[Buffer]:
    shown = f"all gradients once more, in buckets = {run.shown(run.gradients)}"
    return [Buffer(run.gradients, shown, "torch DistributedDataParallel, gradient_as_bucket_view=False")]


def _bucket(run: Tensors, phases: tuple[str, ...]) -> Buffer:
    size = BUCKET * run.each
    shown = f"reduce_bucket_size = 500 million × {run.each} bytes = {run.shown(size)}"
    return Buffer(constant(size), shown, "DeepSpeed, stage_1_and_2.py setup_buckets; stage3.py", phases)


def _zero(run: Tensors) -> list[Buffer]:
    shown = f"a gradient on its way to CPU memory, at most a layer's = {run.shown(run.layer_gradients)}"
    leaving = Buffer(run.layer_gradients, shown, "DeepSpeed, stage_1_and_2.py temp_grad_buffer_for_gpu_offload")
    return [_bucket(run, ("backward",)), *([leaving] if run.spec.offload == "optimizer" else [])]


def _zero3(run: Tensors) -> list[Buffer]:
    each = BYTES[run.spec.precision]
    size, shown = run.weights, f"all weights, gathered = {run.shown(run.weights)}"
    if run.at(size) > (limit := LIVE * each + run.layer):
        parts = f"1,000 million × {each} bytes + {run.shown(run.layer)} = {run.shown(limit)}"
        size, shown = constant(limit), f"stage3_max_live_parameters + largest layer = {parts}"
    gathered = Buffer(size, shown, "DeepSpeed, partitioned_param_coordinator.py", ("forward", "backward"))
    return [_bucket(run, PHASES), gathered, *_scales(run)]


def _fsdp(run: Tensors) -> list[Buffer]:
    source = "torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py"
    three, two = (f"{n} × largest layer = {n} × {run.shown(run.layer)}" for n in (3, 2))
    made = f"2 × a layer's gradients = 2 × {run.shown(run.layer_gradients)}: made, and being sent"
    return [
        Buffer(constant(3 * run.layer), f"{three}: received, copied out, and the one before", source, ("forward",)),
        Buffer(constant(2 * run.layer), f"{two}: at work, and the next", source, ("backward",)),
        Buffer(run.layer_gradients * 2, made, source, ("backward",)),
        *_scales(run),
    ]


def _scales(run: Tensors) -> list[Buffer]:
    """NF4's scales, which are no part of the tensor that is divided. A bare count's 4 bits have none."""
    if run.spec.quantization != "nf4" or models.find(run.spec.model).config is None:
        return []
    size, n = quantizable(architectures.of(run.spec.model)) * (quantized_bits(run.spec) - 4) / 8, run.spec.n_gpus
    shown = f"{n - 1}/{n} of NF4's scales, which every GPU has whole = {n - 1}/{n} × {run.shown(size)}"
    return [Buffer(constant(size * (n - 1) / n), shown, "bitsandbytes, Params4bit.__torch_function__")]


@dataclass(frozen=True)
class Strategy:
    note: str
    """What it does, with its sources."""
    divided: tuple[str, ...] = ()
    """Kinds of bytes of which each GPU holds one part in `n_gpus`."""
    whole_between: tuple[str, ...] = ()
    """Divided kinds that are whole while a step accumulates over several passes."""
    offloads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The kinds that move to CPU memory, by the value of the setting `offload`."""
    buffers: Callable[[Tensors], list[Buffer]] = lambda run: []
    sent: tuple[int, int, int] = (0, 0, 0)
    """How often weights are sent in each pass, gradients in each pass, and gradients, or the update, in each step."""


STRATEGIES: dict[str, Strategy] = {
    "none": Strategy("One GPU."),
    "ddp": Strategy(
        "Everything is on every GPU, and gradients are averaged (arXiv 2006.15704).", buffers=_ddp, sent=(0, 0, 2)
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
