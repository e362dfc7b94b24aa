"""From a spec with automatic fields to the one that is shown, predicted, run, linked and exported."""

import math
from collections.abc import Collection

from . import hardware, methods
from .base import architecture as architectures
from .base import models
from .catalog import Preset, entry_of
from .catalog.gpus import GPUS
from .data import tasks
from .methods.selection import USUAL_RANK
from .spec import SETTINGS, Json, Resolved, RunSpec

METHOD_SETTINGS = tuple(name for name in SETTINGS if any(name in m.settings for m in methods.METHODS.values()))
"""Settings that only some methods read."""


def resolve(spec: RunSpec, machine: hardware.Machine | None = None) -> Resolved:
    """`spec` filled for a run on `machine`, or on this one; a Resolved one as it is. Raises SpecError for unknown names."""
    if isinstance(spec, Resolved) and machine is None:
        return spec
    machine = machine or hardware.here()
    model = models.find(spec.model or models.DEFAULT)
    method = methods.find(spec.method or "lora")
    task = tasks.find(spec.task or tasks.DEFAULT)
    gpu = spec.gpu or machine.gpu
    if gpu:
        entry_of("gpu", gpu, GPUS)
    on_gpu = gpu is not None or machine.device == "cuda"
    whole = (spec.quantization or method.defaults.get("quantization", "none")) == "none"
    precision = "bf16" if on_gpu or (machine.bf16 and whole) else "fp32"
    if method.in_place:  # bf16 weights lose small updates to rounding: assets/measured/precision-full-*-h100.json
        precision = "amp" if on_gpu else "fp32"
    rank = spec.rank or method.defaults.get("rank", USUAL_RANK)
    automatic: Json = {
        "model": model.key, "method": method.key, "task": task.key, "steps": task.steps, "seed": 0,
        "rank": rank, "alpha": 2.0 * rank, "dropout": 0.0, "target_modules": "all-linear", "layers": "all",
        "virtual_tokens": 20, "bottleneck": 16, "block_size": 16, "lr_ratio": 16.0, "train_norms": False,
        "precision": precision, "adapter_precision": "fp32",
        "quantization": "none", "double_quantization": True, "optimizer": "adamw", "optimizer_precision": "parameters",
        "batch_size": task.batch_size, "accumulation": 1, "sequence_length": task.sequence_length,
        "gradient_checkpointing": False, "attention": _attention_of(model), "hold_outputs": False,
        "gpu": gpu, "n_gpus": 1, "sharding": "none", "offload": "none",
    }  # fmt: skip
    automatic |= {**method.defaults, "rank": rank}
    automatic = {name: value(automatic) if callable(value) else value for name, value in automatic.items()}
    given = spec.to_dict() | {"model": model.key}
    filled: Json = {name: given.get(name, automatic.get(name)) for name in SETTINGS}
    unread = {name for name in METHOD_SETTINGS if name not in method.settings}
    unread |= {"double_quantization"} if filled["quantization"] != "nf4" else set()
    unread |= {name for name in ("gpu", "training_rows") if not filled[name]}
    return Resolved(**filled | {name: SETTINGS[name].type() for name in unread}, unread=frozenset(unread))


def _attention_of(model: models.BaseModel) -> str:
    """The attention that the model's family supports; sdpa for a bare count, whose family is not known."""
    return architectures.of(model.key).facts.attention if model.config is not None else "sdpa"


def resolve_here(spec: RunSpec) -> Resolved:
    """`spec` resolved for a run on this machine, whatever GPU the calculator compared it with."""
    return resolve(as_here(spec.but(gpu=None)))


def as_here(spec: RunSpec) -> RunSpec:
    """`spec` with the task's steps and batch size for a GPU, where one is here and the spec says neither."""
    recipe = tasks.find(spec.task or tasks.DEFAULT).on_gpu
    if recipe is None or spec.steps or spec.batch_size or hardware.here().device != "cuda":
        return spec
    return spec.but(**recipe._asdict())


def cannot_run(spec: Resolved, offered: Collection[str] | None = None) -> dict[str, str]:
    """Which settings a run on this machine cannot have, each with the reason and the fix; none where it can have all.

    `offered` are the models that may be trained while people watch; None allows every model.
    """
    only = {"sharding": "none", "offload": "none", "n_gpus": 1}
    found = {n: f"training runs with {v} only; set it to {v}" for n, v in only.items() if getattr(spec, n) != v}
    if spec.precision == "amp" and hardware.here().device == "cpu":
        found["precision"] = "mixed precision needs a CUDA GPU; use fp32 or bf16 here"
    if spec.attention == "sdpa" and _attention_of(models.find(spec.model)) == "eager":
        found["attention"] = "this model's family has no sdpa in transformers; set it to eager"
    if offered is not None and spec.model not in offered:
        instead = models.DEFAULT if models.DEFAULT in offered else next(iter(offered))
        found["model"] = f"it is not trained while people watch; {models.find(instead).name} runs in its place"
    return found


def set_aside(spec: RunSpec, offered: Collection[str] | None = None) -> tuple[RunSpec, dict[str, str]]:
    """`spec` without the settings that `cannot_run` names, which become automatic, and the reasons."""
    reasons = cannot_run(resolve_here(spec), offered)
    return spec.but(**dict.fromkeys(reasons)), reasons


def resolve_again(spec: RunSpec, machine: hardware.Machine | None = None) -> Resolved:
    """The spec of an earlier run for this machine, in the run's precision where that is fast here, to answer as it did then."""
    machine = machine or hardware.here()
    whole = (spec.quantization or "none") == "none"
    here = (
        machine.device == "cuda"
        or spec.precision == "fp32"
        or (spec.gpu is None and spec.precision != "amp")  # the run was on a CPU itself
        or (spec.precision == "bf16" and machine.bf16 and whole)
    )
    return resolve(spec.but(gpu=None) if here else spec.but(gpu=None, precision=None), machine)


def with_preset(spec: RunSpec, preset: Preset) -> RunSpec:
    """`spec` with a preset's settings in place of its own. If the method changes, the old one's settings are dropped."""
    if preset.settings.get("method", spec.method) != spec.method:
        spec = spec.but(**dict.fromkeys((*METHOD_SETTINGS, "quantization")))
    spec = spec.but(**preset.settings)
    if preset.alpha_over_rank:
        spec = spec.but(alpha=preset.alpha_over_rank * resolve(spec).rank)
    if preset.epochs:
        rows = spec.training_rows or len(tasks.find(spec.task or tasks.DEFAULT).train)
        spec = spec.but(steps=math.ceil(preset.epochs * rows / (spec.batch_size or 1)))
    return spec
