"""What the verbs print: tables on stdout, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .. import units
from ..errors import SpecError

if TYPE_CHECKING:
    from ..run import Event

Result = TypeVar("Result")


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
    from ..show import sentences

    match event["type"]:
        case "loading":
            note(f"loading {event['model']}")
        case "start":
            trained = f"{event['trainable_parameters']:,} parameters are trained"
            note(f"{event['model']} from {event['source']}; {trained}, {sentences.gear([event])}")
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
    while True:
        try:
            share = next(work)
        except StopIteration as finished:
            return finished.value
        if sys.stderr.isatty():
            print(f"{doing} {100 * share:.0f}%", end="\r", file=sys.stderr)


def check_writable(*files: Path | None) -> None:
    """Raises SpecError where a file cannot be written, before the work that would fill it; makes its folder."""
    for file in filter(None, files):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError as error:
            raise SpecError(f"{file}: cannot be written ({error.strerror}); give another path") from None
