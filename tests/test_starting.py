"""The server's own process: how it says that it cannot begin, and what its log hears."""

import json
import os
import re
import subprocess
import sys

from tiny import ROOT


def served(*command, **settings):
    """(exit status, lines of stderr) of a server that is to refuse to begin."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | settings
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


def test_a_server_with_a_setting_that_cannot_be_says_one_line():
    said = ["peftlab: PEFTLAB_SECONDS=soon: the most seconds of a run's turn is a number from 1 on; try 3600"]
    assert served("app.py", PEFTLAB_SECONDS="soon") == (2, said)


def test_the_command_passes_the_line_and_the_status_on_and_warnings_stand_before_it(tmp_path):
    (tmp_path / "key").touch()
    (tmp_path / "jobs.sqlite").write_text("no table at all " * 100)
    status, (warned, said) = served("-m", "peftlab", "app", PEFTLAB_DATA=str(tmp_path))
    assert status == 2 and said.startswith(f"peftlab: {tmp_path / 'jobs.sqlite'}: ")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING peftlab\.room\.visitors: /", warned)


LOGGED = """
import logging, sys
import app

app.seam.quiet()
app.logs.to_stderr(sys.argv[1])
for name in ("peftlab.room.rooms", "demos.page.store", "httpx"):
    logging.getLogger(name).info("looked")
    logging.getLogger(name).warning("warned")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("demos.page.tab").exception("failed")
"""


def test_a_log_hears_of_the_servers_own_warnings_and_of_nobody_elses():
    status, lines = served("-c", LOGGED, "text")
    assert status == 0 and all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in lines[:3])
    told = [line.split(" ", 2)[2] for line in lines[:3]]
    assert told == [
        "WARNING peftlab.room.rooms: warned",
        "WARNING demos.page.store: warned",
        "ERROR demos.page.tab: failed",
    ]
    assert lines[3].startswith("Traceback") and lines[-1] == "ZeroDivisionError: division by zero"


def test_a_log_of_json_has_an_object_a_line():
    status, lines = served("-c", LOGGED, "json")
    told = [json.loads(line) for line in lines]
    assert status == 0 and [(one["level"], one["logger"], one["message"]) for one in told] == [
        ("WARNING", "peftlab.room.rooms", "warned"),
        ("WARNING", "demos.page.store", "warned"),
        ("ERROR", "demos.page.tab", "failed"),
    ]
    assert "ZeroDivisionError" in told[-1]["traceback"] and told[0]["time"].endswith("Z")


def test_the_page_is_made_before_torch_is_loaded():
    assert served("-c", "import app, sys; sys.exit('torch' in sys.modules)") == (0, [])
