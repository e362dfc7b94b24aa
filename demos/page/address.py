"""What a link may say, and what the page opens with."""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl

from peftlab import RunSpec, SpecError
from peftlab.base.models import MODELS
from peftlab.data import tasks
from peftlab.spec import closest

MODEL, METHOD = "llama-3.1-8b", "lora"
OPENING = RunSpec(model=MODEL, method=METHOD)  # what the page opens with: a model so large that the difference matters
NAMED = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}|\d{1,20}(\.\d{1,20})?\s?[KMBTkmbt]|config:[A-Za-z0-9_-]{1,8192}")
"""What a visitor may name besides the catalogue: a Hub id, a count, or a config that the link itself carries."""


VERSION = 1
"""Of what an address means. One that says nothing of it, as a parameter `v`, is of this first version."""


def check_version(said: str) -> None:
    """Raises SpecError for the address of a later version, whose settings may mean something else here."""
    if said != str(VERSION):
        shown = said if said.isdecimal() else repr(said)
        raise SpecError(
            f"v={shown[:20]}: this link is of another version of peftlab, and this one reads version {VERSION}; "
            "look at each setting before you rely on what it shows"
        )


def link(spec: RunSpec, **choices: str) -> dict[str, str]:
    """A run's settings as the address says them: nothing for those that the page opens with."""
    usual = dict(parse_qsl(OPENING.to_query()))
    return {n: v for n, v in parse_qsl(spec.to_query()) if usual.get(n) != v} | choices


def public(values: Mapping[str, object]) -> RunSpec:
    """A spec from a visitor's settings. Raises SpecError; files of this machine are for its own command line."""
    model, task = (str(values.get(name) or "") for name in ("model", "task"))
    if model and model not in MODELS and (not NAMED.fullmatch(model) or ("/" in model and Path(model).exists())):
        known = closest(model, MODELS)
        raise SpecError(f"model={model}: no such model; {known} A Hub id or a count such as 7B works too")
    if task and task not in tasks.TASKS:
        raise SpecError(f"task={task}: no such task; {closest(task, tasks.TASKS)}")
    return RunSpec.from_dict(values)
