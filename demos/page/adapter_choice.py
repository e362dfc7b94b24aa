"""The adapters a visitor can choose from: bundled with the app, or trained here by themselves."""

from contextlib import suppress
from functools import lru_cache

import gradio as gr

from demos.page.controls import Update
from demos.page.tab import Asked
from peftlab import PeftlabError, adapters
from peftlab.adapters import Adapter
from peftlab.data import tasks
from peftlab.room import rooms

INFO = "Trained here, or bundled with the app"


@lru_cache(maxsize=1)
def bundled() -> dict[str, Adapter]:
    return {a.name: a for a in adapters.bundled()}


def of(asked: Asked, key: object) -> Adapter:
    """A bundled adapter by name, or one of the visitor's own by its run's id. Raises PeftlabError for any other key."""
    if isinstance(key, str) and key in bundled():
        return bundled()[key]
    job = rooms.here().find(key)
    if not job or not asked.visitor or job.owner != asked.visitor or not (job.folder / "adapter").exists():
        raise PeftlabError(f"The adapter {str(key)[:60]} is not here, or not yours; choose another one")
    return adapters.read(job.folder / "adapter")


def chooser(value: str | None, label: str = "Adapter") -> gr.Dropdown:
    """A control that offers adapters, as `offered` says."""
    return gr.Dropdown(choices(None), value=value, label=label, info=INFO)


def offered(asked: Asked, chosen: str | None) -> Update:
    """What a chooser shows to a visitor. Below its label it says more of the chosen one than the name."""
    info = _described(of(asked, chosen)) if chosen else INFO
    return gr.update(choices=choices(asked), value=chosen, info=info)


def choices(asked: Asked | None) -> list[tuple[str, str | int | float]]:
    """Names and keys: the visitor's own, the newest first; then the bundled ones."""
    own = list[tuple[str, str | int | float]]()
    if asked:
        for key in asked.adapters:
            with suppress(PeftlabError):  # another version saved it, or it is damaged
                own.append((f"yours: {of(asked, key).label}", key))
    return [*own, *((f"bundled: {adapter.label}", key) for key, adapter in bundled().items())]


def _described(adapter: Adapter) -> str:
    """The task, the method and when it was saved."""
    rank = f" rank {adapter.spec.rank}" if adapter.spec.rank else ""
    return f"{task_of(adapter).name}, {adapter.spec.method}{rank}, {adapter.saved[:16].replace('T', ' ')} UTC"


def task_of(adapter: Adapter) -> tasks.Task:
    return tasks.find(adapter.spec.task or tasks.DEFAULT)
