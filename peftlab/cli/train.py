"""`peftlab train`: fine-tunes, with its progress on stderr."""

import json
import time
from argparse import Namespace
from pathlib import Path

from ..errors import SpecError
from ..resolve import resolve_here
from ._shared import Commands, note_event, spec_of, verb


def add(commands: Commands) -> None:
    parser = verb(commands, "train", run, "fine-tune; progress on stderr", spec=True)
    parser.add_argument("--out", type=Path, help="folder for the adapter (default: a new one under runs/)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out that was killed or stopped, with its settings",
    )


def run(args: Namespace) -> int:
    """With --json every event is a line on stdout. Returns 1 for a run that did not end well. Raises SpecError."""
    from ..run import must_go_on, train

    spec = resolve_here(spec_of(args))
    if args.resume:
        if not args.out:
            raise SpecError("resume: --out is missing; give the folder of the run that is to go on")
        must_go_on(spec, args.out)
    out = args.out or Path("runs") / f"{spec.task}-{spec.method}-{time.strftime('%Y%m%d-%H%M%S')}"
    for event in train(spec, out, resume=args.resume):
        if args.json:
            print(json.dumps(event), flush=True)
        note_event(event)
    return 0 if event["type"] == "done" else 1
