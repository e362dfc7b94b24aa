"""`peftlab fetch`: gets a base model ready."""

import sys
from argparse import Namespace

from .. import units
from ..base import fetching, models
from ._shared import Commands, Output, note, verb


def add(commands: Commands) -> None:
    verb(commands, "fetch", run, "get a base model ready, ahead of a talk").add_argument("model")


def run(args: Namespace) -> Output:
    entry, terminal = models.find(args.model), sys.stderr.isatty()
    if fetching.source_of(entry) is None and entry.licence:
        note(f"{entry.name} is under: {entry.licence}")
    last = None
    for told in fetching.fetch(args.model):
        bar = f" {units.size(told.done)} of {units.size(told.total)}" if told.total else ""
        if terminal or (told.stage != "downloading" and told != last):
            last = told
            end = "\r" if terminal else "\n"
            print(f"{told.stage}: {told.detail}{bar}", end=end, file=sys.stderr, flush=True)
    folder = str(fetching.folder_of(entry))
    document = {"model": args.model, "folder": folder, "source": told.detail, "bytes": told.total}
    return document, [f"{args.model} is ready in {folder}, from {told.detail}"]
