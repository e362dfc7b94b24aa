"""The adapters a visitor can choose from: bundled with the app, or trained here by themselves."""

import re
from functools import lru_cache

import gradio as gr

from demos.page.controls import Update
from demos.page.tab import Asked
from peftlab import PeftlabError, adapters
from peftlab.adapters import Adapter
from peftlab.data import tasks
from peftlab.room import jobs


@lru_cache(maxsize=1)
def bundled() -> dict[str, Adapter]:
    return {a.name: a for a in adapters.bundled()}


def of(key: object) -> Adapter:
    """A bundled adapter by name, or one trained here by its run's id. Raises PeftlabError for any other key."""
    if isinstance(key, str) and key in bundled():
        return bundled()[key]
    if not _is_here(key):
        raise PeftlabError(f"The adapter {str(key)[:60]} is not here any more; choose another one")
    return adapters.read(jobs.RUNS / str(key) / "adapter")


def chooser(value: str | None, label: str = "Adapter") -> gr.Dropdown:
    """A control that offers adapters, as `offered` says."""
    return gr.Dropdown(choices([]), value=value, label=label, info="Trained here, or bundled with the app")


def offered(asked: Asked, chosen: str | None) -> Update:
    """What a chooser shows to a visitor."""
    return gr.update(choices=choices(asked.kept.get("adapters")), value=chosen)


def choices(mine: object) -> list[tuple[str, str | int | float]]:
    """Names and keys: the visitor's own, `Asked.kept["adapters"]`, the newest first; then the bundled ones."""
    own = [key for key in reversed(mine if isinstance(mine, list) else []) if _is_here(key)]
    named: list[tuple[str, str | int | float]] = []
    for whose, key in [*(("yours", key) for key in own), *(("bundled", key) for key in bundled())]:
        adapter = of(key)
        rank = f" rank {adapter.spec.rank}" if adapter.spec.rank else ""
        when = adapter.saved[:16].replace("T", " ")
        named.append((f"{whose}: {task_of(adapter).name}, {adapter.spec.method}{rank}, {when} UTC", key))
    return named


def _is_here(key: object) -> bool:
    return isinstance(key, str) and bool(re.fullmatch(r"[\w-]+", key)) and (jobs.RUNS / key / "adapter").exists()


def task_of(adapter: Adapter) -> tasks.Task:
    return tasks.find(adapter.spec.task or tasks.DEFAULT)
