"""`peftlab …` or `python -m peftlab …`: everything the app does, without a browser. One file holds one verb.

Exit status: 0 done; 2 a wrong argument, with one line on stderr; 1 it failed while running.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from pkgutil import iter_modules
from typing import NoReturn

from .. import __version__, seam
from ..errors import PeftlabError, SpecError
from ._shared import Parser, spec_of

__all__ = ["console", "main", "parser", "spec_of"]

ORDER = ("catalogues", "app", "fetch", "params", "memory", "train", "race", "compare", "study", "deploy", "bench")
"""The files in the order in which --help lists their verbs. A file that is not named here comes after these."""


def console() -> NoReturn:
    """The command in a process of its own, in which no library may print a line."""
    seam.quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "‖" shows "?"
    try:
        status = main()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        if error.errno == errno.ENOSPC:
            print(f"peftlab: the output cannot be written ({error.strerror})", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        status = 1
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, by default that of the process, and returns its exit status."""
    try:
        args = parser().parse_args(argv)
        result = args.run(args)
        if isinstance(result, int):
            return result
        document, lines = result
        for line in [json.dumps(document)] if args.json else lines:
            print(line)
        return 0
    except PeftlabError as error:
        print(f"peftlab: {error}", file=sys.stderr)
        return 2 if isinstance(error, SpecError) else 1
    except KeyboardInterrupt:
        print("peftlab: interrupted", file=sys.stderr)
        return 1


def parser() -> Parser:
    """The parser of the whole command. Every file of this folder adds its verb, but for those that begin with `_`."""
    installed = Path(sys.argv[0]).stem == "peftlab"  # the name that people typed
    whole = Parser(
        prog="peftlab" if installed else "python -m peftlab",
        description="Everything the app does, without a browser.",
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"peftlab {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, parser_class=Parser)
    found = {file.name for file in iter_modules(__path__) if not file.name.startswith("_")}
    for name in (*ORDER, *sorted(found - set(ORDER))):
        import_module(f".{name}", __name__).add(commands)
    return whole
