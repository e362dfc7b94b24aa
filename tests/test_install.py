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

SCRIPT = "import sys; sys.argv[0] = 'peftlab'; from peftlab.cli import main; sys.exit(main())"
"""What the console command does."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Starts a Python, far from the checkout, that finds peftlab in the installed wheel."""
    site, elsewhere = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
    apart = {"PYTHONPATH": str(site), "PEFTLAB_CACHE": str(elsewhere), "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}

    def start(*argv):
        return subprocess.Popen(
            [sys.executable, *argv],
            cwd=elsewhere,
            env=os.environ | apart | {"PIP_FIND_LINKS": "", "GRADIO_ANALYTICS_ENABLED": "False"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    start.site = site
    return start


@pytest.fixture
def said(python):
    """What a Python that ends well prints."""

    def call(*argv):
        out, err = (process := python(*argv)).communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        return out

    return call


def test_the_wheel_holds_what_the_checkout_holds(wheel):
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "peftlab", "demos", "assets", "app.py"]
    git = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to it")
    files = {file for file in git.stdout.split() if (ROOT / file).exists() and not file.endswith(".png")}
    expected = {file if file.startswith("peftlab/") else f"peftlab/bundle/{file}" for file in files}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_what_it_says_of_itself(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"Version: {peftlab.__version__}\n" in metadata
    required = {re.match(r"[\w-]+", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert set(re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.MULTILINE)) == required


def test_the_installed_package_is_the_one_that_is_imported(said, python):
    assert said("-c", "import peftlab; print(peftlab.__file__)").startswith(str(python.site))


def test_its_commands_find_their_data(said):
    counted = json.loads(said("-m", "peftlab", "params", "--model", "llama-2-7b", "--json"))
    assert counted["total_parameters"] == 6_738_415_616
    found = {task["key"] for task in json.loads(said("-m", "peftlab", "tasks", "--json"))}
    assert found == {"intent", "ticket", "voice"}
    assert json.loads(said("-m", "peftlab", "memory", "--json"))["peak_allocated_bytes"] > 0
    assert said("-c", "from peftlab.race import recordings; print(len(recordings.of('methods')))") == "2\n"
    bundled = "from peftlab.adapters import BUNDLED, read; print(read(BUNDLED / 'ticket-lora').spec.task)"
    assert said("-c", bundled) == "ticket\n"


def test_both_names_of_the_command_are_said(said):
    assert said("-m", "peftlab", "--version") == said("-c", SCRIPT, "--version") == f"peftlab {peftlab.__version__}\n"
    assert "usage: python -m peftlab params " in said("-m", "peftlab", "params", "--help")
    assert "usage: peftlab params " in said("-c", SCRIPT, "params", "--help")


def test_a_wrong_argument_names_the_command_to_ask(python):
    for name, start in (("peftlab", ("-c", SCRIPT)), ("python -m peftlab", ("-m", "peftlab"))):
        said = python(*start, "params", "--rank").communicate()[1]
        assert said.endswith(f"; see {name} params --help\n")


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(os.name != "posix", reason="the test interrupts a group of processes, as a terminal does")
def test_the_page_answers_until_it_is_interrupted(python, port):
    if find_spec("gradio") is None:
        pytest.skip("gradio is missing")
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


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_is_a_whole_number(run, port):
    status, out, err = run("app", "--port", port)
    assert (status, out) == (2, "") and "1 to 65535" in err


def test_the_page_passes_its_exit_status_on(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stay
    assert run("app")[0] == 1
