"""The table of jobs and the log of their events, in SQLite: a row is never changed but for a job's state."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from ..errors import SpecError
from ..run.events import Event
from ..spec import Json

WAITING, RUNNING, OVER = "waiting", "running", "over"
"""The states of a job."""
TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, kind TEXT NOT NULL, arguments TEXT NOT NULL,
  owner TEXT NOT NULL, first INTEGER NOT NULL, state TEXT NOT NULL, made REAL NOT NULL, last TEXT
);
CREATE INDEX IF NOT EXISTS by_owner ON jobs (owner, state);
CREATE TABLE IF NOT EXISTS events (
  job TEXT NOT NULL, number INTEGER NOT NULL, event TEXT NOT NULL, PRIMARY KEY (job, number)
) WITHOUT ROWID;
"""
VERSION = 1
"""Of the tables above, kept in the file. A file of 0 is one that was made before versions were kept: it has the same tables."""
COLUMNS = "number, id, kind, arguments, owner, first, state, made, last"


class Record(NamedTuple):
    number: int
    """Its place in the order of arrival, which no clock can change."""
    id: str
    kind: str
    arguments: Json
    owner: str
    first: bool
    """Whether it goes before those that came earlier."""
    state: str
    made: float
    """Seconds since 1970."""
    last: Event | None
    """Its last event, once it is over."""


class Records:
    """Jobs and events in one file. Raises sqlite3.Error where the disk is full or the file is damaged."""

    def __init__(self, file: Path) -> None:
        """Raises SpecError where the file cannot be opened, or is none of this version's; it stays as it is then."""
        self._lock = threading.Lock()
        try:
            self._base = sqlite3.connect(file, timeout=30, isolation_level=None, check_same_thread=False)
            try:
                (made_by,) = self._base.execute("PRAGMA user_version").fetchone()
                if made_by > VERSION:
                    said = f"{file}: this table of runs has version {made_by}, and this peftlab reads up to {VERSION}"
                    raise SpecError(f"{said}; install a newer peftlab, or give PEFTLAB_DATA another folder")
                self._base.execute("PRAGMA journal_mode=WAL")
                # A power cut may take the last events; a kill takes none.
                self._base.execute("PRAGMA synchronous=NORMAL")
                self._base.executescript(TABLES)
                self._base.execute("SELECT count(last) FROM jobs").fetchone()  # reads all rows: damage shows now
                self._base.execute(f"PRAGMA user_version={VERSION}")
            except (sqlite3.Error, SpecError):
                self._base.close()
                raise
        except sqlite3.Error as error:
            said = f"{file}: the table of runs cannot be opened ({error})"
            fix = f"move {file.name}* away, and a new one is made while the runs' folders stay"
            raise SpecError(f"{said}; {fix}, or give PEFTLAB_DATA another folder") from None

    def add(self, id: str, kind: str, arguments: Json, owner: str, first: bool) -> Record:
        row = (id, kind, json.dumps(arguments), owner, first, WAITING, time.time())
        self._do("INSERT INTO jobs (id, kind, arguments, owner, first, state, made) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        found = self.find(id)
        assert found is not None
        return found

    def find(self, id: str) -> Record | None:
        return next(self.where("id = ?", id), None)

    def where(self, condition: str, *values: object) -> Iterator[Record]:
        """The jobs that a condition of SQL holds for, in the order of their arrival."""
        for number, id, kind, arguments, owner, first, state, made, last in self._do(
            f"SELECT {COLUMNS} FROM jobs WHERE {condition} ORDER BY number", values
        ):
            told = json.loads(last) if last else None
            yield Record(number, id, kind, json.loads(arguments), owner, bool(first), state, made, told)

    def put(self, id: str, state: str, last: Event | None = None) -> None:
        """Changes a job's state; one that is over has a last event."""
        self._do("UPDATE jobs SET state = ?, last = ? WHERE id = ?", (state, json.dumps(last) if last else None, id))

    def say(self, id: str, number: int, event: Event) -> None:
        """Adds the event `number` of a job, which is not there yet."""
        self._do("INSERT INTO events VALUES (?, ?, ?)", (id, number, json.dumps(event)))

    def events(self, id: str) -> list[tuple[int, Event]]:
        found = self._do("SELECT number, event FROM events WHERE job = ? ORDER BY number", (id,))
        return [(number, json.loads(event)) for number, event in found]

    def forget(self, id: str) -> None:
        """Removes a job and its events."""
        self._do("DELETE FROM events WHERE job = ?", (id,))
        self._do("DELETE FROM jobs WHERE id = ?", (id,))

    def close(self) -> None:
        with self._lock:
            self._base.close()

    def _do(self, command: str, values: tuple[object, ...]) -> list[tuple]:
        with self._lock, closing(self._base.execute(command, values)) as cursor:
            return cursor.fetchall()
