"""The table of runs, where its file is no such table."""

import sqlite3

import pytest

from peftlab import SpecError
from peftlab.room.records import OVER, VERSION, Records


def cannot_be_opened(file):
    with pytest.raises(SpecError, match=r"jobs\.sqlite: .*; move jobs\.sqlite\* away, .* the runs' folders stay"):
        Records(file)


def test_a_table_of_runs_that_is_none_is_said_and_stays_as_it_is(tmp_path):
    file = tmp_path / "jobs.sqlite"
    file.write_bytes(garbage := b"no table at all " * 100)
    cannot_be_opened(file)
    assert file.read_bytes() == garbage
    (tmp_path / "folder" / "jobs.sqlite").mkdir(parents=True)
    cannot_be_opened(tmp_path / "folder" / "jobs.sqlite")
    (tmp_path / "other").mkdir()
    other = sqlite3.connect(tmp_path / "other" / "jobs.sqlite")
    other.execute("CREATE TABLE jobs (shift TEXT)")
    other.close()
    cannot_be_opened(tmp_path / "other" / "jobs.sqlite")


def test_a_table_of_runs_that_is_damaged_further_on_is_said_too(tmp_path):
    file = tmp_path / "jobs.sqlite"
    table = Records(file)
    for n in range(300):
        table.add(f"run-{n}", "train", {"spec": {}}, "ann", False)
        table.put(f"run-{n}", OVER)
    table.close()
    sound = file.read_bytes()
    pages = len(sound) // 4096
    assert pages > 8
    damaged = sound[: 5 * 4096] + b"\xff" * (4096 * (pages - 5))
    file.write_bytes(damaged)
    cannot_be_opened(file)
    assert file.read_bytes() == damaged
    file.write_bytes(sound)
    table = Records(file)
    assert len([*table.where("state = ?", OVER)]) == 300
    table.close()


def test_a_table_of_a_later_version_says_what_it_needs_and_stays_as_it_is(tmp_path):
    file = tmp_path / "jobs.sqlite"
    Records(file).close()
    later = sqlite3.connect(file)
    later.execute(f"PRAGMA user_version={VERSION + 1}")
    later.close()
    whole = file.read_bytes()
    with pytest.raises(
        SpecError, match=r"has version 2, and this peftlab reads up to 1; install a newer peftlab, or give"
    ):
        Records(file)
    assert file.read_bytes() == whole


def test_a_table_of_before_versions_were_kept_goes_on(tmp_path):
    file = tmp_path / "jobs.sqlite"
    table = Records(file)
    table.add("run", "train", {"spec": {}}, "ann", False)
    table._do("PRAGMA user_version=0", ())
    table.close()
    table = Records(file)
    assert table.find("run") and table._do("PRAGMA user_version", ()) == [(VERSION,)]
    table.close()
