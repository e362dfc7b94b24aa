"""Fetching from a Hugging Face Hub: a server of the test's own that speaks its interface, and the Hub's cache on this disk."""

import hashlib
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlparse

import huggingface_hub
import pytest
from tiny import TIED

from peftlab import RunSpec, WeightsError, resolve
from peftlab.base import fetching, models, weights
from peftlab.base.models import BaseModel

SHA = "5" * 40
ID = "nobody/tied"


class Hub(BaseHTTPRequestHandler):
    """Holds one model's files. `refuses` is an error's status and name, `cut` ends a file in its middle, `pause` slows it."""

    files: ClassVar[dict[str, bytes]] = {}
    refuses: tuple[int, str] | None = None
    moved = False
    cut = 0
    damaged = False
    pause = 0.0
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, with_body: bool) -> None:
        path = urlparse(self.path).path
        Hub.asked.append(path)
        if self.refuses:
            status, code = self.refuses
            return self._send(status, b"", {"X-Error-Code": code})
        if self.moved and ID in path:
            return self._send(307, b"", {"Location": path.replace(ID, "somebody/tied")})
        if path.startswith("/api/models/"):
            listed = self._tree() if "/tree/" in path else self._info()
            return self._send(200, json.dumps(listed).encode() if with_body else b"")
        name = path.rsplit("/", 1)[-1]
        if name not in self.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        body = self.files[name]
        told = {"X-Repo-Commit": SHA, "ETag": f'"{self._digest(name)}"', "Accept-Ranges": "bytes"}
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        sent = body[begin:]
        if self.damaged and name.endswith(".safetensors"):
            sent = b"\0" * len(sent)
        self.send_response(206 if begin else 200)
        for key, value in (told | {"Content-Length": str(len(sent))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            time.sleep(self.pause)
            if Hub.cut and name.endswith(".safetensors"):
                Hub.cut -= 1
                self.wfile.write(sent[: len(sent) // 2])
                self.close_connection = True
                return None
            self.wfile.write(sent)
        return None

    def _send(self, status: int, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | (more or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _digest(self, name: str) -> str:
        made = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1
        return made(self.files[name]).hexdigest()

    def _about(self, name: str, key: str) -> dict:
        size = len(self.files[name])
        about = {
            key: name,
            "size": size,
            "oid" if key == "path" else "blobId": hashlib.sha1(self.files[name]).hexdigest(),
        }
        large = {"oid" if key == "path" else "sha256": self._digest(name), "size": size, "pointerSize": 134}
        return (
            about
            | ({"lfs": large} if name.endswith(".safetensors") else {})
            | ({"type": "file"} if key == "path" else {})
        )

    def _info(self) -> dict:
        return {
            "id": ID,
            "modelId": ID,
            "sha": SHA,
            "siblings": [self._about(name, "rfilename") for name in self.files],
        }

    def _tree(self) -> list[dict]:
        return [self._about(name, "path") for name in self.files]

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tied_model, monkeypatch, tmp_path):
    fresh = {"refuses": None, "moved": False, "cut": 0, "damaged": False, "pause": 0.0, "asked": []}
    for name, value in fresh.items():
        monkeypatch.setattr(Hub, name, value)
    monkeypatch.setattr(Hub, "files", {file.name: file.read_bytes() for file in tied_model.iterdir() if file.is_file()})
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        constants = {
            "ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.3, "HF_HUB_ETAG_TIMEOUT": 0.3,
        }  # fmt: skip
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setitem(models.MODELS, "tied", BaseModel("tied", "Tied", 162_240, ID, config=TIED))
        yield Hub
        server.shutdown()


def fetch():
    return [told.stage for told in fetching.fetch("tied")]


def refused():
    with pytest.raises(WeightsError) as error:
        fetch()
    return str(error.value)


def forget():
    """Of this model, what peftlab itself keeps."""
    shutil.rmtree(fetching.cache())


def test_a_model_goes_into_the_hubs_own_cache_and_is_found_there_without_a_network(hub):
    assert list(dict.fromkeys(fetch())) == ["looking", "downloading", "verifying", "ready"]
    base = weights.load(resolve(RunSpec(model="tied")))
    assert sum(p.numel() for p in base.model.parameters()) == 162_240
    source = fetching.source_of(models.find("tied"))
    assert source.where.endswith(f"/{ID} at {SHA[:8]}")
    assert source.sha256 == hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    forget()
    hub.refuses, hub.asked = (503, ""), []
    assert list(dict.fromkeys(fetch())) == ["looking", "verifying", "ready"] and not hub.asked
    assert fetching.source_of(models.find("tied")).where == f"Hugging Face Hub's cache, {ID} at {SHA[:8]}"


def test_what_another_program_has_put_into_the_cache_counts(hub):
    huggingface_hub.snapshot_download(ID)
    hub.refuses = (503, "")
    assert fetch()[-1] == "ready"


def test_a_cache_that_was_emptied_or_holds_half_a_model_is_no_model(hub):
    huggingface_hub.snapshot_download(ID, allow_patterns=["*.json"])
    assert "downloading" in fetch()
    for blob in fetching.Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("blobs/*"):
        blob.unlink()
    assert fetching.source_of(models.find("tied")) is None
    assert "downloading" in fetch()


def test_a_model_that_has_moved(hub):
    hub.moved = True
    assert fetch()[-1] == "ready"


@pytest.mark.parametrize(
    "refuses, said",
    [
        ((403, "GatedRepo"), "is gated: accept its terms at .*/nobody/tied, and log in here with hf auth login"),
        ((401, "RepoNotFound"), "there is no nobody/tied, or it is private"),
        ((500, ""), "not reachable"),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(refuses, said, hub):
    hub.refuses = refuses
    assert re.search(said, refused())


def test_a_download_that_was_cut_off_goes_on_the_next_time(hub):
    hub.cut = 100
    assert "Hugging Face Hub" in refused() and fetching.source_of(models.find("tied")) is None
    hub.cut = 0
    assert fetch()[-1] == "ready"


def test_a_hub_that_is_slow_is_given_up(hub):
    hub.pause = 30.0
    begun = time.monotonic()
    assert "Hugging Face Hub" in refused() and time.monotonic() - begun < 25


def test_bytes_of_another_sha256_are_refused_and_fetched_anew(hub):
    hub.damaged = True
    assert "arrived damaged" in refused()
    hub.damaged = False
    assert fetch()[-1] == "ready"


def test_offline_is_said(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "switched off by HF_HUB_OFFLINE" in refused()
