"""The adapter store: what a run learned, kept on disk as safetensors with a manifest, and put back onto a base model."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from . import methods, seam
from .base import architecture as architectures
from .base import models, weights
from .errors import AdapterError, PeftlabError, SpecError
from .methods import loading, through_peft
from .places import ASSETS
from .resolve import resolve
from .spec import Json, Resolved, RunSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module
    from transformers import PreTrainedModel

BUNDLED = ASSETS / "adapters"
MANIFEST = "peftlab.json"
VERSION = 1
"""Of the manifest. One without a version is of before versions were written: it has the same parts."""
TENSORS, CONFIG = loading.TENSORS, loading.CONFIG
"""peft's names. Without a CONFIG, the manifest's spec says how to attach the model's own parameters, by name."""


@dataclass(frozen=True)
class Adapter:
    """A saved adapter. `spec` is the resolved spec of its run, or just the model for one that peft saved elsewhere."""

    folder: Path
    spec: RunSpec
    result: Json  # the last event of its run, without its place on that machine; empty when unknown
    saved: str = ""  # the time when it was saved, in UTC; empty when unknown

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        """The name to show: that of its run, since every run calls the folder `adapter`. A long id has its last six digits."""
        name = self.folder.parent.name if self.name == "adapter" else self.name
        return re.sub("-[0-9a-f]{26}(?=[0-9a-f]{6}$)", "-", name)


def save(model: Module, spec: RunSpec, folder: Path, result: Json | None = None) -> Path:
    """Writes what was trained, in peft's own format where peft attached it.

    It is written beside `folder`; then the last good adapter is moved aside, and removed only once the new one is in its
    place. Whenever the process ends, `read` finds one of the two whole, because it looks aside too. Where it cannot be
    written, as on a full disk, nothing of it is left.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(model, spec, part, result or {})
    except Exception:
        shutil.rmtree(part, ignore_errors=True)
        raise
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)  # left by a save that ended early
        folder.rename(aside)
    try:
        part.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write(model: Module, spec: RunSpec, part: Path, result: Json) -> None:
    """Writes the tensors and the manifest into a new folder."""
    from safetensors.torch import save_file

    part.mkdir(parents=True)
    if hasattr(model, "peft_config"):
        # without this argument peft asks the Hub about the base each time
        cast("PeftModel", model).save_pretrained(str(part), save_embedding_layers=False)
        (part / "README.md").unlink(missing_ok=True)
    else:
        trained = {n: p.detach().contiguous().cpu() for n, p in model.named_parameters() if p.requires_grad}
        save_file(trained, part / TENSORS)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = {"version": VERSION, "spec": spec.to_dict(), "result": result, "saved": now}
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _aside(folder: Path) -> Path:
    """The place of an adapter while a new one takes its own."""
    return folder.with_name(folder.name + ".old")


def read(folder: Path | str) -> Adapter:
    """The manifest of an adapter folder, ours or peft's. Raises AdapterError that says what is missing."""
    folder = Path(folder)
    if not folder.exists() and _aside(folder).exists():  # a save ended between its two moves
        folder = _aside(folder)
    try:
        if (folder / MANIFEST).exists():
            found = json.loads((folder / MANIFEST).read_text())
            if found.get("version", VERSION) > VERSION:
                said = f"{folder}: a manifest of version {found['version']}, and this peftlab reads up to {VERSION}"
                raise AdapterError(f"{said}; install a newer peftlab")
            return Adapter(folder, RunSpec.from_dict(found["spec"]), found["result"], found.get("saved", ""))
        if (folder / CONFIG).exists():
            base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
            if not base:
                raise ValueError(f"{CONFIG} names no base model")
            return Adapter(folder, RunSpec(model=models.find(base).key), {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{folder}: its manifest cannot be read ({error}); save the adapter again") from None
    raise AdapterError(
        f"{folder}: no adapter there (neither {MANIFEST} nor {CONFIG}); give the folder that training printed"
    )


def apply(base: weights.Base, adapter: Adapter) -> PreTrainedModel:
    """A private copy of the base with the adapter on it, fused as in training. Raises AdapterError where it does not fit."""
    import torch

    from . import fused

    model = _applied(base, adapter)
    with _in_words(base, adapter), torch.no_grad():  # some settings are read for the first time where a text is
        seam.logits(model, input_ids=torch.arange(6, device=next(model.parameters()).device)[None])
    fused.quicken(model)
    return model


@contextmanager
def _in_words(base: weights.Base, adapter: Adapter) -> Iterator[None]:
    """Turns what peft raises over anybody's settings and tensors into an AdapterError of one line."""
    try:
        yield
    except PeftlabError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:240]
        what = f"{adapter.folder}: does not fit {base.entry.name} ({reason})"
        raise AdapterError(f"{what}; choose its own base") from None


def _applied(base: weights.Base, adapter: Adapter) -> PreTrainedModel:
    """The adapter on a private copy of the base, with peft's own operations. A PeftModel passes on what it lacks."""
    copy, file = weights.share(base.model), adapter.folder / TENSORS
    with _in_words(base, adapter):
        if not file.exists():  # then peft would read a pickle, or ask the Hub
            raise ValueError(f"it has no {TENSORS}{_pickled(adapter.folder)}")
        if adapter.spec.model != base.entry.key:  # another base of the same shapes would take it without a word
            raise ValueError(f"its base is {adapter.spec.model}")
        _check_finite(adapter)
        by_peft = (adapter.folder / CONFIG).exists()
        model = loading.load(copy, adapter.folder) if by_peft else _attached(copy, resolve(adapter.spec), file)
    return cast("PreTrainedModel", model.requires_grad_(False).eval())


def _pickled(folder: Path) -> str:
    """What to do about an adapter that is only there as a pickle."""
    found = next((file.name for file in folder.glob("*.bin")), None)
    return (
        f" but {found}, a pickle, which could run any code; save it as safetensors with peft's save_pretrained"
        if found
        else ""
    )


def _check_finite(adapter: Adapter) -> None:
    """Raises AdapterError for numbers that are none, and names a tensor that has them."""
    from safetensors.torch import load_file

    tensors = load_file(adapter.folder / TENSORS)
    odd = {name: n for name, t in tensors.items() if (n := int((~t.float().isfinite()).sum()))}
    if odd:
        name, total = next(iter(odd)), sum(t.numel() for t in tensors.values())
        raise AdapterError(
            f"{adapter.folder}: {name} has {odd[name]:,} numbers that are not finite ({sum(odd.values()):,} of its own "
            f"{total:,} numbers are not, in {len(odd)} of {len(tensors)} tensors); train again at a lower learning rate"
        )


def set_aside(adapter: Adapter) -> str:
    """What the installed peft does not know of an adapter's settings, and leaves out because it is off; empty where nothing."""
    if not (adapter.folder / CONFIG).exists() or not (odd := loading.unknown(adapter.folder)):
        return ""
    return (
        f"{adapter.label}: {CONFIG} has {', '.join(odd)}, which the installed peft does not know; off, and so left out"
    )


def _attached(base: PreTrainedModel, spec: Resolved, file: Path) -> Module:
    """The spec's method on `base`, with the file's numbers in it. Raises ValueError where the tensors do not fit."""
    import torch
    from safetensors.torch import load_file

    targets = methods.targets(architectures.of(spec.model), spec)
    model = methods.find(spec.method).attach(base, targets, spec)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = load_file(file)
    through_peft.check_names(saved, trained)
    with torch.no_grad():
        for name, tensor in saved.items():
            if trained[name].shape != tensor.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, the model's is {tuple(trained[name].shape)}")
            trained[name].copy_(tensor)
    return model


def merge(base: weights.Base, adapter: Adapter) -> PreTrainedModel:
    """A model of the base's own modules with the adapter in its weights; the base stays as it was.

    Raises SpecError for a method that cannot be merged and for a quantized base, AdapterError where the adapter does not
    fit or where a merged weight would not be finite.
    """
    from safetensors.torch import load_file

    from . import fused

    key = adapter.spec.method or ""
    work = methods.METHODS[key].merge if key in methods.METHODS else through_peft.merge
    if not work:
        raise SpecError(f"method={key}: it cannot be merged. {methods.METHODS[key].about.merging}")
    if getattr(base.model, "is_quantized", False):
        raise SpecError(
            "merging into a quantized base would round the sum to few bits and lose the update; "
            "load the base with quantization none"
        )
    try:
        merged = work(_applied(base, adapter))
        finite = all(p.isfinite().all() for p in merged.parameters())
    except ValueError as error:  # raised by peft, which checks the sum where it adds to a weight
        if "NaNs detected" not in str(error):
            raise
        finite = False
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise AdapterError(f"{adapter.folder}: it cannot be merged ({reason}); use it as it is") from None
    if not finite:
        total = sum(t.numel() for t in load_file(adapter.folder / TENSORS).values())
        raise AdapterError(
            f"{adapter.folder}: merged, it gives weights that are not finite (0 of its own {total:,} numbers are not, but "
            "they are too large); train again at a lower learning rate"
        )
    fused.adjoin(merged)
    return cast("PreTrainedModel", merged.requires_grad_(False).eval())


def bundled() -> list[Adapter]:
    """The adapters in the repository, except full fine-tunes, whose tensors are too large to keep there."""
    return [read(f.parent) for f in sorted(BUNDLED.glob(f"*/{TENSORS}"))]


def pack(folder: Path) -> Path:
    """A zip of the adapter, beside its folder, to download. It is made anew where the adapter is newer."""
    packed = folder.with_name(folder.name + ".zip")
    if not packed.exists() or packed.stat().st_mtime < folder.stat().st_mtime:
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:  # so that nobody reads a half of it
            Path(shutil.make_archive(f"{beside}/{folder.name}", "zip", folder)).replace(packed)
    return packed
