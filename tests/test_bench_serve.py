"""`bench serve` with two visitors; how its figures are made."""

import asyncio
import itertools
import json
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from peftlab import PeftlabError
from peftlab.bench import clicks, held, serve, visitors
from peftlab.bench.visitors import Connection, Page
from peftlab.measured import documents

PAGE = """
import gradio as gr

def answer(question):
    return {"number": question["number"], "show": question["state"] or {"opens": 1}}

async def exact(question):
    return answer(question)

with gr.Blocks() as demo:
    state = gr.HTML("", js_on_load="server.exact({})", server_functions=[answer, exact])
    gr.Timer(1).tick(lambda: "", None, state)
    gr.Dropdown(["a", "b"])
demo.launch()
"""
"""A page with all that a visitor meets on ours: answers, traces and a timer."""


def test_two_visitors_of_a_small_page_and_of_the_bare_app(tmp_path, monkeypatch):
    (tmp_path / "page.py").write_text(PAGE)
    monkeypatch.setattr(serve, "APPS", serve.APPS | {"peftlab": tmp_path / "page.py"})
    monkeypatch.setattr(clicks, "PAUSE", 0.2)
    said = []
    monkeypatch.setattr(serve, "CLICKS_ALONE", 24)
    monkeypatch.setattr(serve, "ARRIVALS_ALONE", 6)
    document = serve.record_serve(tmp_path / "serve.json", said.append, [2], 1.0, 1, ["spread"])
    assert json.loads((tmp_path / "serve.json").read_text()) == document
    assert document["kind"] == "serve" and document["command"] and document["date"]
    rows = {(row["app"], row["arriving"]): row for row in document["rows"]}
    assert all(0 < of["click"] < 1 and of["arrival"] > 0 for of in document["alone"].values())
    assert set(rows) == {("bare", "spread"), ("peftlab", "spread")} and len(said) == 4
    for row in rows.values():
        assert row["visitors"] == row["arrivals"]["count"] == 2 and row["clicks"]["count"] >= 4
        assert [row[what]["errors"] for what in ("arrivals", "clicks", "own_events", "traces")] == [0] * 4
        assert 0 < row["clicks"]["median"] <= row["clicks"]["p95"] <= row["clicks"]["most"] < 30
        memory = row["memory_bytes"]
        assert memory["first"] > 2**20 and memory["after_warm_up"]["last"] > 2**20 and row["processor_seconds"] > 0
        assert memory["course"][0][1] > 2**20 and len(memory["course"]) <= held.POINTS
    assert rows["peftlab", "spread"]["requests_an_arrival"] > rows["bare", "spread"]["requests_an_arrival"] > 25
    assert rows["peftlab", "spread"]["traces"]["count"] > 0 and rows["peftlab", "spread"]["own_events"]["count"] == 2


def test_an_app_that_does_not_start_is_said(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such thing')")
    monkeypatch.setattr(serve, "APPS", {"bare": broken})
    with pytest.raises(PeftlabError, match=r"broken\.py did not start: no such thing"):
        serve.record_serve(tmp_path / "serve.json", print, visitors=[1], seconds=1, rounds=1)


def test_figures():
    times = clicks.Times([float(i) for i in range(1, 101)], ["lost"])
    assert times.summary() == {
        "median": 50.5, "p95": 96.0, "most": 100.0, "count": 100, "errors": 1, "first_error": "lost",
    }  # fmt: skip
    assert clicks.Times().summary()["median"] is None


def test_memory_is_told_after_the_warm_up():
    """Here it grows for the first third of twenty minutes, and then it does not."""
    samples = [(float(t), min(t, 400) * 1000 + t % 2) for t in range(1200)]
    said = held.summary(samples)
    assert said["first"] == 0 and said["most"] == 400_001 and said["last"] == 400_001
    about = said["after_warm_up"]
    assert about["seconds"] == pytest.approx(799, abs=1) and abs(about["a_minute"]) < 60
    assert about["first"] == pytest.approx(about["last"], abs=1)
    assert len(said["course"]) == held.POINTS and said["course"][0][1] < 20_000 < 400_000 <= said["course"][-1][1]
    assert held.slope([(0, 100), (30, 150), (60, 200)]) == pytest.approx(100)
    assert held.slope([(0, 100), (1, 100)]) is None and held.summary([])["course"] == []
    growing = held.summary([(float(t), 1000 * t) for t in range(60)])["after_warm_up"]
    assert growing["a_minute"] == pytest.approx(60_000) and growing["last"] > growing["first"]


def test_a_visitor_keeps_its_token_and_fetches_what_the_pages_scripts_do(monkeypatch):
    answers = [{"number": 1, "show": {"a": 1}, "visitor": "token"}, {"number": 2, "show": {"a": 1}}, {"number": 9}]
    page = Page((), (), 5, True, {})
    visitor = clicks.Visitor(SimpleNamespace(port=1), page, clicks.Crowd(), random.Random(0))
    sent = []

    async def post(path, content, connection):
        sent.append(content["data"]["kept"])
        return json.dumps(answers[len(sent) - 1]).encode()

    monkeypatch.setattr(visitor, "post", post)
    asyncio.run(visitor.ask("answer"))
    asyncio.run(visitor.ask("answer"))
    with pytest.raises(ValueError, match="not an answer to question 3"):
        asyncio.run(visitor.ask("answer"))
    assert sent == [{}, {"visitor": "token"}, {"visitor": "token"}]
    assert visitors._fetched({"js_on_load": "await fetch('gradio_api/peftlab/base', {method}); prefetch('no')"}) == [
        "gradio_api/peftlab/base"
    ]
    assert visitors._fetched({"js_on_load": None}) == []


@pytest.mark.parametrize(
    "answer", ["content-length: 2\r\n\r\nok", "transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"]
)
def test_a_connection_is_kept_and_opened_again_when_the_server_closed_it(answer):
    opened = []

    async def serves(reader, writer):
        opened.append(writer)
        while await reader.readline():
            while (await reader.readline()).strip():
                pass
            writer.write(f"HTTP/1.1 200 OK\r\n{answer}".encode())
            if len(opened) == 1 and len(asked) == 2:
                writer.close()
                return

    asked = []

    async def asks():
        server = await asyncio.start_server(serves, "127.0.0.1", 0)
        connection = Connection(server.sockets[0].getsockname()[1])
        for _ in range(4):
            asked.append(await connection.ask("GET", "/"))
        connection.close()
        server.close()

    asyncio.run(asks())
    assert asked == [(200, b"ok")] * 4 and len(opened) == 2


def test_what_is_lost_on_the_way_counts_as_an_error():
    async def serves(reader, writer):
        await reader.readline()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
        writer.close()

    async def asks(times):
        server = await asyncio.start_server(serves, "127.0.0.1", 0)
        with times.one():
            await Connection(server.sockets[0].getsockname()[1]).ask("GET", "/")
        server.close()

    times = clicks.Times()
    asyncio.run(asks(times))
    assert not times.seconds and "IncompleteReadError" in times.errors[0]


def test_recorded_visitors_wait_no_longer_than_twice_as_long_as_at_a_bare_app():
    (document,) = [one for one in documents("serve") if one["file"] == "serve-cpu.json"]
    rows = {(row["app"], row["visitors"], row["arriving"]): row for row in document["rows"]}
    for (app, people, arriving), row in rows.items():
        assert [row[what]["errors"] for what in ("arrivals", "clicks", "own_events", "traces")] == [0] * 4
        if app == "peftlab" and people == 50:
            bare = rows["bare", people, arriving]
            for what, figure in itertools.product(("arrivals", "clicks"), ("median", "p95")):
                assert row[what][figure] <= 2 * bare[what][figure], (arriving, what, figure)
            assert row["traces"]["count"] > 0
    assert {people for _, people, _ in rows} == {found["visitors"] for found in document["followed"]} == {50, 200}
    for found in document["followed"]:
        assert found["saw_the_end"] == found["visitors"] and found["late"]["errors"] == found["clicks"]["errors"] == 0


def test_the_recorded_memory_of_a_server_stays_flat():
    (document,) = [one for one in documents("serve") if one["file"] == "serve-memory-cpu.json"]
    (row,) = [row for row in document["rows"] if row["app"] == "peftlab"]
    settled = row["memory_bytes"]["after_warm_up"]
    assert document["seconds"] >= 1200 and settled["seconds"] >= 780 and row["visitors"] == 50
    assert settled["last"] / settled["first"] - 1 <= 0.03
