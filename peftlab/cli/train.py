"""`peftlab train`: fine-tunes, with its progress on stderr."""

import json
import time
from argparse import Namespace
from pathlib import Path

from ..resolve import resolve_here
from ._shared import Commands, note_event, spec_of, verb


def add(commands: Commands) -> None:
    parser = verb(commands, "train", run, "fine-tune; progress on stderr", spec=True)
    parser.add_argument("--out", type=Path, help="folder for the adapter (default: a new one under runs/)")


def run(args: Namespace) -> int:
    """With --json every event is a line on stdout. Returns 1 for a run that did not end well."""
    from ..run import train

    spec = resolve_here(spec_of(args))
    out = args.out or Path("runs") / f"{spec.task}-{spec.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    for event in train(spec, out):
        if args.json:
            print(json.dumps(event), flush=True)
        note_event(event)
    return 0 if event["type"] == "done" else 1
