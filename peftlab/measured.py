"""Measurements: written with where they come from, and read back from assets/measured/."""

from __future__ import annotations

import json
import shlex
import sys
import time
from typing import TYPE_CHECKING

from . import hardware
from .places import ASSETS
from .spec import Json

if TYPE_CHECKING:
    from .data.tasks import Task

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


def reliability(task: Task) -> list[Json]:
    """The recordings of many seeds of a task's default run as it is now, a GPU's first."""
    found = []
    for one in documents("reliability"):
        usual = task.on_gpu if one["device"] == "cuda" and task.on_gpu else (task.steps, task.batch_size)
        if one["spec"]["task"] == task.key and (one["spec"]["steps"], one["spec"]["batch_size"]) == usual:
            found.append(one)
    return sorted(found, key=lambda one: one["device"] != "cuda")
