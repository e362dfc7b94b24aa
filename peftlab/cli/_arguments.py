"""What the verbs' parsers share: how a verb is added, the flags of a RunSpec, and the types of numbers."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, TypeAlias

from ..base.models import UNITS
from ..catalog import find_preset
from ..errors import SpecError
from ..resolve import with_preset
from ..spec import SETTINGS, Json, RunSpec

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""The subcommands, to which each verb adds its own."""
Output: TypeAlias = tuple[object, Iterable[str]]
"""What a verb prints: with --json the first, as one line of JSON, without it the lines."""


class Parser(ArgumentParser):
    """Raises SpecError for a wrong argument, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def verb(
    commands: Commands, name: str, run: Callable[[Namespace], int | Output], about: str, spec: bool = False
) -> Parser:
    """Adds a verb that calls `run`, which returns an exit status or what to print; with `spec`, the flags of `spec_of` too."""
    parser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    if spec:
        _add_spec(parser)
    return parser


def _add_spec(parser: Parser) -> None:
    parser.add_argument("--spec", type=Path, help="a JSON file with any of these settings; flags win")
    parser.add_argument("--preset", help="published settings by name (see presets); flags win")
    group = parser.add_argument_group("settings")
    for name, about in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        limits = f"; one of {', '.join(about.choices)}" if about.choices else ""
        text = f"{about.meaning}{limits} (automatic: {about.automatic})".replace("%", "%%")
        if about.type is bool:
            group.add_argument(flag, dest=name, action=BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, dest=name, metavar=about.type.__name__.upper(), help=text)


def spec_of(args: Namespace) -> RunSpec:
    """The run that the flags describe: single settings win over --preset, and that wins over --spec.

    Raises SpecError for a file that cannot be read, an unknown preset and a value out of range.
    """
    values = _read(args.spec) if args.spec else {}
    flags = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    for name, value in flags.items():
        if value == "":
            raise SpecError(f"{name.replace('_', '-')} is empty; leave it out for automatic")
    spec = RunSpec.from_dict(values | flags)
    if args.preset:
        spec = RunSpec.from_dict(with_preset(spec, find_preset(args.preset)).to_dict() | flags)
    return spec


def _read(file: Path) -> Json:
    try:
        return RunSpec.from_json(file.read_text(encoding="utf-8")).to_dict()
    except SpecError as error:
        raise SpecError(f"spec={file}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SpecError(f"spec={file}: cannot be read ({why}); give a JSON file") from None


def count(text: str) -> int:
    """A whole number of at least 1, which may be written as 500M."""
    scale = UNITS.get(text[-1:].upper(), 1)
    try:
        value = round(float(text[:-1] if scale > 1 else text) * scale)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ArgumentTypeError(f"{text}: a whole number of at least 1, such as 40 or 500M")
    return value


def port(text: str) -> int:
    """The number of a TCP port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ArgumentTypeError(f"{text}: a whole number from 1 to 65535, such as 7860")
    return int(text)
