"""The catalogues: `models`, `methods`, `gpus`, `tasks` and `presets`."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict

from ..base import architecture
from ..base.models import MODELS
from ..catalog import PAPERS, PRESETS
from ..catalog.gpus import GPUS
from ..count import count, why_not
from ..data.tasks import TASKS
from ..methods import METHODS
from ..resolve import resolve
from ..spec import Json, RunSpec
from ._shared import Commands, Output, table, verb


def add(commands: Commands) -> None:
    for name in ("models", "methods", "gpus", "tasks", "presets"):
        parser = verb(commands, name, run, f"the catalogue of {name}")
        if name == "methods":
            parser.add_argument("--model", help="says what each trains of this model, or why it does not suit it")


def run(args: Namespace) -> Output:
    if model := getattr(args, "model", None):
        architecture.of(model)  # refuses what has no layers once, and not for each method
    documents, rows = zip(*_entries(args.command, model), strict=True)
    return documents, table(rows)


def _entries(catalogue: str, model: str | None) -> Iterator[tuple[Json, tuple[str, ...]]]:
    """Every entry of one as JSON, and as a row of a table; of methods, what they do with a `model` where one is asked about."""
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
                said = words.hypothesis
                if model:
                    reason = why_not(key, model)
                    trained = None if reason else count(resolve(RunSpec(model=model, method=key))).trainable_parameters
                    more |= {"why_not": reason or None, "trainable_parameters": trained}
                    said = reason or f"{trained:,} trained"
                yield {"key": key, **asdict(words), **more}, (key, words.family, words.name, said)
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
