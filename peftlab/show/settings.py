"""A run in words: the names of its settings, method and GPU, which settings were changed, and what it then uses."""

from collections.abc import Mapping
from functools import lru_cache

from .. import hardware
from ..base.models import DEFAULT, MODELS, find
from ..catalog.gpus import GPU
from ..count import ParameterReport
from ..errors import SpecError
from ..memory import MemoryReport
from ..resolve import resolve, resolve_here
from ..spec import Resolved, RunSpec
from .marks import bold


def label(setting: str) -> str:
    """A setting's name as a control shows it: `n_gpus` is N GPUs."""
    return setting.replace("_", " ").capitalize().replace("gpu", "GPU").replace("Gpu", "GPU")


def short(value: object) -> str:
    """A setting's value without needless digits: 0.0020 is 0.002."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def method_name(report: MemoryReport | ParameterReport) -> str:
    """A method with the size that it was given: `LoRA, rank 8`. A bare count has no layers, so the size is left out."""
    spec = report.spec
    sizes = {
        "rank {}": spec.rank,
        "width {}": spec.bottleneck,
        "blocks of {}": spec.block_size,
        "{} virtual tokens": spec.virtual_tokens,
    }
    layered = find(spec.model).config is not None
    return ", ".join([report.method_name, *(text.format(size) for text, size in sizes.items() if size and layered)])


def gpu_name(gpu: GPU) -> str:
    """A GPU without its vendor and socket: V100 16 GB, RTX 4090."""
    return " ".join(w for w in gpu.name.split() if w not in ("NVIDIA", "GeForce") and not w.startswith("SXM"))


def changed(spec: RunSpec) -> str:
    """The settings that differ from automatic ones, as a sentence; empty where a name of `spec` is not known."""
    try:
        usual = _usual(spec.model, spec.method, spec.task)
    except SpecError:
        return ""
    named = [
        f"{label(name)} {bold(short(value))}"
        for name, value in spec.to_dict().items()
        if name not in ("model", "method", "task") and value != getattr(usual, name)
    ]
    return "Changed: " + ", ".join(named) if named else "Every setting is automatic."


@lru_cache(maxsize=256)
def _usual(model: str | None, method: str | None, task: str | None) -> Resolved:
    return resolve(RunSpec(model=model, method=method, task=task))


def aside_said(spec: RunSpec, reasons: Mapping[str, str]) -> str:
    """Which settings of `spec` a run here leaves aside, and why, as a sentence; empty where there are none."""
    said = []
    for name, why in reasons.items():
        value = find(spec.model or DEFAULT).name if name == "model" else f"{label(name)} {short(getattr(spec, name))}"
        said.append(f"{bold(value)} ({why.partition('; ')[0]})")
    return f"Set aside here: {', '.join(said)}. " if said else ""


def settings_line(spec: RunSpec) -> str:
    """What a run with these settings uses on this machine, automatic values included."""
    r = resolve_here(spec)
    sizes = {n: getattr(r, n) for n in ("rank", "alpha", "virtual_tokens", "bottleneck", "block_size")}
    parts = [
        f"learning rate {r.learning_rate:g}",
        f"{r.steps} steps of {r.batch_size} examples",
        *(f"{label(name).lower()} {short(size)}" for name, size in sizes.items() if size),
        *([f"a base in {r.quantization}"] if r.quantization != "none" else []),
        f"{r.precision} on {hardware.here().device.upper()}",
    ]
    return f"Runs with {', '.join(parts)}.{terms(r.model)} {changed(spec)}"


def terms(model: str) -> str:
    """A model's licence, as a sentence after others; empty for one that is not in the catalogue."""
    return f" {MODELS[model].name} is under: {MODELS[model].licence}." if model in MODELS else ""
