"""What a host may set, as environment variables: this is the one table of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..base.models import MODELS
from ..errors import SpecError
from ..spec import closest


def _folder(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


def _models(text: str) -> tuple[str, ...]:
    """Keys of the catalogue. Raises ValueError."""
    keys = tuple(key.strip() for key in text.split(",") if key.strip())
    for key in keys:
        if key not in MODELS:
            raise ValueError(f"no such model as {key}; {closest(key, MODELS)}")
    return keys


def _switch(text: str) -> bool:
    """Raises ValueError."""
    said = {"yes": True, "no": False, "1": True, "0": False, "true": True, "false": False}
    if text.lower() not in said:
        raise ValueError("neither yes nor no")
    return said[text.lower()]


def _above(least: float, whole: bool = True) -> Callable[[str], float]:
    """Reads a number of at least `least`. Raises ValueError."""

    def read(text: str) -> float:
        number = (int if whole else float)(text)
        if not number >= least:
            raise ValueError(f"less than {least:g}")
        return number

    return read


def _about(default: str, meaning: str, read: Callable[[str], Any] = str) -> dict[str, Any]:
    return {"default": default, "meaning": meaning, "read": read}


@dataclass(frozen=True)
class Host:
    """A host's settings. Each is read from `PEFTLAB_` and its name in capitals; what is empty is the default."""

    data: Path = field(
        metadata=_about("~/.local/share/peftlab", "folder of runs, adapters and keys, on a local disk", _folder)
    )
    copies: Path | None = field(
        metadata=_about("", "a second folder that finished runs are copied to, such as a mounted bucket", _folder)
    )
    models: tuple[str, ...] = field(
        metadata=_about("", "keys of the models that may be trained, by comma; empty for all", _models)
    )
    train: bool = field(metadata=_about("yes", "no shows everything and trains nothing", _switch))
    key: str = field(metadata=_about("", "whoever opens the page with ?key= and this word goes first"))
    tokens: int = field(
        metadata=_about("20000000", "most tokens of a run: steps × batch × accumulation × length", _above(1))
    )
    seconds: float = field(
        metadata=_about("3600", "longest that a run may take; it ends with what it has learned", _above(1, whole=False))
    )
    queue: int = field(metadata=_about("200", "most runs that wait", _above(1)))
    disk: float = field(metadata=_about("10", "GB that runs may take; the oldest go first", _above(0, whole=False)))
    days: float = field(metadata=_about("30", "days after which a run is removed", _above(0, whole=False)))
    memory: float = field(
        metadata=_about("0.5", "share of the memory that models may stay loaded in", _above(0, whole=False))
    )

    @staticmethod
    def read(environment: Mapping[str, str]) -> Host:
        """Raises SpecError for a value that its setting cannot have."""
        values = {}
        for one in fields(Host):
            text = environment.get(variable(one.name), "").strip() or one.metadata["default"]
            try:
                values[one.name] = one.metadata["read"](text)
            except ValueError as error:
                raise SpecError(f"{variable(one.name)}={text}: {error}; it is {one.metadata['meaning']}") from None
        return Host(**values)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"PEFTLAB_{name.upper()}"


def table() -> list[tuple[str, str, str]]:
    """Variable, default and meaning of each setting."""
    return [(variable(one.name), one.metadata["default"] or "none", one.metadata["meaning"]) for one in fields(Host)]


@lru_cache(maxsize=1)
def settings() -> Host:
    """This host's. Raises SpecError."""
    return Host.read(os.environ)
