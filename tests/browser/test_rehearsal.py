"""A Space as `peftlab deploy` writes it, rehearsed: its requirements in a fresh environment, its user, folders and addresses."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("playwright")
from playwright.sync_api import expect
from space import HOME, Around, Space, apart, can_be_made
from zerogpu import Device, token

from peftlab import hardware
from peftlab import space as spaces
from peftlab.base.fetching import folder_of
from peftlab.base.models import DEFAULT, MODELS

pytestmark = pytest.mark.skipif(not can_be_made(), reason="this machine lets nobody make a user namespace")
APP, ENV, CACHE = HOME / "app", HOME / "env", HOME / ".cache" / "peftlab"
HERE = "l4x1" if hardware.here().device == "cuda" else "cpu-basic"
TESTS = Path(__file__).resolve().parents[1]
SHORT = "?tab=live&task=intent&steps=2&batch_size=1"  # the task of the shortest answers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The cache that the default model is in, once it is fetched."""
    subprocess.run([sys.executable, "-m", "peftlab", "fetch", DEFAULT], check=True, capture_output=True)
    return folder_of(MODELS[DEFAULT]).parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder for each hardware."""
    made = {}
    for kind in (HERE, "zero-a10g"):
        made[kind] = tmp_path_factory.mktemp(kind) / "space"
        spaces.write(spaces.Space("ann/peftlab", kind), made[kind])
    return made


@pytest.fixture(scope="module")
def environment(written, tmp_path_factory):
    """A fresh environment with the Space's requirements; with this machine's torch, whose own index is not asked."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    lines = (written[HERE] / "requirements.txt").read_text().splitlines()
    torch = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__.split('+')[0])"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    lines = [re.sub(r"^torch==.*", f"torch=={torch}", line) for line in lines if not line.startswith("--")]
    lines.append("spaces")  # which the Hub adds on ZeroGPU
    listed = folder.parent / "requirements.txt"
    listed.write_text("\n".join(lines))
    subprocess.run([folder / "bin" / "pip", "install", "-q", "-r", listed], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def start(model, written, environment, tmp_path):
    """Starts the Space for a hardware, with more in its environment."""
    running = []

    def go(kind: str, *command: str, **more: str) -> Space:
        seen = {APP: written[kind], ENV: environment, CACHE: model, HOME / "tests": TESTS}
        python = str(ENV / "bin" / "python")
        one = Space(apart([python, *(command or ["app.py"])], seen, APP), tmp_path / "log", more)
        running.append(one)
        one.answers()
        return one

    yield go
    for one in running:
        if one.process.poll() is None:
            one.end()


@pytest.fixture
def around():
    """Puts a proxy and a page around a Space."""
    made = []

    def go(space: Space) -> Around:
        made.append(Around(space.url))
        return made[-1]

    yield go
    for one in made:
        one.close()


def trained(page) -> None:
    expect(page.locator(".chip")).to_contain_text("is ready", timeout=120_000)
    page.get_by_role("button", name=re.compile("^Train( again)?$")).click()
    expect(page.locator("#live-bar")).to_contain_text("in all.", timeout=120_000)
    expect(page.locator("#live-keep")).to_be_visible()


def test_in_a_frame_of_another_site_and_rendered_on_the_server(start, around, chromium):
    space = start(HERE, GRADIO_SSR_MODE="True")
    assert "with SSR" in space.log.read_text()
    outside = around(space).framed(space.url + SHORT)
    context = chromium.new_context(viewport={"width": 1440, "height": 1000})
    page, asked, errors = context.new_page(), set(), []
    page.on("request", lambda request: asked.add(request.url.split("/")[2]))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.goto(outside)
    inside = page.frame_locator("iframe")
    trained(inside)
    inside.get_by_role("radio", name="The old sea captain").click()
    page.wait_for_function("told.some(({queryString}) => queryString?.includes('task=voice'))")
    inside.locator("#live-share button").click()
    expect(inside.locator("#live-share button")).to_have_text("Copied")
    page.reload()
    expect(inside.get_by_role("button", name="Train again")).to_be_visible(timeout=30_000)
    with page.expect_download() as file:
        inside.locator("#live-keep").click()
    assert file.value.suggested_filename.endswith(".zip") and Path(file.value.path()).stat().st_size > 100_000
    assert asked == {outside.split("/")[2], space.url.split("/")[2]}
    assert not [said for said in errors if "BodyStreamBuffer" not in said]
    context.close()


def test_behind_a_prefix_where_gradio_cannot_render_on_the_server(start, around, open_page):
    space = start(HERE, GRADIO_SSR_MODE="True", GRADIO_ROOT_PATH=Around.PREFIX)
    page = open_page(around(space).prefixed)
    expect(page.locator(".sentence:visible")).to_contain_text("GB")
    expect(page.locator(".chip")).to_contain_text("are forgotten when", timeout=120_000)
    page.get_by_role("tab", name="Race").click()
    expect(page.locator(".sentence:visible")).to_contain_text("racers")


def test_told_to_end_it_keeps_the_run_and_leaves_no_process(start, open_page):
    space = start(HERE, GRADIO_SSR_MODE="True")
    page = open_page(space.url + "?tab=live&steps=500")
    expect(page.locator(".chip")).to_contain_text("is ready", timeout=120_000)
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.locator("#live-bar")).to_contain_text(re.compile(r"step \d+ of 500"), timeout=60_000)
    page.goto("about:blank")
    began = time.monotonic()
    assert space.end() == 0 and time.monotonic() - began < 10
    for _ in range(50):
        if subprocess.run(["pgrep", "-g", str(space.process.pid)], capture_output=True).returncode:
            break
        time.sleep(0.1)
    else:
        raise AssertionError(subprocess.run(["ps", "-ef"], capture_output=True, text=True).stdout)


def test_by_itself_and_drawn_in_the_browser(start, open_page):
    space = start(HERE, GRADIO_SSR_MODE="False")
    assert "with SSR" not in space.log.read_text()
    page = open_page(space.url)
    expect(page.locator(".sentence:visible")).to_contain_text("GB")
    page.get_by_role("tab", name="Race").click()
    expect(page.locator(".sentence:visible")).to_contain_text("racers")
    assert page.request.get(f"{space.url}gradio_api/file={APP}/app.py").status == 403


def test_on_a_shared_gpu(start, open_page):
    with Device(slower=30) as device:
        space = start("zero-a10g", str(HOME / "tests" / "browser" / "zerogpu.py"), str(APP), **device.environment)
        page = open_page(space.url + SHORT, headers={"X-IP-Token": token("ann")})
        expect(page.locator("#live-cost")).to_contain_text("of your GPU time")
        expect(page.locator("#live-cost a")).to_have_attribute("href", re.compile("login.*spaces%2Fann%2Fpeftlab"))
        expect(page.locator(".chip")).to_contain_text("is ready", timeout=60_000)
        page.get_by_role("button", name="Train", exact=True).click()
        expect(page.get_by_role("button", name="Train again")).to_be_enabled(timeout=120_000)
        # Two cores may take longer for it than a GPU is lent, which ends it in words.
        expect(page.locator("body")).to_contain_text(re.compile(r"in all\.|which is the most that a run may take"))
        (call,) = device.calls
        assert call["visitor"] == "ann" and not call["killed"] and call["used"] > 0


def steps_of(dockerfile: Path) -> list[tuple[str, str]]:
    """Its instructions with their arguments."""
    lines = dockerfile.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def test_the_containers_steps_make_a_page_that_writes_to_its_volume_alone(environment, model, tmp_path):
    """No image can be built here: its base and its user are this machine's, what it installs is the fresh environment."""
    steps = steps_of(TESTS.parent / "Dockerfile")
    made, settings, volumes, last = tmp_path / "app", {}, [], {}
    made.mkdir()
    for name, said in steps:
        if name == "COPY":
            *sources, target = said.split()
            for source in sources:
                copy = shutil.copytree if (TESTS.parent / source).is_dir() else shutil.copy
                copy(TESTS.parent / source, made / target)
        elif name == "ENV":
            settings |= dict(pair.split("=", 1) for pair in said.split())
        elif name == "VOLUME":
            volumes.append(Path(said))
        last[name] = said
    assert last["USER"] == "user" and "--uid 1000 user" in " ".join(said for name, said in steps if name == "RUN")
    assert {"peftlab", "demos"} <= {file.name for file in made.iterdir()} and Path(settings["PEFTLAB_DATA"]) in volumes
    python = {"python": str(ENV / "bin" / "python")}
    command = [python.get(word, word) for word in json.loads(last["CMD"])]
    seen = {APP: made, ENV: environment, Path(settings["PEFTLAB_CACHE"]): model}
    space = Space(apart(command, seen, APP, volumes), tmp_path / "log", settings)
    try:
        assert json.loads(space.answers())["status"] == "ok"
        check = json.loads(last["HEALTHCHECK"].split("CMD ")[1])
        assert not subprocess.run([sys.executable, *check[1:]], capture_output=True).returncode
    finally:
        assert space.end() == 0
    assert subprocess.run([sys.executable, *check[1:]], capture_output=True).returncode
