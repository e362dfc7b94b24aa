"""The catalogues: `models`, `methods`, `gpus`, `tasks` and `presets`."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict

from ..base.models import MODELS
from ..catalog import GPUS, PAPERS, PRESETS
from ..data.tasks import TASKS
from ..methods import METHODS
from ..spec import Json
from ._arguments import Commands, Output, verb
from ._output import table

Entry = tuple[Json, tuple[str, ...]]
"""An entry of a catalogue as JSON, and as a row of a table."""


def add(commands: Commands) -> None:
    for name in CATALOGUES:
        verb(commands, name, run, f"the catalogue of {name}")


def run(args: Namespace) -> Output:
    documents, rows = zip(*CATALOGUES[args.command](), strict=True)
    return documents, table(rows)


def _models() -> Iterator[Entry]:
    for m in MODELS.values():
        yield (
            {"key": m.key, "name": m.name, "hub_id": m.hub_id, "total_parameters": m.total_parameters,
             "licence": m.licence, "trainable": m.is_causal},
            (m.key, f"{m.total_parameters:,}", m.name, m.hub_id or m.source),
        )  # fmt: skip


def _methods() -> Iterator[Entry]:
    for m in METHODS.values():
        papers = [PAPERS[paper].url for paper in m.about.papers]
        more = {"papers": papers, "settings": m.settings, "merges": m.merge is not None}
        yield {"key": m.key, **asdict(m.about), **more}, (m.key, m.about.family, m.name, m.about.hypothesis)


def _gpus() -> Iterator[Entry]:
    for g in GPUS.values():
        yield asdict(g), (g.key, f"{g.memory_gb:g} GB", g.name, g.source)


def _tasks() -> Iterator[Entry]:
    for t in TASKS.values():
        train, heldout = len(t.train), len(t.heldout)
        about = {"key": t.key, "name": t.name, "teaches": t.teaches, "metric": t.metric}
        row = (t.key, f"{train} + {heldout} held out", t.metric, t.teaches)
        yield about | {"train": train, "heldout": heldout}, row


def _presets() -> Iterator[Entry]:
    for p in PRESETS.values():
        yield asdict(p), (p.key, p.name, p.says, p.source)


CATALOGUES = {"models": _models, "methods": _methods, "gpus": _gpus, "tasks": _tasks, "presets": _presets}
