"""The catalogues: `models`, `methods`, `gpus`, `tasks` and `presets`."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict

from ..base.models import MODELS
from ..catalog import PAPERS, PRESETS
from ..catalog.gpus import GPUS
from ..data.tasks import TASKS
from ..methods import METHODS
from ..spec import Json
from ._shared import Commands, Output, table, verb


def add(commands: Commands) -> None:
    for name in ("models", "methods", "gpus", "tasks", "presets"):
        verb(commands, name, run, f"the catalogue of {name}")


def run(args: Namespace) -> Output:
    documents, rows = zip(*_entries(args.command), strict=True)
    return documents, table(rows)


def _entries(catalogue: str) -> Iterator[tuple[Json, tuple[str, ...]]]:
    """Every entry of one as JSON, and as a row of a table."""
    match catalogue:
        case "models":
            for m in MODELS.values():
                about = {"key": m.key, "name": m.name, "hub_id": m.hub_id, "total_parameters": m.total_parameters}
                row = (m.key, f"{m.total_parameters:,}", m.name, m.hub_id or m.source)
                yield about | {"licence": m.licence, "trainable": m.is_causal}, row
        case "methods":
            for key, method in METHODS.items():
                words, papers = method.about, [PAPERS[paper].url for paper in method.about.papers]
                more = {"papers": papers, "settings": method.settings, "merges": method.merge is not None}
                yield {"key": key, **asdict(words), **more}, (key, words.family, words.name, words.hypothesis)
        case "gpus":
            for g in GPUS.values():
                yield asdict(g), (g.key, f"{g.memory_gb:g} GB", g.name, g.source)
        case "tasks":
            for t in TASKS.values():
                about = {"key": t.key, "name": t.name, "teaches": t.teaches, "metric": t.metric}
                train, heldout = len(t.train), len(t.heldout)
                row = (t.key, f"{train} + {heldout} held out", t.metric, t.teaches)
                yield about | {"train": train, "heldout": heldout}, row
        case "presets":
            for p in PRESETS.values():
                yield asdict(p), (p.key, p.name, p.says, p.source)
