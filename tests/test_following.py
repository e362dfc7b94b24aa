"""What pages fetch of a run beside Gradio's own: its picture as it changes, and the adapter by its owner's link."""

import asyncio
import io
import json
import zipfile

import pytest

pytest.importorskip("gradio")

from starlette.applications import Starlette
from starlette.testclient import TestClient
from tiny import wait_for

from demos.live_finetune import Live
from demos.page import served
from peftlab import adapters
from peftlab.room import jobs
from peftlab.run.events import standing
from peftlab.show import runs


def step(n):
    return {"type": "step", "step": n, "steps": 9, "loss": 1.0, "seconds": 0.1, "eta_seconds": 1.0, "examples": n}


def draw(job):
    """As much of a picture as can be told apart."""
    draw.times += 1
    return {"bar": f"{len(job.events)} events", "sentence": lambda: "the same"}


@pytest.fixture
def client():
    draw.times = 0
    return TestClient(Starlette(routes=[served.follow_route("live", "train", draw), served.adapters_route()]))


@pytest.fixture
def job(room, monkeypatch):
    """A run in whose hands the test is: an event that is put into it is told."""
    told = asyncio.Queue()

    def trains(arguments, folder, again):
        while True:
            wait_for(lambda: not told.empty())
            yield (event := told.get_nowait())
            if event["type"] == "done":
                return

    monkeypatch.setitem(jobs.WORK, "train", trains)
    made = room.start("train", {"spec": {}}, "ann")
    made.put_in = told.put_nowait
    yield made
    told.put_nowait({"type": "done", "steps": 0})


def messages(text):
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: ")]


def test_who_follows_gets_what_changes_and_hears_when_it_is_over(job, client, monkeypatch):
    monkeypatch.setattr(served, "LOOK", 0.02)

    async def look():
        got = []
        async for part in served.follow(job, draw, "live"):
            got.append(part)
            if len(got) == 1:
                job.put_in(step(1))
            if len(got) == 2:
                job.put_in({"type": "done", "steps": 1})
        return got

    got = asyncio.run(look())
    assert got[-1].startswith("event: over")
    first, *rest = messages("".join(got[:-1]))
    assert set(first) == {"live.bar", "live.sentence"} and all(set(one) == {"live.bar"} for one in rest)
    assert rest[-1]["live.bar"]["value"] == "3 events" and not served._followed
    again = client.get(f"/gradio_api/peftlab/follow/live/{job.id}")  # a page that comes back later sees all of it
    assert messages(again.text)[0]["live.bar"]["value"] == "3 events" and "event: over" in again.text
    assert again.headers["content-type"].startswith("text/event-stream")
    assert client.get("/gradio_api/peftlab/follow/live/ticket-lora-0").status_code == 404
    job.kind = "score"
    assert client.get(f"/gradio_api/peftlab/follow/live/{job.id}").status_code == 404


def test_two_tabs_that_follow_one_job_each_get_their_own_picture(job, monkeypatch):
    monkeypatch.setattr(served, "LOOK", 0.02)
    draw.times = 0

    async def look():
        compared, live = (served.follow(job, draw, tab) for tab in ("compare", "live"))
        pictures = messages(await anext(compared)), messages(await anext(live))
        await compared.aclose()
        await live.aclose()
        return pictures

    (compared,), (live,) = asyncio.run(look())
    assert set(compared) == {"compare.bar", "compare.sentence"} and set(live) == {"live.bar", "live.sentence"}


def test_two_hundred_followers_cost_one_picture_and_one_that_never_reads_costs_nothing(job, monkeypatch):
    monkeypatch.setattr(served, "LOOK", 0.05)
    draw.times = 0

    async def look():
        async def one():
            return [part async for part in served.follow(job, draw, "live")]

        sleeper = served.follow(job, draw, "live")
        await anext(sleeper)  # then it reads no more
        watching = [asyncio.create_task(one()) for _ in range(200)]
        for n in range(1, 6):
            job.put_in(step(n))
            await asyncio.sleep(0.1)
        job.put_in({"type": "done", "steps": 5})
        got = await asyncio.gather(*watching)
        await sleeper.aclose()
        return got

    got = asyncio.run(look())
    assert len({messages("".join(parts))[-1]["live.bar"]["value"] for parts in got}) == 1
    assert draw.times <= 12 and not served._followed


def test_an_adapter_is_fetched_by_a_signed_link_alone(trained_here, client):
    job = trained_here(adapters.bundled()[-1].folder, "ann")
    link = served.download(job)
    fetched = client.get("/" + link.url)
    assert fetched.status_code == 200 and "attachment" in fetched.headers["content-disposition"]
    assert adapters.TENSORS in zipfile.ZipFile(io.BytesIO(fetched.content)).namelist()
    for other in (job.id, f"{job.id}.{'0' * 32}", link.url.split("/")[-1][:-1], "..%2Fkey"):
        assert client.get(f"/gradio_api/peftlab/adapter/{other}").status_code == 404


def test_the_live_tabs_picture_can_be_sent(job):
    job.put_in({"type": "loading", "model": "Tiny"})
    wait_for(lambda: len(job.events) == 2)
    (route, *_) = Live().routes()
    assert route.path == "/gradio_api/peftlab/follow/live/{job}"
    shown = served.Followed(job, lambda one: runs.shown(one, one.spec), "live")._drawn()
    assert {"live.sentence", "live.bar", "live.loss", "live.metric", "live.said"} <= set(shown)
    assert "loading" in json.loads(shown["live.bar"])["value"]


def test_what_a_run_does_again_after_it_was_interrupted_is_seen_once():
    before = {"type": "eval", "when": "before", "step": 0}
    during = {"type": "eval", "when": "during", "step": 3}
    first = [{"type": "queued"}, before, step(1), step(2), step(3), during, step(4)]
    on = {"type": "resumed", "step": 2}
    assert standing([*first, on]) == [*first, on]  # until it has taken a step
    assert standing([*first, on, step(3)]) == [{"type": "queued"}, before, step(1), step(2), on, step(3)]
    assert standing([*first, on, step(3), during])[-1] == during
    anew = [*first, {"type": "resumed", "step": 0}, before, step(1)]
    assert [e["step"] for e in standing(anew) if e["type"] in ("step", "eval")] == [0, 1]
