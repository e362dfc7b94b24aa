"""Measurements: written with where they come from, and read back from assets/measured/."""

from __future__ import annotations

import json
import shlex
import sys
import time

from . import hardware
from .places import ASSETS
from .spec import Json

MEASURED = ASSETS / "measured"


def provenance() -> Json:
    """The command, hardware, library versions and date, with which every recording begins."""
    machine = hardware.here()
    return {
        "command": "python -m peftlab " + shlex.join(sys.argv[1:]),
        "hardware": machine.name,
        "device": machine.device,
        "versions": hardware.versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def documents(kind: str) -> list[Json]:
    """The recordings `KIND-*.json`, each with the name of its `file`, in the order of the names."""
    files = sorted(MEASURED.glob(f"{kind}-*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) | {"file": file.name} for file in files]


def runs() -> list[Json]:
    """Every recorded training run, the fastest first."""
    return sorted(documents("train"), key=lambda run: run["events"][-1]["seconds"])
