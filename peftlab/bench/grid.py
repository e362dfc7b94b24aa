"""The steps that `bench memory` measures: architectures, methods, precisions, optimizers, each varied where it matters."""

from __future__ import annotations

from collections.abc import Iterator

from ..base import models
from ..measured import MEASURED
from ..spec import Json, RunSpec

CONFIGS = MEASURED / "configs"
"""Published config.json files of models that the catalogue does not have, by name."""
SMALL: Json = {"batch_size": 4, "sequence_length": 512, "precision": "bf16"}
LONG: Json = {"batch_size": 1, "sequence_length": 2048, "precision": "bf16"}
FAR: Json = {"batch_size": 1, "sequence_length": 8192, "precision": "bf16", "gradient_checkpointing": True}
GRAPH: Json = {"batch_size": 4, "sequence_length": 256, "precision": "bf16"}
"""A usual batch of the engine's own tasks."""


def grid() -> Iterator[RunSpec]:
    """Steps that are launched one operation after the other, as any trainer does it."""
    yield from _of_the_catalogue()
    yield from _of_other_families()


def _of_the_catalogue() -> Iterator[RunSpec]:
    every = """full head last-block ln lora dora lora-plus adalora vera ia3 oft prompt p-tuning prefix houlsby pfeiffer parallel
               io-adapter compacter"""
    yield from _by("qwen3-0.6b", every, SMALL)
    for model in ("smollm2-135m", "gemma-3-270m", "gpt2", "opt-350m", "llama-3.2-1b"):
        yield from _by(model, "full lora bitfit" if model in ("gpt2", "opt-350m") else "full lora ia3", SMALL)
        yield from _by(model, "last-block", SMALL)  # hardly any backward pass
        yield from _by(model, "lora", SMALL | {"precision": "fp32"})
        yield from _by(model, "lora", SMALL | {"gradient_checkpointing": True})
    yield from _by("smollm2-360m", "full lora houlsby", SMALL | {"precision": "amp"})
    short = {"batch_size": 1, "sequence_length": 128, "precision": "amp"}  # the optimizer's step is the peak
    yield from _by("llama-3.2-1b", "full", short)
    for optimizer in ("sgd", "sgd-momentum", "adafactor", "lion", "adamw-8bit", "paged-adamw-8bit"):
        yield from _by("smollm2-360m", "full", SMALL | {"optimizer": optimizer})
    yield from _by("smollm2-360m", "full", SMALL | {"optimizer_precision": "fp32"})
    settings: Json
    for settings in ({"dropout": 0.05}, {"layers": "last:4"}, {"adapter_precision": "bf16"}, {"hold_outputs": True},
                     {"accumulation": 4}, {"attention": "eager"}, {"precision": "fp16"}, {"optimizer": "adamw-8bit"},
                     {"target_modules": "query,value"}, {"batch_size": 3, "sequence_length": 700}):  # fmt: skip
        yield from _by("smollm2-360m", "lora", SMALL | settings)
    yield from _by("gemma-3-270m", "lora", LONG)
    yield from _by("gemma-3-270m", "full", LONG | {"gradient_checkpointing": True})
    yield from _by("olmoe-1b-7b", "lora ln", SMALL)
    yield from _by("olmoe-1b-7b", "lora", SMALL | {"target_modules": "q_proj,k_proj,v_proj,o_proj"})  # no experts
    wide = LONG | {"rank": 16}
    yield from _by("smollm2-1.7b", "qlora", wide | {"gradient_checkpointing": True})
    yield from _by("smollm2-1.7b", "qlora", wide | {"double_quantization": False})
    yield from _by("smollm2-1.7b", "lora", wide | {"quantization": "int8"})
    yield from _by("llama-3.1-8b", "lora qlora", wide | {"sequence_length": 1024})
    yield from _by("llama-3.1-8b", "qlora", wide | {"gradient_checkpointing": True})


def _of_other_families() -> Iterator[RunSpec]:
    """Attention without a fused kernel, state spaces, mixtures with adapted experts, alibi, partial rotary, long texts."""
    yield from _by("bloom-560m", "full lora", SMALL)
    yield from _by("bloom-560m", "lora", SMALL | {"accumulation": 4, "batch_size": 2})
    yield from _by("pythia-410m", "full last-block lora bitfit", SMALL)
    yield from _by("pythia-410m", "lora", SMALL | {"precision": "fp16"})
    yield from _by("gpt-neo-125m", "full lora", SMALL)
    yield from _by("codegen-350m", "lora", SMALL | {"precision": "fp16"})
    yield from _by("xglm-564m", "lora", SMALL)
    yield from _by("qwen2.5-0.5b", "full lora", SMALL | {"accumulation": 2})
    yield from _by("olmo-2-1b", "lora dora", SMALL)
    yield from _by("phi-1.5", "full lora", SMALL)
    yield from _by("stablelm-2-1.6b", "lora", SMALL)
    yield from _by("falcon-rw-1b", "lora", SMALL)
    yield from _by("starcoderbase-1b", "lora", SMALL)
    yield from _by("gemma-2-2b", "lora qlora", LONG | {"sequence_length": 1024})
    yield from _by("granite-3.1-2b", "qlora", SMALL)
    yield from _by("starcoder2-3b", "lora", LONG)
    yield from _by("smollm3-3b", "lora", FAR)
    yield from _by("llama-3.2-1b", "lora", FAR)
    yield from _by("qwen2.5-0.5b", "full", FAR)
    yield from _by("lfm2-1.2b", "full lora", SMALL)
    yield from _by("falcon-h1-0.5b", "lora", LONG | {"sequence_length": 512})
    yield from _by("jamba-small", "lora", LONG | {"sequence_length": 256})
    yield from _by("granite-4.0-h-tiny", "lora qlora", LONG | {"sequence_length": 512})
    yield from _by("qwen1.5-moe-a2.7b", "lora", LONG | {"sequence_length": 512})
    yield from _by("deepseek-v2-lite", "lora", LONG | {"sequence_length": 512})
    yield from _by("gpt-oss-20b", "lora", LONG | {"sequence_length": 512})


def graph_grid() -> Iterator[RunSpec]:
    """Steps of the engine's own gear, replayed as one CUDA graph with its operations fused."""
    yield from _by("smollm2-135m", "full lora ia3 houlsby", GRAPH)
    yield from _by("qwen3-0.6b", "full lora dora", GRAPH)
    yield from _by("qwen3-0.6b", "lora", SMALL)
    yield from _by("gemma-3-270m", "full lora", GRAPH)
    yield from _by("gpt2", "full lora", GRAPH)
    yield from _by("opt-350m", "lora", GRAPH)
    yield from _by("llama-3.2-1b", "lora", GRAPH)
    yield from _by("llama-3.2-1b", "lora", LONG | {"gradient_checkpointing": True})
    yield from _by("smollm2-1.7b", "lora", GRAPH | {"batch_size": 8})
    yield from _by("llama-3.1-8b", "qlora", GRAPH)
    for model in ("qwen2.5-0.5b", "pythia-410m", "olmo-2-1b", "phi-1.5", "granite-3.1-2b", "starcoder2-3b"):
        yield from _by(model, "lora", GRAPH)


def _by(model: str, methods: str, settings: Json) -> Iterator[RunSpec]:
    file = CONFIGS / f"{model}.json"
    key = models.from_config(file.read_text(encoding="utf-8")).key if file.exists() else model
    for method in methods.split():
        yield RunSpec(model=key, method=method, **settings)
