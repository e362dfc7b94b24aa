"""The page as a Hugging Face Space: what its folder holds, that it runs from there, and how it goes to a Hub."""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import yaml

from peftlab import PeftlabError, SpecError, cli, space
from peftlab.base.models import DEFAULT, MODELS


def made(tmp_path, hardware="cpu-basic", **given):
    one = space.Space("ann/peftlab", hardware, **given)
    space.write(one, tmp_path / "space")
    head = yaml.safe_load((tmp_path / "space" / "README.md").read_text(encoding="utf-8").split("---")[1])
    return tmp_path / "space", head, (tmp_path / "space" / "requirements.txt").read_text().splitlines()


@pytest.mark.parametrize("hardware", ["cpu-basic", "t4-small", "zero-a10g"])
def test_each_hardware_gets_what_it_needs(hardware, tmp_path):
    folder, head, requirements = made(tmp_path, hardware, variables={"PEFTLAB_QUEUE": "20"})
    assert head["sdk"] == "gradio" and head["suggested_hardware"] == hardware
    assert (folder / head["app_file"]).exists() and (folder / head["thumbnail"].split("/resolve/main/")[1]).exists()
    assert len(head["short_description"]) <= 60
    assert head["preload_from_hub"][0].split()[0] == head["models"][0] == MODELS[DEFAULT].hub_id
    (torch,) = [line for line in requirements if line.startswith("torch")]
    assert torch == "torch==2.11.0" + ("+cpu" if hardware == "cpu-basic" else "")
    assert any("whl/cpu" in line for line in requirements) == (hardware == "cpu-basic")
    assert any(line.startswith("gradio>=") for line in requirements)
    assert "`PEFTLAB_QUEUE=20`" in (folder / "README.md").read_text(encoding="utf-8")


def digest(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return hashlib.sha256(b"".join(bytes(file.relative_to(folder)) + file.read_bytes() for file in files)).hexdigest()


def test_the_page_runs_from_the_folder_and_writes_nothing_there(tmp_path):
    pytest.importorskip("gradio")
    folder, *_ = made(tmp_path)
    before = digest(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HOME": str(tmp_path / "home")}
    own |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PEFTLAB_")} | own
    (tmp_path / "home").mkdir()
    page = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stderr=subprocess.PIPE)
    try:
        begun = time.monotonic()
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
                    assert json.load(answer)["status"] == "ok"
                break
            except OSError:
                assert page.poll() is None and time.monotonic() - begun < 90
                time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            assert b"peftlab" in answer.read()
    finally:
        page.terminate()
        page.wait(20)
    assert digest(folder) == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nobody"], "name=nobody: not of the form OWNER/NAME"),
        (["../x/y"], "not of the form OWNER/NAME"),
        (["a/b", "--hardware", "t5"], "hardware=t5: the Hub has no such hardware"),
        (["a/b", "--set", "PEFTLAB_QEUE=1"], "PEFTLAB_QEUE: no setting of a host; did you mean PEFTLAB_QUEUE"),
        (["a/b", "--set", "PEFTLAB_QUEUE=-1"], "PEFTLAB_QUEUE=-1: the most runs that wait is a whole number"),
        (["a/b", "--set", "PEFTLAB_QUEUE"], "set=PEFTLAB_QUEUE: not of the form NAME=VALUE"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments, said, tmp_path, capsys):
    assert cli.main(["deploy", *arguments, "--dry-run", "--out", str(tmp_path / "space")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "space").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "mine").touch()
    with pytest.raises(SpecError, match="there is something in it"):
        made(tmp_path)
    assert [file.name for file in (tmp_path / "space").iterdir()] == ["mine"]


class Hub(BaseHTTPRequestHandler):
    """Takes a Space as the Hub does, every file as a regular one."""

    created: dict = {}  # noqa: RUF012
    is_there = False
    set: list = []  # noqa: RUF012
    files: dict = {}  # noqa: RUF012
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        said: object = {}
        if self.status != 200:
            said = {"error": "no"}
        elif self.path == "/api/repos/create":
            Hub.created, Hub.is_there = json.loads(body), True
            said = {"url": "https://huggingface.co/spaces/ann/peftlab", "name": "ann/peftlab", "id": "1"}
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            said = {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            Hub.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}  # in several commits
            said = {
                "success": True,
                "commitOid": "5" * 40,
                "commitUrl": "https://huggingface.co/spaces/ann/peftlab/commit/5",
                "hookOutput": "",
            }
        elif re.fullmatch("/api/spaces/ann/peftlab/(variables|secrets|hardware)", self.path):
            Hub.set.append((self.path.rpartition("/")[2], json.loads(body)))
            said = {"stage": "BUILDING"} if self.path.endswith("hardware") else {}
        elif self.path == "/api/validate-yaml":
            said = {"errors": [], "warnings": []}
        self._say(self.status, said)

    def do_GET(self) -> None:
        if self.path.endswith("/runtime"):
            self._say(200, {"stage": "RUNNING", "hardware": {"current": "cpu-basic", "requested": "cpu-basic"}})
        elif self.is_there:
            self._say(200, {"id": "ann/peftlab", "sha": "5" * 40, "siblings": []})
        else:
            self._say(404, {"error": "Repository not found"}, "RepoNotFound")

    def _say(self, status: int, said: object, error: str = "") -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        for name, value in {"status": 200, "files": {}, "created": {}, "is_there": False, "set": []}.items():
            monkeypatch.setattr(Hub, name, value)
        yield Hub
        server.shutdown()


def test_a_space_is_made_with_its_hardware_and_secrets_and_gets_the_whole_folder(hub, monkeypatch, capsys):
    monkeypatch.setenv("PEFTLAB_KEY", "of the presenter")
    given = ["--hardware", "zero-a10g", "--secret", "PEFTLAB_KEY", "--set", "PEFTLAB_QUEUE=20", "--json"]
    assert cli.main(["deploy", "ann/peftlab", *given]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["uploaded"] and told["url"] == "https://huggingface.co/spaces/ann/peftlab"
    assert hub.created["type"] == "space" and hub.created["sdk"] == "gradio" and hub.created["hardware"] == "zero-a10g"
    assert hub.created["secrets"] == [{"key": "PEFTLAB_KEY", "value": "of the presenter"}]
    assert hub.created["variables"] == [{"key": "PEFTLAB_QUEUE", "value": "20"}]
    assert {"app.py", "requirements.txt", "README.md", "peftlab/__init__.py", "assets/style.css"} <= hub.files.keys()
    assert not any(re.search("__pycache__|of the presenter", name) for name in hub.files)
    assert not any(b"of the presenter" in content for content in hub.files.values())


def test_a_space_that_is_there_gets_what_it_is_given_now(hub, monkeypatch, capsys):
    monkeypatch.setenv("PEFTLAB_KEY", "another word")
    hub.is_there = True
    given = ["--hardware", "l4x1", "--secret", "PEFTLAB_KEY", "--set", "PEFTLAB_QUEUE=30"]
    assert cli.main(["deploy", "ann/peftlab", *given]) == 0 and not hub.created and hub.files
    about = [
        (what, {name: one.get(name) for name in ("key", "value", "flavor") if one.get(name)}) for what, one in hub.set
    ]
    assert about == [
        ("variables", {"key": "PEFTLAB_QUEUE", "value": "30"}),
        ("secrets", {"key": "PEFTLAB_KEY", "value": "another word"}),
        ("hardware", {"flavor": "l4x1"}),
    ]


def test_a_hub_that_refuses_is_told_of_in_a_line(hub, tmp_path):
    hub.status = 403
    one = space.Space("ann/peftlab", "cpu-basic")
    (tmp_path / "README.md").touch()
    with pytest.raises(PeftlabError, match="the Hub refused ann/peftlab .*hf auth login"):
        space.upload(one, tmp_path)
