"""The page under attack: what a visitor may send, ask for and guess. The table of who may do what is in the README."""

import json
import socket
import urllib.error
import urllib.request

import pytest
from tiny import wait_for

from peftlab.base import models
from peftlab.room import jobs

pytest.importorskip("gradio")
MARKUP = '"><img src=x onerror=alert(1)><script>alert(1)</script>'
TABS = ("memory", "lora", "live", "compare", "methods", "race")


def runs(arguments, folder, again):
    """A run that has learned something."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    yield {
        "type": "done", "steps": 1, "stopped": False, "adapter": "here", "seconds": 1.0, "tokens_per_second": 9.0,
        "device": "here", "measured_peak_bytes": None, "predicted_peak_bytes": None,
    }  # fmt: skip


@pytest.fixture
def page(room, monkeypatch):
    """The address of the whole page, served from this process."""
    from demos.live_finetune import Live
    from demos.lora_visualizer import Lora
    from demos.memory_calculator import Memory
    from demos.method_map import Methods
    from demos.method_race import Race
    from demos.page import look
    from demos.page.store import blocks
    from demos.side_by_side import Compare

    monkeypatch.setitem(jobs.WORK, "train", runs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    demo = blocks(Memory(), Lora(), Live(), Compare(), Methods(), Race())
    demo.queue(default_concurrency_limit=8)
    demo.launch(
        **look.launch_options(demo.routes), server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False
    )
    yield f"http://127.0.0.1:{port}"
    demo.close()


def get(url, body=None, **headers):
    """Status and body of a response; nothing of the address is tidied up before it is sent."""
    asked = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def answer(page, tab, kept=None, **state):
    """What a tab answers to settings that somebody made up."""
    status, html = get(page)
    config = json.loads(html.decode().split("window.gradio_config = ")[1].split(";</script>")[0])
    (carrier,) = [c["id"] for c in config["components"] if "answer" in (c["props"].get("server_fns") or ())]
    question = {"number": 1, "tab": tab, "state": state, "kept": kept or {}, "open": []}
    asked = {"data": question, "component_id": carrier, "fn_name": "answer", "session_hash": "none"}
    status, body = get(
        f"{page}/gradio_api/component_server/", json.dumps(asked).encode(), **{"Content-Type": "application/json"}
    )
    return status, body.decode()


def test_no_file_of_this_machine_is_served(page, room, tmp_path):
    secret = room.folder / "key"
    assert secret.exists()
    for path in (
        str(secret),
        "/etc/passwd",
        "app.py",
        "peftlab/room/visitors.py",
        f"..%2f..{secret}",
        str(room.folder / "jobs.sqlite"),
    ):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"):
            status, body = get(f"{page}{route}{path}")
            assert status in (400, 403, 404, 405) and secret.read_bytes() not in body and b"root:" not in body


@pytest.mark.parametrize(
    "name", ["../key", "..%2fkey", "%2e%2e/key", "a" * 5000, "0" * 64, "x.y.z", "%00", MARKUP.replace(" ", "%20")]
)
def test_no_adapter_and_no_run_is_had_by_a_made_up_name(name, page):
    for route in (
        "/gradio_api/peftlab/adapter/",
        "/gradio_api/peftlab/follow/live/",
        "/gradio_api/peftlab/follow/compare/",
    ):
        status, body = get(page + route + name)
        assert status in (400, 404) and b"onerror" not in body and b"Traceback" not in body


def test_a_run_is_watched_by_its_link_and_its_adapter_is_its_owners_alone(page, room):
    job = room.start("train", {"spec": {}}, "ann")
    wait_for(lambda: job.over)
    assert get(f"{page}/gradio_api/peftlab/follow/live/{job.id}")[0] == 200
    signed = room.signer.opens(job.id)
    assert get(f"{page}/gradio_api/peftlab/adapter/{signed}")[0] == 200
    for forged in (
        job.id,
        signed[:-1] + ("0" if signed[-1] != "0" else "1"),
        room.signer.sign("ann"),
        room.signer.sign(job.id),
    ):
        assert get(f"{page}/gradio_api/peftlab/adapter/{forged}")[0] == 404
    for visitor in (room.signer.sign("bob"), signed, "ann", "", None, 3, {"ann": 1}):
        shown = answer(page, "live", {"visitor": visitor, "run": job.id})[1]
        assert signed not in shown and "peftlab/adapter/" not in shown
    assert "peftlab/adapter/" in answer(page, "live", {"visitor": room.signer.sign("ann"), "run": job.id})[1]


@pytest.mark.parametrize("tab", TABS)
def test_markup_in_any_setting_is_text(tab, page):
    from peftlab.spec import SETTINGS

    for name in (*SETTINGS, "adapter", "prompt", "run", "values", "guess", "preset", "lesson", "config", "nonsense"):
        status, body = answer(page, tab, {"visitor": MARKUP, "run": MARKUP, "studied": MARKUP}, **{name: MARKUP})
        shown = [update for update in json.loads(body).get("show", {}).values() if isinstance(update, dict)]
        assert status == 200
        for value in (str(update.get("value")) for update in shown):  # a control has the text as it was typed
            assert "<img src=x" not in value or value == MARKUP, name


@pytest.mark.parametrize(
    "model",
    [
        "http://169.254.169.254/latest",
        "//evil.example/x",
        "https:evil/x",
        "file:///etc/passwd",
        "evil.example@x/y",
        "a/b/../../c",
        "a\nb/c",
    ],
)
def test_a_model_that_is_no_name_asks_nobody(model, page, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "_asked", lambda *what: asked.append(what))
    status, body = answer(page, "memory", model=model)
    assert status == 200 and json.loads(body)["problems"] and not asked


def test_what_is_too_large_or_no_question_at_all_is_refused_and_the_page_goes_on(page):
    route = f"{page}/gradio_api/component_server/"
    json_type = {"Content-Type": "application/json"}
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"data": 3}',
        b"[" * 100_000,
        b'{"data": {"state": {"steps": "' + b"9" * 2_000_000 + b'"}}}',
    ):
        status, said = get(route, body, **json_type)
        assert 400 <= status < 600 and b"Traceback" not in said and b"/peftlab/" not in said
    assert answer(page, "memory", steps="9" * 100_000)[0] == 200
    assert get(page)[0] == 200


def test_an_upload_is_bounded_and_lies_under_no_guessable_name(page):
    border = b"border"
    part = (
        b'--border\r\nContent-Disposition: form-data; name="files"; filename="../../x.html"\r\n\r\n%s\r\n--border--\r\n'
    )
    kind = {"Content-Type": f"multipart/form-data; boundary={border.decode()}"}
    assert get(f"{page}/gradio_api/upload", part % (b"x" * 6_000_000), **kind)[0] in (400, 413)
    status, body = get(f"{page}/gradio_api/upload", part % b"<script>alert(1)</script>", **kind)
    if status == 200:
        (path,) = json.loads(body)
        assert ".." not in path and len(path.split("/")[-2]) >= 32
