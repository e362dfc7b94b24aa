"""`bench room`: its visitors at a server of this process, what it takes for another's message, and its small models."""

import asyncio
import json
import os
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny import wait_for

from peftlab import PeftlabError, RunSpec, SpecError, adapters, resolve
from peftlab.base import models
from peftlab.bench import browser, clicks, crowd, following, kills, small, steady
from peftlab.bench import room as strain
from peftlab.bench.clicks import Times
from peftlab.bench.visitors import look as looked
from peftlab.data import tasks
from peftlab.measured import documents
from peftlab.room import jobs
from peftlab.run import train

pytest.importorskip("gradio")


def runs(arguments, folder, again):
    """A run whose losses tell whose it is."""
    spec = arguments["spec"]
    yield {
        "type": "start",
        "spec": spec,
        "metric": "exact_match",
        "model": "Tiny",
        "heldout": 3,
        "gear": "eager",
        "why_eager": "",
    }
    for n in range(1, spec["steps"] + 1):
        time.sleep(0.04)
        loss = spec["seed"] + n / 100
        yield {"type": "step", "step": n, "steps": 9, "loss": loss, "seconds": 0.1, "eta_seconds": 0.1, "examples": n}
    yield {
        "type": "done", "steps": n, "stopped": False, "seconds": 1.0, "tokens_per_second": 9.0, "device": "here",
        "measured_peak_bytes": None, "predicted_peak_bytes": None,
    }  # fmt: skip


@pytest.fixture
def port(room, monkeypatch):
    """The page, served from this process."""
    from demos.live_finetune import Live
    from demos.memory_calculator import Memory
    from demos.page import look
    from demos.page.store import blocks

    monkeypatch.setitem(jobs.WORK, "train", runs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    demo = blocks(Memory(), Live())
    demo.queue(default_concurrency_limit=8)
    demo.launch(
        **look.launch_options(demo.routes), server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False
    )
    yield port
    demo.close()


def test_visitors_who_train_reload_and_cancel_see_their_own_runs(port, room, monkeypatch):
    monkeypatch.setattr(crowd, "ARRIVING", 1.0)
    page, clicks = asyncio.run(looked(port)), Times()
    own = [{"steps": crowd.FEWEST + n, "seed": n, "method": "lora"} for n in (1, 2, 5)]
    people = [crowd.Trainee(one["seed"], browser.Browser(port, page, **one)) for one in own]
    asyncio.run(crowd._fill(SimpleNamespace(port=port), page, people, clicks))
    assert [one.errors for one in people] == [[], [], []] and clicks.seconds and not clicks.errors
    found = [room.find(one.browser.kept["run"]) for one in people]
    wait_for(lambda: all(job.over for job in found))
    assert len({job.owner for job in found}) == 3 and [job.spec.seed for job in found] == [1, 2, 5]
    assert [crowd._dropped(room.records.find(job.id)) for job in found] == [False, False, True]
    assert [one.reloads for one in people] == [False, True, False] and people[2].cancels == "asked"
    told = [crowd.losses(job.events) for job in found]
    for one, losses in zip(people, told, strict=True):
        assert one.messages >= 2 and one.shown and one.foreign(losses, crowd.FEWEST + one.number) == 0
        assert one.foreign([9.0] * 40, crowd.FEWEST + one.number) == len([1 for _, seen in one.shown if seen])
        assert one.foreign(losses, 99) == len(one.shown)
    people[0].browser.heard.add(found[1].id)
    assert people[0].foreign(told[0], crowd.FEWEST + 1) == 1


def test_all_who_follow_one_run_see_its_end(port, monkeypatch):
    monkeypatch.setattr(clicks, "PAUSE", 0.1)
    monkeypatch.setattr(following, "PAUSE", 0.1)
    page = asyncio.run(looked(port))
    found = asyncio.run(following.follow(SimpleNamespace(port=port, processor=time.process_time), page, 3))
    assert found["visitors"] == found["saw_the_end"] == 3 and found["messages"] >= 9
    assert found["late"]["count"] >= 6 and found["late"]["errors"] == found["clicks"]["errors"] == 0
    assert found["clicks"]["count"] >= 3 and 0 <= found["late"]["median"] < 5


def test_what_a_press_is_refused_with_is_an_error(port):
    page = asyncio.run(looked(port))

    async def presses():
        person = browser.Browser(port, page, method="lora", steps=99)
        await person.open()
        person.state["rank"] = "much"
        await person.press("go")

    with pytest.raises(ValueError, match="rank=much"):
        asyncio.run(presses())


def test_the_parts_that_are_asked_for_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(strain, "PARTS", {part: lambda count, say: {"count": count} for part in strain.PARTS})
    document = strain.record_room(tmp_path / "room.json", print, ["kills", "memory"], killed=3, runs=4)
    assert json.loads((tmp_path / "room.json").read_text()) == document
    assert document["kind"] == "room" and document["command"] and "visitors" not in document
    assert (document["kills"], document["memory"]) == ({"count": 3}, {"count": 4})
    with pytest.raises(SpecError, match="only=kill: no such part; did you mean kills"):
        strain.record_room(tmp_path / "room.json", print, ["kill"])


def test_small_models_train_alone_as_they_do_here(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MODELS", dict(models.MODELS))
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    small.make(tmp_path / "bases", 2, small.QUICK)
    assert small.register(tmp_path / "bases") == [models.DEFAULT, "small-1"]
    spec = resolve(RunSpec(model="small-1", steps=3, seed=4))
    here = list(train(spec, tmp_path / "here"))
    (alone,) = small.alone(tmp_path / "bases", [spec.to_dict()], tmp_path / "alone")
    assert crowd.losses(alone) == crowd.losses(here) and len(crowd.losses(here)) == 3
    folder = tmp_path / "alone" / "0" / "adapter"
    assert small.difference(tmp_path / "here" / "adapter", folder) == 0


def test_the_difference_of_adapters(tmp_path):
    def adapter(name, **tensors):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / adapters.TENSORS)
        return tmp_path / name

    one, other = adapter("one", a=torch.zeros(3)), adapter("other", a=torch.tensor([0.0, -0.5, 0.25]))
    assert small.difference(one, one) == 0 and small.difference(one, other) == 0.5
    assert small.difference(one, adapter("more", a=torch.zeros(3), b=torch.zeros(1))) == float("inf")
    assert small.difference(one, tmp_path / "none") == float("inf")


def test_what_the_log_of_a_killed_run_tells():
    def step(n, loss):
        return {"type": "step", "step": n, "loss": loss}

    events = [
        {"type": "queued"},
        step(1, 0.5),
        step(2, 0.4),
        {"type": "resumed", "step": 1},
        step(2, 0.4),
        step(3, 0.3),
    ]
    found = kills._told(events, "run", "lora", 2)
    assert (found.resumed, found.kept) == (1, [0.5, 0.4, 0.3]) and len(found.losses) == 4


def test_the_memory_of_a_process_and_of_its_last_runs():
    assert 2**20 < steady.held(os.getpid())["pss"] <= steady.held(os.getpid())["rss"]
    with pytest.raises(PeftlabError, match="Linux alone"):
        steady.held(2**22 + 1)
    assert steady.usual([{"rss": n} for n in (9, 9, 1, 2, 3, 4, 100)]) == 3


RECORDED = {part: one[part] for one in documents("room") for part in strain.PARTS if part in one}


def recorded(part):
    if part not in RECORDED:
        pytest.skip(f"bench room --only {part} has not been recorded")
    return RECORDED[part]


def test_recorded_visitors_got_what_a_run_alone_gives_and_no_message_of_anothers():
    people = recorded("visitors")
    assert people["visitors"] >= 50 and people["finished"] + people["cancelled"] == people["visitors"]
    assert people["different"] == people["foreign_messages"] == people["errors"] == people["largest_difference"] == 0
    assert people["reloaded"] == people["visitors"] / 2 and people["cancelled"] > 0
    assert people["memory_clicks"]["errors"] == 0 and people["memory_clicks"]["p95"] <= 1


def test_recorded_kills_lost_nothing():
    killed = recorded("kills")
    assert killed["kills"] == killed["complete"] == len(killed["rows"]) >= 20 and killed["errors"] == 0
    assert killed["finished_and_lost"] == killed["largest_loss_difference"] == killed["largest_adapter_difference"] == 0
    assert any(row["resumed_at"] for row in killed["rows"])


def test_recorded_memory_does_not_grow():
    memory = recorded("memory")
    assert memory["runs"] >= 100 and memory["bases"] == 5 and abs(memory["growth"]) <= 0.03
