"""What everybody gets alike is made once: the right bytes for each, and nothing of a visitor's own."""

import os
import re
from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio")
import httpx

from demos.page import look, serving

CALLS = []


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    (folder / "chart.js").write_text("// one\n" * 100)
    gr.set_static_paths([folder])
    return folder


@pytest.fixture(scope="module")
def page(static):
    def answer(question):
        CALLS.append(question)
        if question == "fails":
            raise ValueError("no")
        return {"asked": question, "numbers": (1, float("nan"))}

    async def exact(question):
        return [question]

    def with_request(question, request: gr.Request):
        return [question, bool(request.headers)]

    def finished(question):
        return {"made by": "Gradio"}

    def known(question):
        if question == "breaks":
            raise ValueError("no")
        return b'{"known":1}' if question == "known" else None

    vars(finished)["in_bytes"] = serving.InBytes(known, lambda question: b'{"made":1}')
    with gr.Blocks(title="tiny") as demo:
        gr.HTML("", js_on_load="1", server_functions=[answer, exact, with_request, finished])
    demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, **serving.options())
    with httpx.Client(base_url=demo.local_url.rstrip("/")) as client:
        yield SimpleNamespace(get=client.get, post=client.post, demo=demo, client=client)
    demo.close()


def asset(page):
    return re.search(r"\./(assets/index-[^\"]+\.js)", page.get("/").text)[1]


def root(response):
    return re.search(r'"root":"([^"]*)"', response.text)[1]


@pytest.mark.parametrize(
    ("accepted", "sent"),
    [
        ("gzip, deflate, br, zstd", "br"),
        ("gzip", "gzip"),
        ("gzip;q=1.0, br;q=0", "gzip"),
        ("identity", None),
        ("", None),
    ],
)
def test_everybody_gets_the_bytes_in_an_encoding_that_they_accept(page, accepted, sent):
    plain = page.get("/", headers={"Accept-Encoding": "identity"})
    for path in ("/", "/config", "/theme.css"):
        response = page.get(path, headers={"Accept-Encoding": accepted})
        assert response.headers.get("content-encoding") == sent
        assert response.headers["vary"] == "Accept-Encoding"
        assert response.content and int(response.headers["content-length"]) == response.num_bytes_downloaded
    assert page.get("/", headers={"Accept-Encoding": accepted}).content == plain.content
    assert plain.text.rstrip().endswith("</html>") and "gradio_config" in plain.text


def test_it_is_what_gradio_sends(page, monkeypatch):
    ours = {path: page.get(path) for path in ("/", "/config", "/theme.css", "/manifest.json", "/" + asset(page))}
    monkeypatch.setattr(serving, "is_open", lambda app: False)
    for path, response in ours.items():
        theirs = page.get(path)
        assert response.content == theirs.content and response.headers["content-type"] == theirs.headers["content-type"]


def test_a_link_with_settings_shows_the_same_page_made_once(page, monkeypatch):
    first, made = page.get("/"), []
    monkeypatch.setattr(serving, "kept", lambda *of: made.append(of))
    for query in ("?rank=3", "?tab=memory&model=gpt2", "?__theme=dark", "?%20=&&x"):
        assert page.get("/" + query).content == first.content
    assert not made
    monkeypatch.undo()
    assert "tiny" in page.get("/?deep_link=abc").text and "etag" not in page.get("/?deep_link=abc").headers


def test_a_page_says_the_address_at_which_it_is_reached(page):
    plain = root(page.get("/"))
    behind = {"X-Forwarded-Host": "me.hf.space", "X-Forwarded-Proto": "https"}
    for _ in range(2):
        assert root(page.get("/", headers=behind)) == "https://me.hf.space"
        assert root(page.get("/", headers={"X-Forwarded-Host": "me.hf.space"})) == "http://me.hf.space"
        assert root(page.get("/", headers={"Host": "other:81"})) == "http://other:81"
        assert root(page.get("/")) == plain
    for i in range(40):
        assert root(page.get("/", headers={"Host": f"h{i}"})) == f"http://h{i}"


def test_a_returning_browser_gets_304(page):
    for path in ("/", "/" + asset(page)):
        etag = page.get(path).headers["etag"]
        again = page.get(path, headers={"If-None-Match": f'"x", {etag}'})
        assert again.status_code == 304 and not again.content and again.headers["etag"] == etag
        assert page.get(path, headers={"If-None-Match": '"x"'}).status_code == 200
        gzipped = page.get(path, headers={"Accept-Encoding": "gzip"}).headers["etag"]
        assert gzipped != etag
    assert "immutable" in page.get("/" + asset(page)).headers["cache-control"]
    assert page.get("/").headers["cache-control"] == "no-cache"


def test_a_changed_file_is_sent_anew(page, static):
    path = f"/gradio_api/file={static / 'chart.js'}"
    before = page.get(path)
    assert before.headers["content-encoding"] == "br" and before.text.startswith("// one")
    (static / "chart.js").write_text("// two\n" * 100)
    os.utime(static / "chart.js", ns=(1, 1))
    after = page.get(path, headers={"If-None-Match": before.headers["etag"]})
    assert after.status_code == 200 and after.text.startswith("// two")
    (static / "chart.js").unlink()
    assert page.get(path).status_code == 403


def test_what_is_a_visitors_own_or_a_secret_is_left_to_gradio(page, static, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    around = f"{static}/../{tmp_path.name}/secret.txt"
    for path in (f"/gradio_api/file={tmp_path / 'secret.txt'}", f"/gradio_api/file={around}", "/assets/../../app.py"):
        assert page.get(path).status_code in (403, 404)
    assert page.get("/assets/none.js").status_code == 404
    assert serving.on_disk("/gradio_api/file=/tmp/gradio/x.txt") is None
    assert serving.on_disk("/gradio_api/queue/data") is None and serving.on_disk("/login") is None
    ranged = page.get("/" + asset(page), headers={"Range": "bytes=0-9", "Accept-Encoding": "identity"})
    assert ranged.status_code == 206 and len(ranged.content) == 10
    assert page.client.head("/").status_code == 200


def test_nothing_is_kept_where_people_log_in(page, monkeypatch):
    monkeypatch.setattr(page.demo.app, "auth", {"me": "secret"})
    response = page.get("/")
    assert "auth_required" in response.text and "etag" not in response.headers
    assert ask(page, "answer", 1).status_code == 401


def ask(page, function, question, **more):
    carrier = next(key for key, block in page.demo.blocks.items() if hasattr(block, "answer"))
    asked = {"data": question, "fn_name": function, "component_id": carrier, "session_hash": "s"} | more
    return page.post("/gradio_api/component_server/", json=asked)


def test_a_question_is_answered_each_time_and_as_gradio_does(page, monkeypatch):
    CALLS.clear()
    for _ in range(2):
        ours = ask(page, "answer", {"a": ["ü"]})
        assert ours.json() == {"asked": {"a": ["ü"]}, "numbers": [1, None]} and len(CALLS)
    assert len(CALLS) == 2 and "cache-control" not in ours.headers
    assert ask(page, "exact", 5).json() == [5]
    assert not page.demo.app.state_holder.session_data
    monkeypatch.setattr(serving, "is_open", lambda app: False)
    assert ask(page, "answer", {"a": ["ü"]}).json() == ours.json()


def test_an_answer_that_is_kept_is_sent_as_it_is(page, monkeypatch):
    for question, sent in (("known", '{"known":1}'), ("other", '{"made":1}')):
        response = ask(page, "finished", question)
        assert response.text == sent and response.headers["content-type"] == "application/json"
    assert ask(page, "finished", "breaks").json() == {"made by": "Gradio"}
    monkeypatch.setattr(serving, "is_open", lambda app: False)
    assert ask(page, "finished", "known").json() == {"made by": "Gradio"}


def test_the_pages_own_scripts_are_files_that_are_kept():
    """Also where the libraries stand behind a link."""
    (address,) = re.findall(r'<script defer src="([^"]+)"', look.launch_options()["head"])
    assert serving.on_disk(f"/{address}").is_file()


def test_what_is_not_a_plain_question_goes_to_gradio(page):
    assert ask(page, "with_request", 1).json()[0] == 1
    assert ask(page, "nosuch", 1).status_code == 404
    assert ask(page, "__init__", 1).status_code == 404
    assert ask(page, "answer", "x" * (serving.QUESTION + 1)).json()["asked"] == "x" * (serving.QUESTION + 1)
    assert page.post("/gradio_api/component_server/", content=b"{").status_code == 400
    CALLS.clear()
    assert ask(page, "answer", "fails").status_code == 500
    assert CALLS == ["fails"]


def test_a_fault_here_leaves_the_page_to_gradio(page, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(serving, "kept", broken)
    response = httpx.get(page.demo.local_url, headers={"Host": "new"})
    assert response.status_code == 200 and "gradio_config" in response.text


def test_a_session_begins_without_describing_every_component(page):
    state = page.demo.app.state_holder["new"]
    assert state.config_values == {} and len(state.blocks_config.blocks) == len(page.demo.blocks)
