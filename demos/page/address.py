"""What a link may say, and what the page opens with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from demos.page.tab import Asked, Tab
from peftlab import RunSpec, SpecError
from peftlab.base.models import MODELS
from peftlab.data import tasks
from peftlab.spec import closest

OPENING = RunSpec(model="llama-3.1-8b", method="lora")
"""What the page opens with: large enough that the difference matters."""
NAMED = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}|\d{1,20}(\.\d{1,20})?\s?[KMBTkmbt]|config:[A-Za-z0-9_-]{1,8192}")
"""What a visitor may name besides the catalogue: a Hub id, a count, or a config that the link itself carries."""


def opening(tab: Tab) -> Asked:
    """What a plain visit asks of `tab`, or of a store."""
    return Asked(OPENING, {name: one.usual for name, one in tab.choices.items()}, {})


def link(spec: RunSpec, **choices: str) -> dict[str, str]:
    """A run's settings as the address says them: nothing for those that the page opens with."""
    usual = dict(parse_qsl(OPENING.to_query()))
    return {n: v for n, v in parse_qsl(spec.to_query()) if usual.get(n) != v} | choices


def public(values: Mapping[str, Any]) -> RunSpec:
    """A spec from a visitor's settings. Raises SpecError; files of this machine are for its own command line."""
    model, task = str(values.get("model") or ""), values.get("task") or tasks.DEFAULT
    if model and model not in MODELS and (not NAMED.fullmatch(model) or ("/" in model and Path(model).exists())):
        raise SpecError(
            f"model={model}: no such model; {closest(model, MODELS)} A Hub id or a count such as 7B works too"
        )
    if task not in tasks.TASKS:
        raise SpecError(f"task={task}: no such task; {closest(task, tasks.TASKS)}")
    return RunSpec.from_dict(values)
