"""How several GPUs share a run: what one of them holds, what moves to CPU memory, and how much they send. One registry.

Read in the code of DeepSpeed 0.19.6 (deepspeed/runtime/zero), PyTorch 2.13 and bitsandbytes 0.50.2, with their defaults.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .. import units
from ..base import architecture as architectures
from ..count import BYTES
from ..errors import SpecError
from ..spec import Resolved
from .case import Case
from .lines import Polynomial, constant, total
from .states import quantizable, quantized_bits

PHASES = ("forward", "backward", "optimizer")
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
    layer: int
    """The weights that are gathered at once: the largest layer's, or those of all modules outside the layers."""
    weights: Polynomial
    gradients: Polynomial
    layer_gradients: Polynomial
    """The gradients of the layer, or the module outside the layers, that has most of them."""

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
    each = BYTES[run.spec.trained_precision]
    shown = f"reduce_bucket_size = 500 million × {each} bytes = {run.shown(BUCKET * each)}"
    return Buffer(constant(BUCKET * each), shown, "DeepSpeed, stage_1_and_2.py setup_buckets; stage3.py", phases)


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
    """NF4's scales, which are no part of the tensor that is divided."""
    if run.spec.quantization != "nf4":
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


@dataclass(frozen=True)
class Sharded:
    """A run on `n_gpus` GPUs, as one of them sees it."""

    moments: dict[str, dict[str, Polynomial]]
    """Bytes on one GPU. The kind `communication` is the buffers."""
    buffers: list[Buffer]
    """What `communication` consists of, each with its derivation and source."""
    in_cpu: Polynomial
    """Bytes of CPU memory for one GPU; `n_gpus` times that where one host has them all."""
    sent: Polynomial
    """Bytes that one GPU sends in an optimizer step: (N − 1)/N of a tensor each time that ZeRO, section 7, counts it."""
    note: str
    """What the strategy does, with its sources."""


def plan(moments: Mapping[str, Mapping[str, Polynomial]], spec: Resolved) -> Sharded:
    """What one of the run's GPUs holds, from the bytes by kind that one alone would hold at each moment.

    A moment's name begins with its phase. Every GPU has `batch_size` examples of its own, so activations, logits and
    workspace stay as they are. Raises SpecError for settings that exclude each other.
    """
    sharding, offload, n, passes = spec.sharding, spec.offload, spec.n_gpus, spec.accumulation
    strategy = STRATEGIES[sharding]
    if sharding == "none" and n > 1:
        raise SpecError(f"sharding=none: {n} GPUs would train as many models; set it to ddp, or n-gpus to 1")
    if offload not in ("none", *strategy.offloads):
        able = " or ".join(key for key, other in STRATEGIES.items() if offload in other.offloads)
        also = f", or offload to {' or '.join(strategy.offloads)}" if strategy.offloads else ""
        raise SpecError(f"offload={offload}: sharding={sharding} moves no such thing; set sharding to {able}{also}")
    if spec.quantization == "int8" and "frozen_weights" in strategy.divided:
        raise SpecError(
            f"sharding={sharding}: int8 weights cannot be divided (peft issue 2833); set it to zero2, or quantization to nf4"
        )
    run = _tensors(moments, spec)
    buffers = strategy.buffers(run)
    divided = set(strategy.divided) - set(strategy.whole_between if passes > 1 else ())
    moved = strategy.offloads.get(offload, ())
    share = {kind: 1 / n if kind in divided else 1 for kind in STATES}
    left = {**share, **dict.fromkeys(moved, 0)}
    left["temporaries"] = left["optimizer"]
    found = {}
    for name, kinds in moments.items():
        found[name] = {kind: whole * left.get(kind, 1) for kind, whole in kinds.items()}
        found[name]["communication"] = total(b.size for b in buffers if name.split()[0] in b.phases)
    largest = {kind: max((kinds.get(kind, Polynomial()) for kinds in moments.values()), key=run.at) for kind in moved}
    weights_each_pass, gradients_each_pass, each_step = strategy.sent
    sent = run.weights * (weights_each_pass * passes) + run.gradients * (gradients_each_pass * passes + each_step)
    in_cpu = total(size * share[kind] for kind, size in largest.items())
    return Sharded(found, buffers, in_cpu, sent * ((n - 1) / n), strategy.note)


def _tensors(moments: Mapping[str, Mapping[str, Polynomial]], spec: Resolved) -> Tensors:
    case = Case.of(spec)
    held, trained = Counter[int](), Counter[int | str]()
    for m in case.shape.modules:
        for layer in m.layers or (-1,):  # what stands outside the layers is gathered together
            held[layer] += m.weight + m.bias
    for t in case.targets:
        for place in t.layers or (t.module.name,):
            trained[place] += case.method.trained(t.module, spec)
    gradients, layer = case.trained * case.trained_bytes, max(held.values()) * BYTES[spec.precision]
    first = next(iter(moments.values()))
    weights = total(first.get(kind, 0) for kind in STATES[:2])  # the same at every moment
    return Tensors(spec, layer, weights, gradients, gradients * (max(trained.values()) / sum(trained.values())))
