"""The wheel, installed alone in another folder, is the whole app."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from importlib.util import find_spec

import pytest
from tiny import ROOT

import peftlab

SCRIPT = "import sys; sys.argv[0] = 'peftlab'; from peftlab.cli import main; sys.exit(main())"  # what the console command does


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Starts a Python, far from the checkout, that finds peftlab in the installed wheel."""
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    apart = {"PYTHONPATH": str(site), "PEFTLAB_CACHE": str(elsewhere), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    environment = os.environ | apart | {"PIP_FIND_LINKS": "", "GRADIO_ANALYTICS_ENABLED": "False"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return lambda *argv: subprocess.Popen([sys.executable, *argv], cwd=elsewhere, env=environment, **pipes)


def test_the_wheel_holds_what_the_checkout_holds_and_says_so(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"Version: {peftlab.__version__}\n" in metadata
    assert "\n\n# peftlab\n" in metadata and "sdk: gradio" not in metadata
    required = {re.match(r"[\w-]+", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert set(re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.MULTILINE)) == required
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "peftlab", "demos", "assets", "app.py"]
    git = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to it")
    files = {file for file in git.stdout.split() if (ROOT / file).exists() and not file.endswith(".png")}
    expected = {file if file.startswith("peftlab/") else f"peftlab/bundle/{file}" for file in files}
    assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected


def test_its_commands_find_their_data(python):
    def said(*argv):
        out, err = (process := python(*argv)).communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        return out

    counted = json.loads(said("-m", "peftlab", "params", "--model", "llama-2-7b", "--json"))
    assert counted["total_parameters"] == 6_738_415_616
    found = {task["key"] for task in json.loads(said("-m", "peftlab", "tasks", "--json"))}
    assert found == {"intent", "ticket", "voice"}
    bundled = (
        "import peftlab; from peftlab.adapters import BUNDLED, read; from peftlab.race import recordings; "
        "print(len(recordings.of('methods')), read(BUNDLED / 'ticket-lora').spec.task, peftlab.__file__)"
    )
    races, task, file = said("-c", bundled).split()
    assert (races, task) == ("2", "ticket") and not file.startswith(str(ROOT))


def test_both_names_of_the_command_are_said(python):
    for name, start in (("peftlab", ("-c", SCRIPT)), ("python -m peftlab", ("-m", "peftlab"))):
        assert python(*start, "--version").communicate() == (f"peftlab {peftlab.__version__}\n", "")
        assert python(*start, "params", "--rank").communicate()[1].endswith(f"; see {name} params --help\n")


@pytest.mark.skipif(os.name != "posix", reason="the test interrupts a group of processes, as a terminal does")
def test_the_page_answers_until_it_is_interrupted(python):
    if find_spec("gradio") is None:
        pytest.skip("gradio is missing")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    page = python("-m", "peftlab", "app", "--port", str(port))
    try:
        begun = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert answer.status == 200 and b"peftlab" in answer.read()
                break
            except OSError:
                assert page.poll() is None and time.monotonic() - begun < 90
                time.sleep(0.1)
        taken = python("-m", "peftlab", "app", "--port", str(port))
        assert f"port={port}: cannot be used" in taken.communicate()[1] and taken.returncode == 2
        page.send_signal(signal.SIGINT)
        assert page.wait(30) == 0 and "Traceback" not in page.communicate()[1]
        with socket.socket() as s:
            assert s.connect_ex(("127.0.0.1", port)) != 0
    finally:
        if page.poll() is None:
            os.killpg(page.pid, signal.SIGKILL)


def test_without_gradio_it_says_so_in_a_line(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    needs = "peftlab: app: the page needs gradio and plotly; pip install gradio plotly\n"
    assert run("app") == (2, "", needs)


def test_the_page_passes_its_exit_status_on(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay
    assert run("app")[0] == 1
