"""The adapters a visitor can choose from: bundled with the app, or trained here by themselves."""

from __future__ import annotations

import re

import gradio as gr

from peftlab import adapters, jobs, tasks
from peftlab.adapters import Adapter


def bundled() -> dict[str, Adapter]:
    return {a.name: a for a in adapters.bundled()}


def of(key: str) -> Adapter:
    """A bundled adapter by name, or one just trained by its run's id; nothing else on the disk can be named."""
    if key in bundled():
        return bundled()[key]
    folder = jobs.RUNS / key / "adapter"
    if not re.fullmatch(r"[\w-]+", key) or not folder.exists():
        raise gr.Error(f"The adapter {key} is not here any more; choose another one")
    return adapters.read(folder)


def choices(mine: list[str]) -> list[tuple[str, str]]:
    """Own adapters first, the newest at the top, then the bundled ones."""
    own = [i for i in reversed(mine) if re.fullmatch(r"[\w-]+", i) and (jobs.RUNS / i / "adapter").exists()]
    return [(f"yours: {_label(of(i))}", i) for i in own] + [(f"bundled: {_label(a)}", k) for k, a in bundled().items()]


def _label(adapter: Adapter) -> str:
    rank = f" rank {adapter.spec.rank}" if adapter.spec.rank else ""
    return f"{task_of(adapter).name}, {adapter.spec.method}{rank}, {adapter.saved[:16].replace('T', ' ')} UTC"


def task_of(adapter: Adapter) -> tasks.Task:
    return tasks.find(adapter.spec.task or tasks.DEFAULT)
