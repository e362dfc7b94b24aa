"""The jobs of a data folder: their order, their owners, what a host allows, and what is found again after a restart."""

import json
import os
import platform
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from tiny import ROOT, wait_for

from peftlab import SpecError, WeightsError, hardware
from peftlab.base import fetching, weights
from peftlab.data.tasks import TASKS
from peftlab.errors import Interrupted
from peftlab.room import host, jobs, keeping, records, rooms
from peftlab.room.preparing import Preparation
from peftlab.room.visitors import DAY, Signer
from peftlab.run import LEAVE, STOP


class Trainer:
    """A run that waits to be let on; it ends like the engine when it finds a stop file."""

    def __init__(self) -> None:
        self.go, self.order = threading.Event(), []

    def __call__(self, arguments, folder, again):
        self.order.append((arguments["spec"]["seed"], again))
        yield {"type": "start", "seed": arguments["spec"]["seed"]}
        assert self.go.wait(20)
        (folder / "adapter").mkdir(parents=True, exist_ok=True)
        (folder / "adapter" / "numbers").write_text("12345")
        yield {"type": "done", "steps": 1, "stopped": (folder / STOP).exists()}


@pytest.fixture
def trainer(monkeypatch):
    made = Trainer()
    monkeypatch.setitem(jobs.WORK, "train", made)
    yield made
    made.go.set()


@pytest.fixture
def opened(trainer, monkeypatch, tmp_path):
    """Opens rooms in one data folder, one after another, with settings of a host."""
    open_ones = []

    def open_(**settings):
        environment = {"PEFTLAB_DATA": str(tmp_path / "data")} | {host.variable(k): v for k, v in settings.items()}
        open_ones.append(rooms.Room(host.Host.read(environment)))
        return open_ones[-1]

    yield open_
    trainer.go.set()
    for one in open_ones:
        one.close()


def start(room, owner="ann", seed=0, **more):
    return room.start("train", {"spec": {"seed": seed}}, owner, **more)


def ends(job):
    """All events of a job that is over."""
    wait_for(lambda: job.over)
    return job.events


def killed(room):
    """Ends a room as kill -9 would: nothing is written any more, and its claim is gone with the process."""
    room._claim.close()
    room._claim = None
    room._closed = True
    room.records._base.close()


def test_a_second_run_of_the_same_owner_is_refused_while_one_is_on(opened, trainer):
    room = opened()
    job = start(room, seed=1)
    wait_for(lambda: job.events[-1]["type"] == "start")  # events are seen as they happen
    assert not job.over and room.running("ann") is job
    with pytest.raises(SpecError, match="already under way: wait for it, or stop it"):
        start(room, seed=2)
    with pytest.raises(SpecError, match="method=nonsense"):
        room.start("train", {"spec": {"method": "nonsense"}}, "bob")
    with pytest.raises(SpecError, match="not known here; reload"):
        start(room, owner="")
    assert room.running("bob") is None
    trainer.go.set()
    assert [e["type"] for e in ends(job)] == ["queued", "start", "done"]
    assert room.running("ann") is None and room.find(job.id) is job
    assert room.find(None) is room.find("../key") is room.find("nothing") is None
    assert ends(start(room, seed=3))[-1]["type"] == "done"
    assert trainer.order == [(1, False), (3, False)]


def test_the_owner_of_the_hosts_key_goes_first_and_a_wait_is_told_from_what_runs_took(opened, trainer):
    room = opened()
    first, second = start(room, seed=1), start(room, "bob", 2)
    wait_for(lambda: first.begun)
    assert room.wait(second) is None  # nothing has been measured
    host_ = start(room, "host", 3, first=True)
    assert [room.ahead(job) for job in (first, second, host_)] == [0, 2, 1]
    second.stop()
    assert ends(second)[-1]["message"] == "Stopped while it waited: nothing was learned." and not first.over
    trainer.go.set()
    ends(first), ends(host_)
    trainer.go.clear()
    last, waits = start(room, "cem", 4), start(room, "dan", 5)
    wait_for(lambda: last.begun)
    assert room.wait(waits) is not None and room.wait(last) == 0
    trainer.go.set()
    ends(waits)
    assert [seed for seed, _ in trainer.order] == [1, 3, 4, 5] and [
        e["ahead"] for e in waits.events if "ahead" in e
    ] == [1]


def test_a_run_that_is_stopped_in_the_moment_in_which_it_begins_does_not_run(opened, trainer):
    room = opened()
    first, second = start(room, seed=1), start(room, "bob", 2)
    wait_for(lambda: first.begun)
    with second._changing:  # the room waits here to begin it
        trainer.go.set()
        ends(first)
        time.sleep(0.2)
        second.stop()
    assert ends(start(room, "cem", 3))[-1]["type"] == "done" and second.over
    assert [seed for seed, _ in trainer.order] == [1, 3] and "while it waited" in second.events[-1]["message"]


def test_a_cancel_that_comes_with_the_end_is_heeded_or_leaves_no_trace(opened, trainer):
    """Else a run that is resumed later would be dropped by it."""
    job = start(opened())
    wait_for(lambda: job.events[-1]["type"] == "start")
    with job._changing:
        trainer.go.set()
        time.sleep(0.2)
        job.cancel()
    assert ends(job)[-1]["message"] == "Cancelled: nothing is kept." and not job.folder.exists()


def test_cancel_drops_what_stop_keeps(opened, trainer):
    room = opened()
    for end, kept in (("stop", True), ("cancel", False)):
        trainer.go.clear()
        job = start(room)
        wait_for(lambda: job.events[-1]["type"] == "start")  # noqa: B023
        getattr(job, end)()
        assert job.stopping
        trainer.go.set()
        ends(job)
        assert (job.folder / "adapter").exists() == kept and not job.stopping
        assert job.events[-1].get("stopped") is (True if kept else None) and job.resumable == kept
        getattr(job, end)()  # too late
        assert (job.folder / "adapter").exists() == kept and not (job.folder / STOP).exists()


def test_a_stop_is_forgotten_once_a_run_is_over_even_one_that_was_refused(opened, trainer, monkeypatch):
    def refuses(arguments, folder, again):
        yield {"type": "loading"}
        assert trainer.go.wait(20)
        raise SpecError("rank=0: no")

    monkeypatch.setitem(jobs.WORK, "train", refuses)
    job = start(opened())
    wait_for(lambda: job.events[-1]["type"] == "loading")
    job.stop()
    trainer.go.set()
    ends(job)
    assert not job.stopping and not job.folder.exists()


@pytest.mark.parametrize(
    "error, said",
    [
        (SpecError("rank=0: no"), "rank=0: no"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError("CUDA out of memory. Tried\nto"), "out of memory (CUDA out of memory. Tried): lower batch-size"),
        (OSError(28, "No space left on device"), "the disk is full ([Errno 28] No space left on device): free"),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error"),
        (None, "the run ended without a word"),
    ],
)
def test_an_error_becomes_the_last_event(error, said, opened, monkeypatch):
    def fails(arguments, folder, again):
        yield {"type": "start"}
        if error:
            raise error

    monkeypatch.setitem(jobs.WORK, "train", fails)
    room = opened()
    last = ends(start(room))[-1]
    assert last["type"] == "error" and last["message"].startswith(said)
    assert room.running("ann") is None


def test_on_a_shared_gpu_each_request_does_its_own_job_and_a_restart_ends_those_that_wait(opened, trainer, monkeypatch):
    monkeypatch.setattr(hardware, "is_shared", lambda: True)
    room = opened()
    first, second = start(room, "ann", 1), start(room, "bob", 2)
    requests = [threading.Thread(target=room.carry_out, args=(job, 60.0)) for job in (first, second)]
    for request in requests:
        request.start()
    wait_for(lambda: len(trainer.order) == 2)  # both at once
    assert room.ahead(second) == 0 and not first.over
    room.carry_out(first, 60.0)  # by a second press: it is under way already
    trainer.go.set()
    for request in requests:
        request.join()
    assert [ends(job)[-1]["type"] for job in (first, second)] == ["done", "done"] and len(trainer.order) == 2
    left = start(room, "cem", 3)
    killed(room)
    again = opened().find(left.id)
    assert again.over and "press the button again" in again.events[-1]["message"]


def test_a_run_on_a_shared_gpu_ends_with_what_it_learned_before_its_time_is_over(opened, trainer, monkeypatch):
    monkeypatch.setattr(hardware, "is_shared", lambda: True)

    def endless(arguments, folder, again):
        yield {"type": "start"}
        while not (folder / STOP).exists():
            time.sleep(0.01)
            yield {"type": "step", "step": 1, "eta_seconds": 1.0}
        yield {"type": "done", "steps": 1, "stopped": True}

    monkeypatch.setitem(jobs.WORK, "train", endless)
    room = opened()
    room.carry_out(job := start(room), 0.2)
    assert job.events[-1]["message"] == "It ended after 0.2 seconds, which is the most that a run may take here."


def test_a_server_that_ends_has_runs_leave_and_begins_no_other(opened, monkeypatch):
    def leaves(arguments, folder, again):
        yield {"type": "step", "step": 7, "eta_seconds": 1.0}
        wait_for((folder / LEAVE).exists)

    monkeypatch.setitem(jobs.WORK, "train", leaves)
    room = opened()
    job, waits = start(room), start(room, "bob")
    wait_for(lambda: job.events[-1]["type"] == "step")
    room.leave(20.0)
    said = "The server ended while this ran, after step 7. Resume goes on from there."
    assert job.over and job.resumable and job.events[-1]["message"] == said and not (job.folder / LEAVE).exists()
    assert not waits.begun


def test_a_run_that_got_no_gpu_can_go_on(opened, monkeypatch):
    def refused(arguments, folder, again):
        raise Interrupted("no GPU was free within a minute")
        yield

    monkeypatch.setitem(jobs.WORK, "train", refused)
    job = start(opened())
    assert ends(job)[-1]["message"] == "No GPU was free within a minute." and job.resumable


def test_a_host_bounds_what_is_trained(opened, trainer):
    room = opened(models="smollm2-135m", tokens="20000", queue="1")
    with pytest.raises(SpecError, match=r"model=gpt2: this host trains smollm2-135m; choose"):
        room.start("train", {"spec": {"model": "gpt2"}}, "ann")
    with pytest.raises(SpecError, match=r"steps=48: 49,152 tokens, and a run here has at most 20,000; try 19"):
        room.start("train", {"spec": {"model": "smollm2-135m", "steps": 48, "batch_size": 4}}, "ann")
    small = {"spec": {"model": "smollm2-135m", "steps": 19, "batch_size": 4}}
    room.start("train", small, "ann")
    room.start("train", small, "bob")
    with pytest.raises(SpecError, match="runs that wait: 1, and here at most 1 may; try again later"):
        room.start("train", small, "cem")


def test_a_demo_trains_nothing(opened):
    with pytest.raises(SpecError, match="trains nothing"):
        start(opened(train="no"))


def test_a_run_past_its_time_is_stopped_and_says_so(opened, monkeypatch):
    def steps(arguments, folder, again):
        for step in range(400):
            if (folder / STOP).exists():
                break
            time.sleep(0.01)
            yield {"type": "step", "step": step + 1}
        yield {"type": "done", "steps": step, "stopped": True}

    monkeypatch.setitem(jobs.WORK, "train", steps)
    last = ends(start(opened(seconds="1")))[-1]
    assert (
        last["type"] == "done"
        and last["message"] == "It ended after 1 seconds, which is the most that a run may take here."
    )
    assert 50 < last["steps"] < 110


def test_a_data_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="PEFTLAB_DATA=.*: no folder that can be locked is to be had there"):
        rooms.Room(host.Host.read({"PEFTLAB_DATA": str(tmp_path / "file")}))


def test_a_second_server_keeps_its_runs_elsewhere(opened):
    first, second = opened(), opened()
    assert first.folder != second.folder and second.folder.exists()


def test_after_a_restart_what_was_over_is_there_and_what_waited_goes_on(opened, trainer):
    room = opened()
    trainer.go.set()
    over = start(room, seed=1)
    ends(over)
    trainer.go.clear()
    ran, waited = start(room, seed=2), start(room, "bob", 3)
    wait_for(lambda: ran.events[-1]["type"] == "start")
    token = room.signer.newcomer()
    killed(room)
    trainer.order.clear()
    again = opened()
    assert again.signer.read(token)
    found = again.find(over.id)
    assert found is not over and found.over and found.events == over.events and found.owner == "ann"
    assert (found.folder / "adapter" / "numbers").read_text() == "12345"
    interrupted = again.find(ran.id)
    assert interrupted.over and interrupted.resumable
    assert interrupted.events[-1]["message"].startswith("The server ended while this ran, before the first step.")
    trainer.go.set()
    assert ends(again.find(waited.id))[-1]["type"] == "done"
    again.resume(interrupted)
    assert ends(interrupted)[-1]["type"] == "done" and not interrupted.resumable
    assert trainer.order == [(3, False), (2, True)]
    with pytest.raises(SpecError, match="came to its end and cannot go on"):
        again.resume(interrupted)
    assert [spec.seed for spec, _ in again.finished()] == [3, 2, 1]


def test_a_run_that_was_cancelled_just_before_its_server_ended_is_dropped(opened, trainer):
    room = opened()
    job = start(room)
    wait_for(lambda: job.events[-1]["type"] == "start")
    job.cancel()
    killed(room)
    found = opened().find(job.id)
    assert found.over and not found.resumable and not found.folder.exists()
    assert found.events[-1]["message"] == "Cancelled: nothing is kept."


def test_a_clock_that_is_set_back_changes_no_order_and_loses_nothing(opened, trainer, monkeypatch):
    room = opened()
    trainer.go.set()
    done = start(room, seed=1)
    ends(done)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    later = start(room, seed=2)
    ends(later)
    room.tidy()
    assert [spec.seed for spec, _ in room.finished()] == [2, 1] and room.find(done.id) and room.find(later.id)
    assert [job.id for job in room.adapters("ann")] == [later.id, done.id]


def test_only_what_is_old_or_too_much_goes_and_never_what_is_looked_at(opened, trainer, monkeypatch):
    room = opened(disk="0.000000012")  # 12 bytes: two adapters of 5
    trainer.go.set()
    made = [start(room)]
    for seed in (1, 2, 3):
        ends(made[-1])
        made.append(start(room, seed=seed))
    ends(made[-1])
    looked = made[0]
    room._looked_at.clear()
    room.find(looked.id)
    monkeypatch.setattr(rooms, "IN_MEMORY", 0)
    room._keep(made[-1])  # as after so many others were looked at
    room.tidy()
    assert [bool(room.records.find(job.id)) for job in made] == [True, False, False, True]
    assert not made[1].folder.exists() and looked.folder.exists()
    monkeypatch.setattr(time, "time", lambda: made[3].record.made + 31 * 24 * 3600)
    room._looked_at.clear()
    room.tidy()
    assert not any(room.records.find(job.id) or job.folder.exists() for job in made)


def test_a_finished_run_is_found_in_the_second_folder(opened, trainer, tmp_path):
    room = opened(copies=str(tmp_path / "copies"))
    trainer.go.set()
    job = start(room)
    ends(job)
    wait_for(lambda: (tmp_path / "copies" / job.id / keeping.LOG).exists())
    room.records.forget(job.id)
    room._jobs.clear()
    found = room.find(job.id)
    assert found.events == job.events and found.owner == "ann" and (found.folder / "adapter" / "numbers").exists()
    assert found.over and not found.resumable  # a copy is only looked at
    found.cancel()
    found.stop()
    assert (found.folder / "adapter" / "numbers").exists() and room.running("ann") is None


def test_a_job_that_leaves_nothing_but_its_events_is_found_in_the_second_folder_too(opened, monkeypatch, tmp_path):
    done = {"type": "done", "lines": [], "stopped": False}
    monkeypatch.setitem(jobs.WORK, "race", lambda *_: (event for event in [done]))
    room = opened(copies=str(tmp_path / "copies"))
    job = room.start("race", {"spec": {}}, "ann")
    ends(job)
    wait_for(lambda: (tmp_path / "copies" / job.id / keeping.LOG).exists())
    room.records.forget(job.id)
    room._jobs.clear()
    assert room.find(job.id).events == job.events


def test_a_job_whose_own_end_fails_holds_up_nobody(opened, trainer):
    room = opened()
    job, waiting = start(room, seed=1), start(room, "bob", 2)
    wait_for(lambda: job.begun)
    job.folder.write_text("no folder")
    trainer.go.set()
    assert ends(job)[-1]["type"] == "error" and ends(waiting)[-1]["type"] == "done"
    assert room.running("ann") is None


def test_whatever_ends_a_job_the_next_one_begins(opened, trainer, monkeypatch):
    room, run = opened(), jobs.Job.run

    def breaks(job, longest):
        run(job, longest) if job.owner == "bob" else job.nothing_like_this

    monkeypatch.setattr(jobs.Job, "run", breaks)
    trainer.go.set()
    job, waiting = start(room, seed=1), start(room, "bob", 2)
    assert "AttributeError" in ends(job)[-1]["message"] and ends(waiting)[-1]["type"] == "done"


def test_what_another_version_began_is_left_out(opened, trainer):
    room = opened()
    trainer.go.set()
    job = start(room)
    ends(job)
    assert len(room.finished()) == 1 and job.readable
    assert room.takes(job.spec) == job.events[-1]["job_seconds"] and room.takes(replace(job.spec, steps=7)) is None
    told = json.dumps(job.arguments | {"spec": job.arguments["spec"] | {"of_tomorrow": 1}})
    room.records._do("UPDATE jobs SET arguments = ? WHERE id = ?", (told, job.id))
    room._jobs.clear()
    assert room.finished() == [] and not room.find(job.id).readable


def test_a_host_that_trains_nothing_any_more_does_not_go_on_with_what_waits(opened, trainer):
    room = opened()
    first, waiting = start(room, seed=1), start(room, "bob", 2)
    wait_for(lambda: first.begun)
    killed(room)
    trainer.go.set()
    room = opened(train="no")
    assert "trains nothing" in room.find(waiting.id).events[-1]["message"] and room.find(waiting.id).over
    with pytest.raises(SpecError, match="trains nothing"):
        room.resume(room.find(first.id))


def test_a_full_queue_takes_nobody_who_goes_on_but_the_host(opened, trainer):
    room = opened(queue="1")
    stopped = start(room, seed=1)
    wait_for(lambda: stopped.begun)
    stopped.stop()
    trainer.go.set()
    ends(stopped)
    trainer.go.clear()
    busy = start(room, "bob", 2)
    wait_for(lambda: busy.begun)
    waiting = start(room, "carol", 3)
    with pytest.raises(SpecError, match="runs that wait: 1, and here at most 1 may"):
        room.resume(stopped)
    assert not start(room, "host", 4, first=True).begun
    trainer.go.set()
    ends(waiting)


def test_somebody_who_cancels_may_begin_anew_at_once(opened, monkeypatch):
    """And the cancelled run, which would go on for ever, ends at its next word."""
    room = opened()

    def endless(arguments, folder, again):
        while arguments["spec"]["seed"] == 1:
            time.sleep(0.01)
            yield {"type": "progress", "what": "measuring", "share": 0.5}
        yield {"type": "done", "steps": 1, "stopped": False}

    monkeypatch.setitem(jobs.WORK, "train", endless)
    job = start(room, seed=1)
    wait_for(lambda: len(job.events) > 2)
    job.cancel()
    assert job.cancelling or job.over
    assert ends(start(room, seed=2))[-1]["type"] == "done"
    assert job.events[-1] == {"type": "error", "message": "Cancelled: nothing is kept.", "cancelled": True}


def test_a_log_that_cannot_be_written_ends_no_run(opened, trainer, monkeypatch, caplog):
    room = opened()
    job = start(room)
    full = sqlite3.OperationalError("database or disk is full")

    def cannot(*_):
        raise full

    monkeypatch.setattr(room.records, "say", cannot)
    monkeypatch.setattr(room.records, "put", cannot)
    trainer.go.set()
    assert ends(job)[-1]["type"] == "done" and "disk is full" in caplog.text


def test_jobs_in_memory_are_bounded(opened, trainer, monkeypatch):
    monkeypatch.setattr(rooms, "IN_MEMORY", 3)
    room = opened()
    trainer.go.set()
    made = []
    for seed in range(8):
        made.append(start(room, seed=seed).id)
        wait_for(lambda: room.find(made[-1]).over)
    assert len(room._jobs) <= 4 and room.find(made[0]).events[-1]["type"] == "done"


def test_a_token_cannot_be_made_up(tmp_path):
    signer, other = Signer(tmp_path / "key"), Signer(tmp_path / "other")
    token = signer.newcomer()
    assert len(signer.read(token)) == 32 and signer.read(token) == Signer(tmp_path / "key").read(token)
    wrong = [
        None,
        7,
        "",
        ".",
        "ann",
        "ann.",
        token[:-1],
        token.upper(),
        "x" + token,
        other.newcomer(),
        f"ann.{token[33:]}",
        "é.é",
    ]
    assert [signer.read(one) for one in wrong] == [""] * len(wrong)
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0


def test_a_link_to_ones_own_ends(tmp_path, monkeypatch):
    signer = Signer(tmp_path / "key")
    name = signer.opens("run-1")
    assert signer.opened(name) == "run-1" and signer.opens("run-1") == name
    assert signer.opened(name.replace("run-1", "run-2")) == signer.opened(signer.newcomer()) == signer.opened("") == ""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * DAY)
    assert signer.opened(name) == ""


KILLED = """
import sys, time
from peftlab.room import host, jobs, rooms

def slow(arguments, folder, again):
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    yield {"type": "start"}
    for step in range(1, 10_000):
        time.sleep(0.002)
        yield {"type": "step", "step": step}

jobs.WORK["train"] = slow
room = rooms.Room(host.Host.read({"PEFTLAB_DATA": sys.argv[1]}))
job = room.start("train", {"spec": {}}, "ann")
while True:
    print(job.id, len(job.events), flush=True)
    time.sleep(0.02)
"""


def test_a_process_that_is_killed_loses_no_event_and_frees_its_folder(tmp_path, opened):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "data")], stdout=subprocess.PIPE, text=True
    )
    told = "", 0
    while int(told[1]) < 40:
        told = process.stdout.readline().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    room = opened()
    job = room.find(told[0])
    assert room.folder == tmp_path / "data"
    assert len(job.events) > int(told[1]) and job.resumable and "after step" in job.events[-1]["message"]
    steps = [event["step"] for event in job.events if event["type"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


def test_the_log_is_json_and_keeps_its_order(tmp_path):
    log = records.Records(tmp_path / "jobs.sqlite")
    log.add("a", "train", {"spec": {}}, "ann", False)
    for n in range(3):
        log.say("a", n, {"type": "step", "step": n, "loss": float("nan")})
    assert [n for n, _ in log.events("a")] == [0, 1, 2] and log.events("b") == []
    with pytest.raises(sqlite3.IntegrityError):
        log.say("a", 1, {"type": "step"})
    log.close()
    assert json.loads(
        sqlite3.connect(tmp_path / "jobs.sqlite").execute("SELECT arguments FROM jobs").fetchone()[0]
    ) == {"spec": {}}


def test_a_preparation_that_failed_can_begin_again(tiny_model, monkeypatch):
    def fails(model):
        raise WeightsError("no network; do this")
        yield

    preparation = Preparation(str(tiny_model))
    with monkeypatch.context() as patch:
        patch.setattr(fetching, "fetch", fails)
        preparation.begin()
        preparation._thread.join(30)
    assert preparation.error == "no network; do this" and not preparation.ready
    preparation.begin()
    preparation._thread.join(30)
    assert preparation.ready and preparation.error is None


def test_a_base_is_asked_the_bundled_rows_while_nobody_has_a_job(tiny_model):
    begun, busy = threading.Event(), [True]
    preparation = Preparation(str(tiny_model), lambda: begun.set() or busy[0])
    base = weights.load(preparation.spec)
    base.measured.clear()
    preparation.begin()
    assert begun.wait(60) and preparation.ready and base.measured.get("answers", {}) == {}
    busy[0] = False
    preparation._thread.join(60)
    assert [task.key for task in base.measured["answers"]] == list(TASKS), preparation.error
    kept = base.measured["answers"][TASKS["ticket"]]
    assert [a.prompt for a in kept] == [row.prompt for row in TASKS["ticket"].heldout]


def test_a_preparation_that_is_stopped_leaves_no_download(tiny_model, monkeypatch):
    closed = threading.Event()

    def downloads(model):
        try:
            while True:
                yield fetching.Progress("downloading", "somewhere")
        finally:
            closed.set()

    monkeypatch.setattr(fetching, "fetch", downloads)
    preparation = Preparation(str(tiny_model))
    preparation.begin()
    preparation.stop()
    assert closed.is_set() and not preparation.ready and preparation.error is None


HEAP = """
import ctypes
from peftlab import hardware

glibc = ctypes.CDLL("libc.so.6")
glibc.malloc.restype, glibc.malloc.argtypes, glibc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [glibc.malloc(2**16) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 2**16)
for block in blocks[:-1]:  # the last one keeps what lies below it from going back
    glibc.free(block)
resident = lambda: 4096 * int(open("/proc/self/statm").read().split()[1])
before = resident()
hardware.give_back()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep their own ways")
def test_memory_that_is_free_goes_back_to_the_system():
    ran = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, cwd=ROOT)
    assert int(ran.stdout) > 1000 * 2**16
