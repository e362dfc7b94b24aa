"""One training step of random weights on this machine's GPU: the bytes that it takes, and its seconds in either gear."""

from __future__ import annotations

import functools
import gc
import logging
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import fused, methods, seam
from ..base import architecture, configs, models
from ..errors import RunError
from ..memory import step
from ..run.batches import IGNORED, Batch
from ..run.gears import Eager, Graph, Step, why_eager
from ..run.loop import quickened
from ..spec import Json, Resolved

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPREAD = 0.02
"""Standard deviation of the weights, as most models start."""
WARM, STEPS, LONG_ENOUGH, MOST = 2, 5, 1.0, 25
"""Steps that are not timed; then at least STEPS are, and up to MOST until they took so many seconds together."""
QUEUED = 8
"""Steps that the graph gear queues before it waits, as a run does."""


def measure(spec: Resolved) -> Json:
    """Bytes at the peak of a steady step on this machine's GPU. Random weights take as much memory as any.

    `squeezed` says that the allocator had to give memory back because others had taken the rest.
    """
    model = placed(on_meta(spec), spec, "cuda")
    optimizer = step.optimizer([p for p in model.parameters() if p.requires_grad], spec)
    torch.cuda.empty_cache()
    for _ in range(3):  # the first makes the optimizer's states; the last is measured
        torch.cuda.reset_peak_memory_stats()
        _take(model, optimizer, spec, None)
        torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "after_bytes": torch.cuda.memory_allocated(),
        "device_used_bytes": total - free,
        "squeezed": torch.cuda.memory_stats()["num_alloc_retries"] > 0,
    }


def timed(model: PreTrainedModel, spec: Resolved, gear: str, device: str) -> Json:
    """Seconds of a usual step of a model that is still `on_meta`, which is let go; nobody else may use the GPU.

    They come with those until the last operation was launched, those of them in the forward pass, and those in which the GPU
    computed, where it says. Raises RunError where the gear cannot run the step.
    """
    on_cuda = device == "cuda"
    prepare = _graph if gear == Graph.name else _eager
    take, each = prepare(model, spec, device)
    found: list[tuple[float, float, float]] = []
    for done in range(WARM + MOST):
        start = time.perf_counter()
        forward = take()
        launched = time.perf_counter()
        if on_cuda:
            torch.cuda.synchronize()
        if done >= WARM:
            found.append(((time.perf_counter() - start) / each, (launched - start) / each, forward))
        if len(found) >= STEPS and sum(whole for whole, *_ in found) * each > LONG_ENOUGH:
            break
    seconds, launching, forward = (statistics.median(column) for column in zip(*found, strict=True))
    busy = _busy(take) / each if on_cuda else None
    launches = {"launch_seconds": launching, "forward_launch_seconds": forward or None}
    return {"step_seconds": seconds} | launches | {"busy_seconds": busy or None}


def release() -> None:
    """Gives back what models that nobody holds any more have taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def on_meta(spec: Resolved) -> PreTrainedModel:
    """The frozen base of a run without numbers, which takes no memory."""
    entry = models.find(spec.model)
    assert entry.config is not None
    model = torch.nn.Module.to(configs.build_meta(entry.config), step.DTYPES[spec.precision]).requires_grad_(False)
    seam.set_attention(model.config, spec.attention)
    return model


def placed(model: PreTrainedModel, spec: Resolved, device: str, adjoined: bool = False) -> PreTrainedModel:
    """The base with random numbers on a device and the method attached, in training; `adjoined` as the engine has it."""
    entry, shape = models.find(spec.model), architecture.of(spec.model)
    if spec.quantization != "none":
        _quantize(model, {name for m in shape.linear() for _, name in m.names()}, spec)
    step.materialize(model, lambda _, tensor: drawn(tensor, device))
    if adjoined and spec.quantization == "none":
        fused.adjoin(model)
    chosen = methods.targets(shape, spec, entry.name)
    return step.prepare(methods.find(spec.method).attach(model, chosen, spec), spec)


def drawn(tensor: Tensor, device: str) -> Tensor:
    """In place of a tensor without numbers, one of its shape and type with random ones, or zeros where they are whole."""
    if not tensor.is_meta:  # a quantized weight
        return tensor
    made = torch.empty_like(tensor, device=device)
    return made.normal_(0, SPREAD) if made.is_floating_point() else made.zero_()


def _take(model: PreTrainedModel, optimizer: torch.optim.Optimizer, spec: Resolved, ids: Tensor | None) -> float:
    """One step as any trainer takes it, one operation launched after the other. Returns the seconds of launching forward."""
    device, forward = next(model.parameters()).device.type, 0.0
    for _ in range(spec.accumulation):
        began = time.perf_counter()
        for phase in step.micro(model, spec, device, ids=ids):
            if phase == "backward":
                forward += time.perf_counter() - began
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return forward


def _eager(model: PreTrainedModel, spec: Resolved, device: str) -> tuple[Callable[[], float], int]:
    """What takes a step, and how many it takes at once."""
    model = placed(model, spec, device)
    optimizer = step.optimizer([p for p in model.parameters() if p.requires_grad], spec)
    ids = torch.randint(model.config.vocab_size, (spec.batch_size, spec.sequence_length), device=device)
    return functools.partial(_take, model, optimizer, spec, ids), 1


def _graph(model: PreTrainedModel, spec: Resolved, device: str) -> tuple[Callable[[], float], int]:
    """As `_eager`, for the engine's own step: fused operations and clipping, in one CUDA graph where there is CUDA."""
    why = why_eager(spec, device)
    if why and device == "cuda":
        raise RunError(why)
    model = placed(model, spec, device, adjoined=True)
    quickened(model, spec)
    gear: Eager = Eager(Step(model, spec), why) if why else Graph(Step(model, spec, capturable=True))
    shape = (2, spec.batch_size, spec.sequence_length)
    data = torch.randint(model.config.vocab_size, (spec.accumulation, *shape))
    data[:, 1, :, 0] = IGNORED  # nothing comes before the first token
    answers = spec.batch_size * (spec.sequence_length - 1)
    pieces = [Batch(d.pin_memory() if device == "cuda" else d, 0, answers, d[0].numel()) for d in data]

    def take() -> float:
        gear.fetch([gear.run(pieces, spec.learning_rate) for _ in range(QUEUED)])
        return 0.0  # nothing is launched for itself

    return take, QUEUED


def _busy(take: Callable[[], float]) -> float:
    """Seconds in which the GPU computed; 0 where it does not tell."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        take()
        torch.cuda.synchronize()
    kineto: Any = seen.profiler
    on_gpu = (e for e in kineto.kineto_results.events() if e.device_type().name == "CUDA")
    return sum(e.duration_ns() for e in on_gpu) / 1e9


def _quantize(model: PreTrainedModel, names: set[str], spec: Resolved) -> None:
    """Quantizes the linear maps of these names as weights.load does for a model on disk."""
    import bitsandbytes as bnb

    library: Any = bnb.nn
    four, double = spec.quantization == "nf4", spec.double_quantization
    draw = functools.cache(torch.randn)  # drawing 8 billion numbers takes minutes
    for name, module in list(model.named_modules()):
        if name not in names:
            continue
        assert isinstance(module, torch.nn.Linear)
        sizes = (module.in_features, module.out_features, module.bias is not None)
        weight = draw(module.weight.shape, dtype=module.weight.dtype)
        if four:
            new = library.Linear4bit(*sizes, weight.dtype, double, "nf4", device="meta")
            new.weight = library.Params4bit(weight, False, compress_statistics=double, quant_type="nf4", module=new)
        else:
            new = library.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
            new.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.weight = new.weight.to("cuda")
        model.set_submodule(name, new.requires_grad_(False))
    vars(model).update(is_loaded_in_4bit=four, is_loaded_in_8bit=not four)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(
        logging.ERROR
    )  # at each product it says how it rounds
    torch.cuda.empty_cache()
