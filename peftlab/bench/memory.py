"""Real training steps, each in a fresh process on a CUDA machine, beside what the trace predicts for them."""

from __future__ import annotations

import functools
import json
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from .. import hardware
from ..base import models
from ..errors import PeftlabError, RunError, SpecError
from ..measured import provenance
from ..memory import exact
from ..resolve import resolve
from ..spec import Resolved, RunSpec

STEPS = 3
"""The first makes the optimizer's states; the last is measured."""


def grid() -> Iterator[RunSpec]:
    """Architectures, methods, precisions, optimizers and quantizations, each varied where it matters."""
    small: dict[str, Any] = {"batch_size": 4, "sequence_length": 512, "precision": "bf16"}
    every = """full head last-block ln lora dora lora-plus adalora vera ia3 oft prompt p-tuning prefix houlsby pfeiffer parallel
               io-adapter compacter"""
    for method in every.split():
        yield RunSpec(model="qwen3-0.6b", method=method, **small)
    for model in ("smollm2-135m", "gemma-3-270m", "gpt2", "opt-350m", "llama-3.2-1b"):
        for method in ("full", "lora", "bitfit" if model in ("gpt2", "opt-350m") else "ia3"):
            yield RunSpec(model=model, method=method, **small)
        yield RunSpec(model=model, method="lora", **small | {"precision": "fp32"})
        yield RunSpec(model=model, method="lora", gradient_checkpointing=True, **small)
    for method in ("full", "lora", "houlsby"):
        yield RunSpec(model="smollm2-360m", method=method, **small | {"precision": "amp"})
    yield RunSpec(  # so short that the optimizer's step is the peak
        model="llama-3.2-1b", method="full", batch_size=1, sequence_length=128, precision="amp"
    )
    for optimizer in ("sgd", "sgd-momentum", "adafactor", "lion", "adamw-8bit", "paged-adamw-8bit"):
        yield RunSpec(model="smollm2-360m", method="full", optimizer=optimizer, **small)
    yield RunSpec(model="smollm2-360m", method="full", optimizer_precision="fp32", **small)
    lora = RunSpec(model="smollm2-360m", method="lora", **small)
    for settings in ({"dropout": 0.05}, {"layers": "last:4"}, {"adapter_precision": "bf16"}, {"hold_outputs": True},
                     {"accumulation": 4}, {"attention": "eager"}, {"precision": "fp16"}, {"optimizer": "adamw-8bit"},
                     {"target_modules": "query,value"}, {"batch_size": 3, "sequence_length": 700}):  # fmt: skip
        yield lora.but(**settings)
    long: dict[str, Any] = {"batch_size": 1, "sequence_length": 2048, "precision": "bf16"}
    yield RunSpec(model="gemma-3-270m", method="lora", **long)
    yield RunSpec(model="gemma-3-270m", method="full", gradient_checkpointing=True, **long)
    for method in ("lora", "ln"):
        yield RunSpec(model="olmoe-1b-7b", method=method, **small)
    yield RunSpec(model="smollm2-1.7b", method="qlora", rank=16, gradient_checkpointing=True, **long)
    yield RunSpec(model="smollm2-1.7b", method="qlora", rank=16, double_quantization=False, **long)
    yield RunSpec(model="smollm2-1.7b", method="lora", quantization="int8", rank=16, **long)
    for method in ("lora", "qlora"):
        yield RunSpec(model="llama-3.1-8b", method=method, rank=16, **long | {"sequence_length": 1024})
    yield RunSpec(model="llama-3.1-8b", method="qlora", rank=16, gradient_checkpointing=True, **long)


def measure(spec: Resolved) -> dict[str, Any]:
    """Bytes at the peak of a steady step on this machine's GPU, and its seconds. Weights are random: memory does not mind."""
    import torch

    from .. import methods
    from ..base import architecture as architectures
    from ..base import configs
    from ..memory import step

    entry, shape = models.find(spec.model), architectures.of(spec.model)
    assert entry.config is not None
    model = configs.build_meta(entry.config).to(step.DTYPES[spec.precision]).requires_grad_(False)
    model.config._attn_implementation = spec.attention
    if spec.quantization != "none":
        _quantize(model, {name for m in shape.linear() for _, name in m.names()}, spec)
    step.materialize(model, _random)
    chosen = methods.targets(shape, spec, entry.name)
    model = step.prepare(methods.find(spec.method).attach(model, chosen, spec), spec)
    optimizer = step.optimizer([p for p in model.parameters() if p.requires_grad], spec)
    torch.cuda.empty_cache()
    seconds = []
    for _ in range(STEPS):
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step.run(model, optimizer, spec, "cuda")
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


def _random(name: str, tensor: Any) -> Any:
    import torch

    if not tensor.is_meta:  # a quantized weight
        return tensor
    made = torch.empty_like(tensor, device="cuda")
    return made.normal_(0, 0.02) if made.is_floating_point() else made.zero_()


def _quantize(model: Any, names: set[str], spec: Resolved) -> None:
    """As weights.load does for a model on disk."""
    import bitsandbytes as bnb
    import torch

    library: Any = bnb.nn
    double = spec.double_quantization
    drawn = functools.cache(torch.randn)  # drawing 8 billion numbers takes minutes
    for name, module in list(model.named_modules()):
        if name not in names:
            continue
        sizes = (module.in_features, module.out_features, module.bias is not None)
        weight = drawn(module.weight.shape, dtype=module.weight.dtype)
        if spec.quantization == "nf4":
            new = library.Linear4bit(*sizes, weight.dtype, double, "nf4", device="meta")
            new.weight = library.Params4bit(weight, False, compress_statistics=double, quant_type="nf4", module=new)
        else:
            new = library.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
            new.weight = library.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.weight = new.weight.to("cuda")
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], new.requires_grad_(False))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = spec.quantization == "nf4", spec.quantization == "int8"
    torch.cuda.empty_cache()


def _predict(spec: Resolved) -> dict[str, Any]:
    report = exact(spec).to_dict()
    kept = ("peak_allocated_bytes", "peak_reserved_bytes", "process_bytes", "components")
    return {name: report[name] for name in kept}


def record_memory(out: Path, at_once: int = 1, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the grid and writes every row to `out`, measured and predicted. A row that fails says so, and the others go on.

    Each step is measured in a fresh process; rows that `out` has from this hardware are not measured again. Its seconds and
    what the whole process takes can be told only while the GPU has no other: with several `at_once`, of the first rows alone.
    """
    if hardware.here().device != "cuda":
        raise SpecError("bench memory measures a CUDA GPU, and this machine has none; run it on one that has")
    idle = _device_used()
    fresh = multiprocessing.get_context("forkserver")  # its children share the imports, and no CUDA context
    fresh.set_forkserver_preload(["torch", "transformers", "accelerate"])
    specs = [resolve(spec) for spec in grid()]
    rows: list[dict[str, Any]] = [{"spec": spec.to_dict()} for spec in specs]
    document = provenance() | {"kind": "memory", "rows": rows}
    known = _measured_before(out, document["hardware"])

    def run(i: int, alone: bool) -> None:
        row = rows[i]
        try:
            before = next((k["measured"] for k in known if k["spec"] == row["spec"]), None)
            row["measured"] = before or _alone(fresh, measure, specs[i])
            if not before:
                used = row["measured"].pop("device_used_bytes") - idle
                row["measured"] |= {"process_bytes": used} if alone else {"process_bytes": None, "step_seconds": None}
            row["predicted"] = predicted[i].result()
        except PeftlabError as error:
            row["error"] = str(error)
        say(_said(row))
        out.write_text(json.dumps(document, indent=1) + "\n")

    out.parent.mkdir(parents=True, exist_ok=True)
    first = len(specs) if at_once == 1 else ALONE
    with ProcessPoolExecutor(PREDICTING, fresh) as several, ThreadPoolExecutor(at_once) as pool:
        predicted = [several.submit(_predict, spec) for spec in specs]
        wait(predicted)  # or they would slow the steps
        for i in range(first):
            run(i, alone=True)
        list(pool.map(lambda i: run(i, alone=False), range(first, len(specs))))
    if all("error" in r for r in rows):
        raise RunError(f"no configuration could be measured; the first said: {rows[0]['error']}")
    return document


def _measured_before(out: Path, name: str) -> list[dict[str, Any]]:
    """Rows of an earlier run on this hardware."""
    if not out.exists():
        return []
    before = json.loads(out.read_text())
    return [row for row in before["rows"] if "measured" in row] if before["hardware"] == name else []


PREDICTING = 6
"""Processes that trace at once."""
ALONE = 4
"""Rows that have the GPU to themselves."""


def _alone(fresh: Any, work: Callable[[Resolved], dict[str, Any]], spec: Resolved) -> dict[str, Any]:
    """`work(spec)` in a process of its own. Raises RunError with its error, also when it dies."""
    ours, its = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_answer, args=(its, work, spec))
    process.start()
    its.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = "the process died"
    process.join()
    if isinstance(answer, str):
        raise RunError(answer)
    return answer


def _answer(connection: Any, work: Callable[[Resolved], dict[str, Any]], spec: Resolved) -> None:
    try:
        connection.send(work(spec))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no word'}")


def _device_used() -> int:
    """Bytes of the GPU that others have in use, asked for without a context of our own."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20


def _said(row: dict[str, Any]) -> str:
    name = f"{row['spec']['model']} {row['spec']['method']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    errors = (row["predicted"][k] / row["measured"][k] - 1 for k in ("peak_allocated_bytes", "peak_reserved_bytes"))
    return f"{name}: allocated {{:+.2%}}, reserved {{:+.2%}}".format(*errors)
