"""Real training steps, each in a fresh process on a CUDA machine, beside what the trace predicts for them."""

from __future__ import annotations

import functools
import json
import multiprocessing
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import hardware, methods, seam
from ..base import architecture, configs, models
from ..errors import PeftlabError, RunError, SpecError
from ..measured import provenance
from ..memory import exact, step
from ..resolve import resolve
from ..spec import Json, Resolved, RunSpec
from . import Say, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SPREAD = 0.02
"""Standard deviation of the weights, as most models start."""


def grid() -> Iterator[RunSpec]:
    """Architectures, methods, precisions, optimizers and quantizations, each varied where it matters."""
    small: Json = {"batch_size": 4, "sequence_length": 512, "precision": "bf16"}
    every = """full head last-block ln lora dora lora-plus adalora vera ia3 oft prompt p-tuning prefix houlsby pfeiffer parallel
               io-adapter compacter"""
    yield from _by("qwen3-0.6b", every, small)
    for model in ("smollm2-135m", "gemma-3-270m", "gpt2", "opt-350m", "llama-3.2-1b"):
        yield from _by(model, "full lora bitfit" if model in ("gpt2", "opt-350m") else "full lora ia3", small)
        yield from _by(model, "lora", small | {"precision": "fp32"})
        yield from _by(model, "lora", small | {"gradient_checkpointing": True})
    yield from _by("smollm2-360m", "full lora houlsby", small | {"precision": "amp"})
    short = {"batch_size": 1, "sequence_length": 128, "precision": "amp"}  # the optimizer's step is the peak
    yield from _by("llama-3.2-1b", "full", short)
    for optimizer in ("sgd", "sgd-momentum", "adafactor", "lion", "adamw-8bit", "paged-adamw-8bit"):
        yield from _by("smollm2-360m", "full", small | {"optimizer": optimizer})
    yield from _by("smollm2-360m", "full", small | {"optimizer_precision": "fp32"})
    settings: Json
    for settings in ({"dropout": 0.05}, {"layers": "last:4"}, {"adapter_precision": "bf16"}, {"hold_outputs": True},
                     {"accumulation": 4}, {"attention": "eager"}, {"precision": "fp16"}, {"optimizer": "adamw-8bit"},
                     {"target_modules": "query,value"}, {"batch_size": 3, "sequence_length": 700}):  # fmt: skip
        yield from _by("smollm2-360m", "lora", small | settings)
    long: Json = {"batch_size": 1, "sequence_length": 2048, "precision": "bf16"}
    yield from _by("gemma-3-270m", "lora", long)
    yield from _by("gemma-3-270m", "full", long | {"gradient_checkpointing": True})
    yield from _by("olmoe-1b-7b", "lora ln", small)
    long["rank"] = 16
    yield from _by("smollm2-1.7b", "qlora", long | {"gradient_checkpointing": True})
    yield from _by("smollm2-1.7b", "qlora", long | {"double_quantization": False})
    yield from _by("smollm2-1.7b", "lora", long | {"quantization": "int8"})
    yield from _by("llama-3.1-8b", "lora qlora", long | {"sequence_length": 1024})
    yield from _by("llama-3.1-8b", "qlora", long | {"gradient_checkpointing": True})


def _by(model: str, methods: str, settings: Json) -> Iterator[RunSpec]:
    for method in methods.split():
        yield RunSpec(model=model, method=method, **settings)


def measure(spec: Resolved) -> Json:
    """Bytes at the peak of a steady step on this machine's GPU, and its seconds. Random weights take as much memory as any."""
    entry, shape = models.find(spec.model), architecture.of(spec.model)
    assert entry.config is not None
    model = torch.nn.Module.to(configs.build_meta(entry.config), step.DTYPES[spec.precision]).requires_grad_(False)
    seam.set_attention(model.config, spec.attention)
    if spec.quantization != "none":
        _quantize(model, {name for m in shape.linear() for _, name in m.names()}, spec)
    step.materialize(model, lambda _, tensor: drawn(tensor, "cuda"))
    chosen = methods.targets(shape, spec, entry.name)
    model = step.prepare(methods.find(spec.method).attach(model, chosen, spec), spec)
    optimizer = step.optimizer([p for p in model.parameters() if p.requires_grad], spec)
    torch.cuda.empty_cache()
    seconds = []
    for _ in range(3):  # the first makes the optimizer's states; the last is measured
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(spec.accumulation):
            for _ in step.micro(model, spec, "cuda"):
                pass
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "after_bytes": torch.cuda.memory_allocated(),
        "device_used_bytes": total - free,
        "step_seconds": min(seconds),
    }


def drawn(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """In place of a tensor without numbers, one of its shape and type with random ones, or zeros where they are whole."""
    if not tensor.is_meta:  # a quantized weight
        return tensor
    made = torch.empty_like(tensor, device=device)
    return made.normal_(0, SPREAD) if made.is_floating_point() else made.zero_()


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
    torch.cuda.empty_cache()


def record_memory(out: Path, say: Say, at_once: int = 1) -> Json:
    """Runs the grid and writes every row to `out`, measured and predicted; rows that it has from this hardware stay.

    A row's seconds and what its whole process takes can be told only while no other uses the GPU: with several `at_once`,
    for the first rows. A row that fails says so, and the others go on. Raises SpecError without a GPU, and RunError where
    every row fails.
    """
    if hardware.here().device != "cuda":
        raise SpecError("bench memory measures a CUDA GPU, and this machine has none; run it on one that has")
    others = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    idle = int(subprocess.run(others, capture_output=True, text=True, check=True).stdout) * 2**20
    fresh = multiprocessing.get_context("forkserver")  # its children share the imports, and no CUDA context
    fresh.set_forkserver_preload(["torch", "transformers", "accelerate"])
    specs = [resolve(spec) for spec in grid()]
    rows: list[Json] = [{"spec": spec.to_dict()} for spec in specs]
    document = provenance() | {"kind": "memory", "rows": rows}
    known: list[Json] = []
    if out.exists() and out.stat().st_size:  # the command line makes an empty one, to know that it can
        before: Json = json.loads(out.read_text(encoding="utf-8"))
        known = [row for row in before["rows"] if "measured" in row and before["hardware"] == document["hardware"]]

    def run(i: int, alone: bool) -> None:
        row, name = rows[i], f"{specs[i].model} {specs[i].method}"
        try:
            found = next((k["measured"] for k in known if k["spec"] == row["spec"]), None)
            if not found:
                found = _measure_apart(specs[i], fresh)
                used = found.pop("device_used_bytes") - idle
                found |= {"process_bytes": used} if alone else {"process_bytes": None, "step_seconds": None}
            row["measured"] = found
            report = predicted[i].result().to_dict()
            kept = ("peak_allocated_bytes", "peak_reserved_bytes", "process_bytes", "components")
            row["predicted"] = {quantity: report[quantity] for quantity in kept}
            errors = (row["predicted"][quantity] / row["measured"][quantity] - 1 for quantity in kept[:2])
            say("{}: allocated {:+.2%}, reserved {:+.2%}".format(name, *errors))
        except PeftlabError as error:
            row["error"] = str(error)
            say(f"{name}: {error}")
        write(document, out)

    first = len(specs) if at_once == 1 else 4
    with ProcessPoolExecutor(6, fresh) as several, ThreadPoolExecutor(at_once) as pool:
        predicted = [several.submit(exact, spec) for spec in specs]
        wait(predicted)  # or they would slow the steps
        for i in range(first):
            run(i, alone=True)
        list(pool.map(lambda i: run(i, alone=False), range(first, len(specs))))
    if all("error" in row for row in rows):
        raise RunError(f"no configuration could be measured; the first said: {rows[0]['error']}")
    return document


def _measure_apart(spec: Resolved, context: BaseContext) -> Json:
    """`measure` in a process of its own. Raises RunError with its error, also where the process dies."""
    try:
        with ProcessPoolExecutor(1, context) as process:
            return process.submit(measure, spec).result()
    except BrokenProcessPool:
        raise RunError("the process died") from None
    except Exception as error:
        said = str(error).splitlines() or ["no word"]
        raise RunError(f"{type(error).__name__}: {said[0]}") from None
