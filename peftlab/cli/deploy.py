"""`peftlab deploy`: the page as a Hugging Face Space."""

import getpass
import os
import tempfile
from argparse import Namespace
from pathlib import Path

from .. import units
from ..base.fetching import bytes_in
from ..errors import SpecError
from ..space import Space, upload, write
from ._shared import Commands, Output, note, verb


def add(commands: Commands) -> None:
    parser = verb(commands, "deploy", run, "make the page a Hugging Face Space")
    parser.add_argument("name", metavar="OWNER/NAME", help="on the Hub, where hf auth login has logged you in")
    parser.add_argument(
        "--hardware", default="cpu-basic", help="the Hub's name of it, such as zero-a10g or l4x1 (default: cpu-basic)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a host's setting; repeatable")
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="a setting that nobody sees, such as PEFTLAB_KEY; it is asked for",
    )
    parser.add_argument("--private", action="store_true", help="for its owner alone")
    parser.add_argument("--dry-run", action="store_true", help="write the folder and upload nothing")
    parser.add_argument(
        "--out", type=Path, help="the folder to write (default with --dry-run: NAME, else one that is removed)"
    )


def run(args: Namespace) -> Output:
    variables = dict(_pair(text) for text in args.set)
    secrets = {name: os.environ.get(name) or getpass.getpass(f"{name}: ") for name in args.secret}
    space = Space(args.name, args.hardware, variables, secrets)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or (Path(space.name.split("/")[1]) if args.dry_run else Path(scratch) / "space")
        write(space, folder)
        size = bytes_in(folder)
        if not args.dry_run:
            note(f"uploading {units.size(size)} to {space.url}")
            upload(space, folder, args.private)
    document = {"name": space.name, "hardware": space.hardware, "url": space.url, "folder": str(folder), "bytes": size,
                "uploaded": not args.dry_run}  # fmt: skip
    if args.dry_run:
        return document, [f"{folder} holds {space.name} for {space.hardware}, {units.size(size)}; nothing was uploaded"]
    return document, [f"{space.url} is there and builds now, which takes a few minutes"]


def _pair(text: str) -> tuple[str, str]:
    name, is_one, value = text.partition("=")
    if not is_one:
        raise SpecError(f"set={text}: not of the form NAME=VALUE; write both, such as PEFTLAB_QUEUE=20")
    return name.strip(), value
