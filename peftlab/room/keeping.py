"""What stays of jobs that are over: copies in a second folder, and nothing that is too old or too much."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Container, Iterable
from pathlib import Path

from ..run import Event
from .jobs import Job
from .records import OVER, Record

log = logging.getLogger(__name__)
LOG = "job.json"
"""A job's record and events, beside its adapter in the second folder."""
DAY = 24 * 3600


def copy(job: Job, to: Path) -> None:
    """Copies a finished job to a folder that may be a mounted bucket, which renames and locks nothing."""
    try:
        (to / job.id).mkdir(parents=True, exist_ok=True)
        if job.folder.exists():  # a race and a scoring leave nothing but their events
            shutil.copytree(job.folder, to / job.id, dirs_exist_ok=True)
        told = {"record": job.record._replace(state=OVER, last=job.events[-1])._asdict(), "events": job.events}
        (to / job.id / LOG).write_text(json.dumps(told))
    except OSError as error:
        log.warning("%s: the run is not copied there (%s)", to / job.id, error)


def copied(folder: Path) -> tuple[Record, list[Event]] | None:
    """The record and events of a job that was copied to this folder; None where there is none."""
    try:
        told = json.loads((folder / LOG).read_text())
        return Record(**told["record"])._replace(state=OVER), told["events"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def overdue(
    over: Iterable[tuple[Record, Path]], days: float, most: float, now: float, seen: Container[str] = ()
) -> list[Record]:
    """Those of the jobs that are to go, given from the oldest on with their folders.

    They go once they are older than so many days, and the oldest ones while all take more than `most` bytes. Those that are
    `seen`, by their ids, stay.
    """
    sized = [(record, size(folder)) for record, folder in over]
    total, going = sum(of for _, of in sized), []
    for record, of in sized:
        if record.id not in seen and (now - record.made > days * DAY or total > most):
            going.append(record)
            total -= of
    return going


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
