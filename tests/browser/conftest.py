"""Starts the app as a person would, `python app.py`, and opens it in Debian's Chromium."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REAL_CACHE = os.environ.get("PEFTLAB_CACHE")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.browser)


class App:
    """A running app: its address, and the processor's seconds until it answered, which others on the machine do not stretch."""

    def __init__(self, cache: str | None, folder: Path, program: Path = ROOT / "app.py", *arguments: str) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if k not in ("PEFTLAB_CACHE", "HF_HUB_OFFLINE")}
        environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": str(ROOT)}
        environment |= {"PEFTLAB_DATA": str(folder / "data")}
        environment |= {"PEFTLAB_CACHE": cache} if cache else {}
        self.url = f"http://127.0.0.1:{port}/"
        self.log = folder / "app.log"
        begun = time.monotonic()
        command, log = [sys.executable, str(program), *arguments], self.log.open("w")
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while time.monotonic() - begun < 90:
            try:
                if urllib.request.urlopen(self.url, timeout=2).status == 200:
                    break
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        self.seconds_to_answer = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="session")
def chromium():
    if CHROMIUM is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium is missing and CI must run the browser tests: apt-get install chromium")
        pytest.skip("Chromium is missing: apt-get install chromium to run the browser tests")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=20_000)  # on a busy machine an answer is late, not wrong
    with sync_playwright() as p:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def app(chromium, tmp_path_factory) -> Iterator[App]:
    running = App(REAL_CACHE, tmp_path_factory.mktemp("app"))
    yield running
    running.end()


@pytest.fixture(scope="module")
def tiny_app(chromium, tmp_path_factory) -> Iterator[App]:
    """The app over a tiny model, which trains in seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    running = App(None, folder, ROOT / "tests" / "browser" / "tiny_app.py", str(folder))
    yield running
    running.end()


@pytest.fixture
def open_page(chromium):
    """Opens an address at a size and theme; at the end of the test, any console error fails it.

    Gradio's own stream, which a page that is left or loaded anew breaks off, is none.
    """
    contexts, errors = [], []

    def go(url: str, size=(1440, 900), theme="light", headers=None):
        viewport = {"width": size[0], "height": size[1]}
        context = chromium.new_context(viewport=viewport, color_scheme=theme, extra_http_headers=headers)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)) if "BodyStreamBuffer was aborted" not in str(e) else None)
        page.goto(url)
        page.wait_for_selector(".sentence >> visible=true")
        page.wait_for_timeout(1500)  # the first tab's own refresh
        return page

    yield go
    for context in contexts:
        context.close()
    assert not errors
