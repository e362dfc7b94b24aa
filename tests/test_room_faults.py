"""What goes wrong while somebody's run is under way: it ends in words, nothing half written is offered, the next one runs."""

import errno
import os
import random
import socket
import sqlite3
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch
from tiny import wait_for

from peftlab import RunError, RunSpec, adapters, resolve
from peftlab.base import weights
from peftlab.errors import plain
from peftlab.race import Line, along
from peftlab.room import jobs
from peftlab.run import checkpoint, gears, loop, train
from peftlab.run.events import standing
from peftlab.show.refusals import failure

STEPS = 8


@pytest.fixture(autouse=True)
def step_by_step(monkeypatch):
    """Each step is told before the next one begins; checkpoints are kept where a test asks for them."""
    monkeypatch.setattr(loop, "PAUSE", 0.0)
    monkeypatch.setattr(checkpoint, "SOONEST", 1e9)


@pytest.fixture
def spec(toy_spec):
    return toy_spec.but(steps=STEPS)


def begun(room, spec, owner="ann"):
    return room.start("train", {"spec": spec.to_dict()}, owner)


def ends(job):
    wait_for(lambda: job.over, 60)
    return job.events[-1]


def trains(room, spec, owner):
    """The next visitor's run comes to its end."""
    job = begun(room, spec, owner)
    last = ends(job)
    assert last["type"] == "done" and last["steps"] == STEPS and adapters.read(job.folder / "adapter")


@pytest.fixture
def at_step(monkeypatch):
    """Has a step do something else in its place, once."""

    def spoil(number, instead):
        step, done = gears.Step.__call__, []

        def spoilt(self, *batch):
            if self.done + 1 == number and not done:
                done.append(1)
                return instead(step, self, *batch)
            return step(self, *batch)

        monkeypatch.setattr(gears.Step, "__call__", spoilt)

    return spoil


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("number", [1, 2, 6])
def test_memory_that_runs_out_at_a_step(number, room, spec, at_step):
    at_step(number, no_memory)
    job = begun(room, spec)
    last = ends(job)
    assert last["type"] == "error" and last["message"].startswith("out of memory (CUDA out of memory. Tried")
    assert ("The adapter that was last saved is kept." in last["message"]) == (number > 1)
    assert (job.folder / "adapter").exists() == (number > 1) and not job.resumable
    trains(room, spec, "bob")


def test_a_run_that_failed_after_a_checkpoint_goes_on_from_it(room, spec, at_step, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "SOONEST", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    at_step(6, no_memory)
    job = begun(room, spec)
    assert ends(job)["message"].endswith("Resume goes on from there.") and job.resumable
    room.resume(job)
    assert ends(job)["type"] == "done"
    assert [e["step"] for e in job.events if e["type"] == "resumed"] == [5]
    *_, whole = train(resolve(spec), tmp_path)
    assert job.events[-1]["train_loss"] == whole["train_loss"]


def test_a_loss_that_is_none_at_a_step(room, spec, at_step):
    at_step(6, lambda step, *all: step(*all) * float("nan"))
    job = begun(room, spec)
    assert "the loss is nan at step 6: training diverged" in ends(job)["message"] and not job.resumable
    rate = min(spec.learning_rate / 4, resolve(spec.but(learning_rate=None)).learning_rate)
    assert f"; try {rate:g}. " in job.events[-1]["message"] and job.events[-1]["settings"] == {"learning_rate": rate}
    assert f">Use learning rate {rate:g}</button>" in failure(job.events)
    trains(room, spec, "bob")


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("method", ["lora", "houlsby"])
@pytest.mark.parametrize("saves", [0, 1])
def test_a_disk_that_is_full_when_an_adapter_is_saved(method, saves, room, spec, monkeypatch):
    """At the first save and at a later one, when an older adapter is there. The checkpoint has tests of its own."""
    write, written = adapters._write, []

    def writes(model, spec, part, result):
        write(model, spec, part, result)
        written.append(part)
        if len(written) > saves:
            full()

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "_write", writes)
        job = begun(room, spec.but(method=method))
        last = ends(job)
    assert last["message"].startswith("the disk is full ([Errno 28] No space left on device): free some space")
    assert ("The adapter that was last saved is kept" in last["message"]) == bool(saves)
    assert [file.name for file in job.folder.glob("*")] == ["adapter"] * saves
    if saves:
        assert adapters.apply(weights.load(resolve(spec)), adapters.read(job.folder / "adapter"))
    trains(room, spec, "bob")


def test_a_full_disk_and_memory_that_is_gone_are_said():
    from safetensors import SafetensorError

    said = plain(SafetensorError('IoError(Os { code: 28, message: "No space left on device" })'))
    assert said.startswith("the disk is full (")
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"),
    ):
        assert plain(error).startswith("out of memory (")


def test_a_run_that_cannot_be_written_down_is_refused_in_words(room, spec, monkeypatch):
    def cannot(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(room.records, "add", cannot)
        with pytest.raises(RunError, match=r"cannot be written \(database or disk is full\); tell the host"):
            begun(room, spec)
    assert room.running("ann") is None
    trains(room, spec, "ann")


@pytest.fixture
def waiting_again(room, monkeypatch):
    """A run that was stopped midway and waits to go on, behind another one."""
    go = threading.Event()

    def work(arguments, folder, again):
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        yield {"type": "step", "step": 1}
        seen.append((arguments["spec"]["seed"], again))
        assert go.wait(20)
        yield {"type": "done", "steps": 1, "stopped": True}

    seen = []
    monkeypatch.setitem(jobs.WORK, "train", work)
    job = room.start("train", {"spec": {"seed": 1}}, "ann")
    go.set()
    ends(job)
    go.clear()
    other = room.start("train", {"spec": {"seed": 2}}, "bob")
    wait_for(lambda: len(seen) == 2)
    room.resume(job)
    job.seen, job.go, job.other = seen, go, other
    yield job
    go.set()
    ends(other)


def test_a_run_that_waits_to_go_on_still_does_after_a_restart(waiting_again, room):
    """The table and the log alone say so."""
    found = jobs.Job(room.records.find(waiting_again.id), waiting_again.folder, room.records)
    assert found.again and not found.begun
    waiting_again.go.set()
    ends(waiting_again)
    assert waiting_again.seen == [(1, False), (2, False), (1, True)]


def test_a_run_that_waits_to_go_on_may_be_stopped_and_go_on_later_or_be_dropped(waiting_again, room):
    waiting_again.stop()
    last = waiting_again.events[-1]
    assert (
        last["message"] == "Stopped while it waited to go on: what it had learned is kept." and waiting_again.resumable
    )
    room.resume(waiting_again)
    waiting_again.cancel()  # what it had learned is not lost
    assert waiting_again.events[-1]["message"] == "Cancelled: what it had learned before it went on is kept."
    assert waiting_again.over and waiting_again.resumable


def test_a_run_that_goes_on_and_is_cancelled_is_as_it_was_when_it_was_stopped(room, spec, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "SOONEST", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    step, stops = gears.Step.__call__, [3]

    def slowed(self, *batch):
        if self.done + 1 in stops:
            job.cancel() if stops.pop() == 6 else job.stop()
        return step(self, *batch)

    monkeypatch.setattr(gears.Step, "__call__", slowed)
    job = begun(room, spec)
    last = ends(job)
    assert last["stopped"] and job.resumable
    kept = {file.name: file.read_bytes() for file in (job.folder / "adapter").iterdir()}
    stops.append(6)
    room.resume(job)
    again = ends(job)
    assert again["as_before"] and again["steps"] == last["steps"] and "before it went on is kept" in again["message"]
    assert {file.name: file.read_bytes() for file in (job.folder / "adapter").iterdir()} == kept
    assert max(e["step"] for e in job.events if e["type"] == "step") > last["steps"]
    assert max(e["step"] for e in standing(job.events) if e["type"] == "step") == last["steps"]
    assert not (job.folder / jobs.BEFORE).exists() and not (job.folder / jobs.CANCEL).exists()
    room.resume(job)
    wait_for(lambda: job.begun)
    assert not job.cancelling
    done = ends(job)
    *_, whole = train(resolve(spec), tmp_path)
    assert done["steps"] == STEPS and done["train_loss"] == whole["train_loss"]


def test_a_race_that_was_interrupted_goes_on_with_what_has_not_finished(room, spec, monkeypatch, tmp_path):
    """The first racer's run is not done again, and each line is what it would have been."""
    field = along(spec.but(steps=3), {"rank": ["1", "2"]})
    asked = {
        "spec": field[0].spec.to_dict(), "racers": [(r.name, r.spec.to_dict()) for r in field], "seeds": 1, "seconds": None,
    }  # fmt: skip
    race, told = jobs.WORK["race"], []

    def broken(arguments, folder, again):
        for event in race(arguments, folder, again):
            yield event
            told.append((again, event))
            if not again and event["type"] == "run" and event["racer"] == 1 and event["event"]["type"] == "step":
                raise KeyboardInterrupt  # as much as a test can have of the process's end

    monkeypatch.setitem(jobs.WORK, "race", broken)
    record = room.records.add("race-of-ann", "race", asked, "ann", False)
    job = jobs.Job(record, room.folder / "jobs" / record.id, room.records)
    job.put("running")
    with pytest.raises(KeyboardInterrupt):
        job.run(3600)
    room._take_up()
    found = room.find(job.id)
    assert found.over and found.resumable and "The server ended while this ran" in found.events[-1]["message"]
    room.resume(found)
    last = ends(found)
    started = [
        (e["racer"], e["seed"]) for again, e in told if again and e["type"] == "run" and e["event"]["type"] == "start"
    ]
    assert started == [(1, 0)]
    *_, whole = race(asked, tmp_path, False)
    timed = dict.fromkeys(("training_seconds", "apart", "merged"))
    lines, wanted = ([asdict(Line(**line)) | timed for line in event["lines"]] for event in (last, whole))
    assert lines == wanted and all(len(line["scores"]) == 1 for line in lines)
    assert not list(found.folder.glob("*")) and not found.resumable


def test_a_base_that_goes_while_somebody_waits_for_it_is_loaded_again(
    tiny_model, tied_model, monkeypatch, nothing_loaded
):
    """Only one may stay: each that is loaded takes the last one's place, whoever waits for that."""
    specs = [resolve(RunSpec(model=str(m), precision=p)) for m in (tiny_model, tied_model) for p in ("fp32", "bf16")]
    monkeypatch.setattr(weights, "_memory", lambda base: 1.0)
    load = weights._load

    def slowly(entry, spec, device):
        time.sleep(0.02)
        return load(entry, spec, device)

    monkeypatch.setattr(weights, "_load", slowly)
    draw = random.Random(0)

    def uses(spec):
        base = weights.load(spec)
        out = base.model(input_ids=torch.arange(6)[None].to(base.device)).logits
        assert torch.isfinite(out).all() and base.entry.key == spec.model
        return str(base.model.dtype).endswith({"fp32": "float32", "bf16": "bfloat16"}[spec.precision])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(uses, [draw.choice(specs) for _ in range(36)]))
    assert len(weights._loaded) == 1


def test_a_browser_that_never_reads_its_stream_is_not_written_to_for_ever(room, monkeypatch):
    """Over a real connection: the server makes no more messages for it than the connection holds; others get theirs."""
    pytest.importorskip("gradio")
    import uvicorn
    from starlette.applications import Starlette

    from demos.page import served

    big, made, follow = "x" * 2**20, [], served.follow

    async def counted(*asked):
        made.append(0)
        own = len(made) - 1
        async for part in follow(*asked):
            made[own] += 1
            yield part

    def works(arguments, folder, again):
        for step in range(40):
            wait_for(lambda: len(made) == 2)
            time.sleep(0.03)
            yield {"type": "step", "step": step}
        yield {"type": "done", "steps": 40}

    monkeypatch.setattr(served, "LOOK", 0.01)
    monkeypatch.setattr(served, "follow", counted)
    monkeypatch.setitem(jobs.WORK, "train", works)
    job = room.start("train", {"spec": {}}, "ann")
    app = Starlette(routes=[served.follow_route("live", "train", lambda job: {"bar": f"{len(job.events)} {big}"})])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    with socket.socket() as sleeper:
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sleeper.connect(("127.0.0.1", port))
        sleeper.sendall(f"GET /gradio_api/peftlab/follow/live/{job.id} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        wait_for(lambda: made)
        read = (
            urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/peftlab/follow/live/{job.id}", timeout=30)
            .read()
            .decode()
        )
        assert read.endswith("event: over\ndata: {}\n\n") and made[1] == read.count("\n\n") > 20
        assert 1 <= made[0] < 12  # of 1 MB each
    wait_for(lambda: not served._followed)
    server.should_exit = True
    thread.join(10)
