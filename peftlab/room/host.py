"""What a host may set, as environment variables: this is the one table of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..base.models import DEFAULT, MODELS
from ..errors import SpecError
from ..spec import closest

ALL = "all"
"""In place of keys: every model."""


def _folder(text: str) -> Path | None:
    """Raises ValueError for a `~` whose folder is not known."""
    try:
        return Path(text).expanduser() if text else None
    except RuntimeError:
        raise ValueError("this home folder is not known here; write the whole path, such as /srv/peftlab") from None


def _models(text: str) -> tuple[str, ...]:
    """Keys of the catalogue; none for all of it. Raises ValueError."""
    if text == ALL:
        return ()
    keys = tuple(key.strip() for key in text.split(",") if key.strip())
    if not keys:
        raise ValueError(f"it names no model; give keys by comma, such as {DEFAULT}, or {ALL}")
    for key in keys:
        if key not in MODELS:
            raise ValueError(f"no such model as {key}; {closest(key, MODELS)}")
    return keys


def _switch(text: str) -> bool:
    """Raises ValueError."""
    said = {"yes": True, "no": False, "1": True, "0": False, "true": True, "false": False}
    if text.lower() not in said:
        raise ValueError("neither yes nor no; write one of the two")
    return said[text.lower()]


def _form(text: str) -> str:
    """Raises ValueError."""
    if text not in ("text", "json"):
        raise ValueError("neither text nor json; write one of the two")
    return text


def _about(default: str, meaning: str, read: Callable[[str], Any] = str) -> dict[str, Any]:
    return {"default": default, "meaning": meaning, "read": read}


def _number(
    default: str, what: str, more: str = "", least: float = 1, most: float = math.inf, whole: bool = False
) -> dict[str, Any]:
    """A setting that is a number from `least` to `most`. `what` it is begins its meaning, and the words that refuse it."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most or (whole and not number.is_integer()):
            kind = "a whole number" if whole else "a number"
            limits = f"from {least:g} " + ("on" if most == math.inf else f"to {most:g}")
            raise ValueError(f"the {what} is {kind} {limits}; try {default}")
        return int(number) if whole else number

    return _about(default, what + more, read)


@dataclass(frozen=True)
class Host:
    """A host's settings. Each is read from `PEFTLAB_` and its name in capitals; what is empty is the default."""

    data: Path = field(
        metadata=_about("~/.local/share/peftlab", "folder of runs, adapters and keys, on a local disk", _folder)
    )
    copies: Path | None = field(
        metadata=_about("", "a second folder that finished runs are copied to, such as a mounted bucket", _folder)
    )
    models: tuple[str, ...] = field(metadata=_about(ALL, "keys of the models that may be trained, by comma", _models))
    train: bool = field(metadata=_about("yes", "no shows everything and trains nothing", _switch))
    key: str = field(
        metadata=_about(
            "",
            "whoever opens the page with ?key= and this word goes before those who wait, also when the queue is full; "
            "a run that is under way is not interrupted",
        )
    )
    tokens: int = field(
        metadata=_number(
            "20000000",
            "most tokens of a run",
            ": steps × batch × accumulation × length; the default run of the ticket task has 49,152 on a CPU and 245,760 "
            "on a GPU",
            whole=True,
        )
    )
    seconds: float = field(
        metadata=_number(
            "3600",
            "most seconds of a run's turn",
            ", from its start or its resume to its end; what it has learned by then is kept",
        )
    )
    queue: int = field(metadata=_number("200", "most runs that wait", whole=True))
    disk: float = field(
        metadata=_number(
            "10",
            "most GB that runs take on the disk",
            "; the oldest go first, each with its adapter and without a warning, so visitors should download theirs",
            least=0,
        )
    )
    days: float = field(
        metadata=_number("30", "most days that a run is kept", "; its adapter goes with it, without a warning", least=0)
    )
    memory: float = field(
        metadata=_number(
            "0.5",
            "largest share of memory that loaded models take",
            ": of the GPU's, or on a CPU of the machine's main memory; the model that was used last stays in any case",
            least=0,
            most=1,
        )
    )

    log: str = field(
        metadata=_about(
            "text", "form of the server's own warnings on stderr: text, or json with an object a line", _form
        )
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
                said = f"{variable(one.name)}={text}: {error}"
                raise SpecError(" ".join(said.split())) from None  # one line, also where the value has several
        return Host(**values)


def forgets() -> bool:
    """Whether runs are gone once this server sleeps or restarts: on a Space whose host has given no place for them."""
    given = any(os.environ.get(variable(name), "").strip() for name in ("data", "copies"))
    return bool(os.environ.get("SPACE_ID")) and not given


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
