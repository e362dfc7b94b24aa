"""What the verbs share: how one is added, the flags of a RunSpec, types of arguments, and what is printed."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias, TypeVar

from .. import units
from ..base.models import UNITS
from ..catalog import PRESETS, entry_of
from ..errors import SpecError
from ..resolve import with_preset
from ..spec import SETTINGS, Json, RunSpec

if TYPE_CHECKING:
    from ..run import Event

Result = TypeVar("Result")
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
    if not spec:
        return parser
    parser.add_argument("--spec", type=Path, help="a JSON file with any of these settings; flags win")
    parser.add_argument("--preset", help="published settings by name (see presets); flags win")
    group = parser.add_argument_group("settings")
    for setting, means in SETTINGS.items():
        flag = "--" + setting.replace("_", "-")
        limits = f"; one of {', '.join(means.choices)}" if means.choices else ""
        text = f"{means.meaning}{limits} (automatic: {means.automatic})".replace("%", "%%")
        if means.type is bool:
            group.add_argument(flag, dest=setting, action=BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, dest=setting, metavar=means.type.__name__.upper(), help=text)
    return parser


def spec_of(args: Namespace) -> RunSpec:
    """The run that the flags describe: single settings win over --preset, and that wins over --spec.

    Raises SpecError for a file that cannot be read, an unknown preset and a value out of range.
    """
    values: Json = {}
    if args.spec:
        try:
            values = RunSpec.from_json(args.spec.read_text(encoding="utf-8")).to_dict()
        except SpecError as error:
            raise SpecError(f"spec={args.spec}: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise SpecError(f"spec={args.spec}: cannot be read ({why}); give a JSON file") from None
    flags = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    for name, value in flags.items():
        if value == "":
            raise SpecError(f"{name.replace('_', '-')} is empty; leave it out for automatic")
    spec = RunSpec.from_dict(values | flags)
    if args.preset:
        spec = RunSpec.from_dict(with_preset(spec, entry_of("preset", args.preset, PRESETS)).to_dict() | flags)
    return spec


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


def table(rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Rows of equally many cells as lines, in columns that are as wide as their widest cell."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def note(line: str) -> None:
    """Tells a person about the progress."""
    print(line, file=sys.stderr, flush=True)


def note_event(event: Event) -> None:
    """Tells a person about an event of a training run; some kinds are not worth a line."""
    from ..show import run_card

    match event["type"]:
        case "loading":
            note(f"loading {event['model']}")
        case "start":
            trained = f"{event['trainable_parameters']:,} parameters are trained"
            note(f"{event['model']} from {event['source']}; {trained}, {run_card.gear([event])}")
        case "resumed":
            note(event.get("message") or f"resumed after step {event['step']}")
        case "note":
            note(event["message"])
        case "step":
            left = units.seconds(event["eta_seconds"])
            note(f"step {event['step']}/{event['steps']}  loss {event['loss']:.3f}  {left} left")
        case "eval":
            metric, value = next(iter(event["metrics"].items()))
            note(f"held out, {event['when']}: {metric} {units.score(value)} of {event['items']}")
        case "done":
            said = event.get("message")
            note(said or f"adapter in {event['adapter']}, {units.seconds(event['seconds'])} in all")


def finish(work: Generator[float, None, Result], doing: str) -> Result:
    """Takes `work` to its end and returns its result. A terminal shows the share done that it yields: `doing 40%`."""
    from ..run.events import Work

    for share in (told := Work(work)):
        if sys.stderr.isatty():
            print(f"{doing} {100 * share:.0f}%", end="\r", file=sys.stderr)
    return told.result


def check_writable(*files: Path | None) -> None:
    """Raises SpecError where a file cannot be written, before the work that would fill it; makes its folder, and no file."""
    for file in filter(None, files):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            is_new = not file.exists()
            file.open("ab").close()
            if is_new:  # whoever reads the folder meanwhile would find an empty recording
                file.unlink()
        except OSError as error:
            raise SpecError(f"{file}: cannot be written ({error.strerror}); give another path") from None
