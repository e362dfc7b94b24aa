"""Real training steps, each in a fresh process on a CUDA machine, beside what the trace predicts for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import hardware
from ..errors import RunError, SpecError
from ..resolve import resolve
from ..spec import RunSpec
from .record import provenance

STEPS = 3
"""The first makes the optimizer's states; the last is measured."""


def grid() -> Iterator[RunSpec]:
    """Architectures, methods, precisions, optimizers and quantizations, each varied where it matters."""
    small: dict[str, Any] = {"batch_size": 4, "sequence_length": 512}
    every = """full head last-block ln lora dora lora-plus adalora vera ia3 oft prompt p-tuning prefix houlsby parallel
               io-adapter compacter"""
    for method in every.split():
        yield RunSpec(model="qwen3-0.6b", method=method, precision="bf16", **small)
    for model in ("smollm2-135m", "gemma-3-270m", "gpt2", "opt-350m", "llama-3.2-1b"):
        for method in ("full", "lora", "bitfit" if model in ("gpt2", "opt-350m") else "ia3"):
            yield RunSpec(model=model, method=method, precision="bf16", **small)
        yield RunSpec(model=model, method="lora", precision="fp32", **small)
        yield RunSpec(model=model, method="lora", precision="bf16", gradient_checkpointing=True, **small)
    for method in ("full", "lora", "houlsby"):
        yield RunSpec(model="smollm2-360m", method=method, precision="amp", **small)
    for optimizer in ("sgd", "sgd-momentum"):
        yield RunSpec(model="smollm2-360m", method="full", precision="bf16", optimizer=optimizer, **small)
    long: dict[str, Any] = {"batch_size": 1, "sequence_length": 2048}
    yield RunSpec(model="gemma-3-270m", method="lora", precision="bf16", **long)
    yield RunSpec(model="smollm2-1.7b", method="qlora", precision="bf16", rank=16, gradient_checkpointing=True, **long)
    yield RunSpec(model="smollm2-1.7b", method="qlora", precision="bf16", rank=16, double_quantization=False, **long)
    yield RunSpec(model="smollm2-1.7b", method="lora", quantization="int8", precision="bf16", rank=16, **long)
    yield RunSpec(model="llama-3.1-8b", method="lora", precision="bf16", rank=16, batch_size=1, sequence_length=1024)
    yield RunSpec(model="llama-3.1-8b", method="qlora", precision="bf16", rank=16, batch_size=1, sequence_length=1024)


def measure(spec: RunSpec) -> dict[str, Any]:
    """Bytes at the peak of a steady step on this machine's GPU. Weights are random: memory does not mind."""
    import torch

    from .. import architecture as architectures
    from .. import methods
    from ..catalog import models
    from ..memory import step

    entry, shape = models.find(spec.model or ""), architectures.of(spec.model or "")
    assert entry.config is not None
    model = architectures.build_meta(entry.config).to(step.DTYPES[spec.precision or "fp32"]).to_empty(device="cuda")
    model.tie_weights()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02)
    model.requires_grad_(False)
    if spec.quantization not in (None, "none"):
        _quantize(model, {name for m in shape.linear() for _, name in m.names()}, spec)
    chosen = methods.targets(shape, spec, entry.name)
    model = step.prepare(methods.find(spec.method or "").attach(model, chosen, spec), spec)
    optimizer = step.optimizer([p for p in model.parameters() if p.requires_grad], spec)
    torch.cuda.empty_cache()
    for _ in range(STEPS):
        torch.cuda.reset_peak_memory_stats()
        for _ in step.run(model, optimizer, spec, "cuda"):
            pass
    free, total = torch.cuda.mem_get_info()
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "after_bytes": torch.cuda.memory_allocated(),
        "device_used_bytes": total - free,
    }


def _quantize(model: Any, names: set[str], spec: RunSpec) -> None:
    """As weights.load does for a model on disk."""
    import bitsandbytes as bnb
    import torch

    library: Any = bnb.nn
    double = bool(spec.double_quantization)
    for name, module in list(model.named_modules()):
        if name not in names:
            continue
        sizes = (module.in_features, module.out_features, module.bias is not None)
        weight = module.weight.data.cpu()
        if spec.quantization == "nf4":
            new = library.Linear4bit(*sizes, weight.dtype, double, "nf4")
            new.weight = library.Params4bit(weight, False, compress_statistics=double, quant_type="nf4", module=new)
        else:
            new = library.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
            new.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], new.to("cuda").requires_grad_(False))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = spec.quantization == "nf4", spec.quantization == "int8"
    torch.cuda.empty_cache()


def row(spec: RunSpec) -> dict[str, Any]:
    """Measured and predicted, for one resolved spec."""
    from ..memory.trace import trace

    measured = measure(spec)
    return {"spec": spec.to_dict(), "measured": measured, "predicted": {k: dict(v) for k, v in trace(spec).items()}}


def record_memory(out: Path, at_once: int = 1, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the grid and writes every row to `out`. A row that fails says so, and the others go on.

    With several `at_once` on one GPU, what the device has in use is everybody's, and is left out.
    """
    if hardware.here().device != "cuda":
        raise SpecError("bench memory measures a CUDA GPU, and this machine has none; run it on one that has")

    def run(spec: RunSpec) -> dict[str, Any]:
        command = [sys.executable, "-c", "from peftlab.bench.memory import alone; alone()", spec.to_json()]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            found: dict[str, Any] = {
                "spec": spec.to_dict(),
                "error": (done.stderr.strip().splitlines() or ["no word"])[-1],
            }
        else:
            found = json.loads(done.stdout.splitlines()[-1])
            if at_once > 1:
                found["measured"]["device_used_bytes"] = None
        say(f"{spec.model} {spec.method}: {found.get('error') or 'measured'}")
        return found

    with ThreadPoolExecutor(at_once) as pool:
        rows = list(pool.map(run, [resolve(spec) for spec in grid()]))
    document = provenance() | {"kind": "memory", "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    if all("error" in r for r in rows):
        raise RunError(f"no configuration could be measured; the first said: {rows[0]['error']}")
    return document


def alone() -> None:
    """What a fresh process runs: one row, to its standard output."""
    print(json.dumps(row(RunSpec.from_json(sys.argv[1]))))
