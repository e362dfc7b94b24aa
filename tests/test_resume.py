"""A run that was killed or stopped goes on to exactly what it would have become: same losses, same adapter, same end."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ROOT, small

from peftlab import RunSpec, SpecError, adapters, hardware, resolve
from peftlab.methods import METHODS
from peftlab.optimizers import OPTIMIZERS
from peftlab.run import CHECKPOINT, LEAVE, STOP, checkpoint, loop, must_go_on, train
from peftlab.run.checkpoint import Checkpoint
from peftlab.run.loop import Run

STEPS = 8
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="sums on a GPU are not always taken in one order")
OFTEN = "from peftlab.run import checkpoint, loop; checkpoint.SOONEST = loop.PAUSE = 0.0; checkpoint.SHARE = 1e9"
"""A checkpoint after each step, in a process of its own."""


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """The same here."""
    monkeypatch.setattr(checkpoint, "SOONEST", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    monkeypatch.setattr(loop, "PAUSE", 0.0)


def until(spec, out, step, **how):
    """The events of a run up to its event of that step, where it is broken off; the last checkpoint is older."""
    events, seen = train(spec, out, **how), []
    for event in events:
        seen.append(event)
        if event["type"] == "step" and event["step"] == step:
            break
    events.close()
    return seen


def losses(events):
    return {e["step"]: e["loss"] for e in events if e["type"] == "step"}


def resumed_at(events):
    assert [e["type"] for e in events[:3]] == ["loading", "start", "resumed"]
    return events[2]["step"]


def left(out):
    return sorted(file.name for file in out.iterdir())


def check_same(whole, events, out, other):
    """The events end as those of the run that was never broken off, which is in `other`, and so does the adapter."""
    first, done = events[2]["step"] + 1, events[-1]
    assert losses(events) == {n: loss for n, loss in losses(whole).items() if n >= first}
    same = ("type", "steps", "stopped", "train_loss", "eval", "forgetting")
    assert {key: done[key] for key in same} == {key: whole[-1][key] for key in same}
    found, wanted = (load_file(folder / "adapter" / adapters.TENSORS) for folder in (out, other))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    rows = [adapters.read(folder / "adapter").result["heldout"] for folder in (out, other)]
    assert rows[0] == rows[1] and left(out) == ["adapter"]


def check_resumed(spec, tmp_path, step):
    whole = list(train(spec, tmp_path / "whole"))
    before = losses(until(spec, tmp_path / "run", step))
    assert before.items() <= losses(whole).items() and CHECKPOINT in left(tmp_path / "run")
    events = list(train(spec, tmp_path / "run", resume=True))
    assert resumed_at(events) == step - 1
    check_same(whole, events, tmp_path / "run", tmp_path / "whole")


def taken(run, until, stream=None):
    """The losses of a run's steps up to that one, without evaluations."""
    stream, seen = stream or run.batches.after(run.steps_done), []
    for pieces in islice(stream, until - run.steps_done):
        list(run.launch(pieces))
        seen += [event["loss"] for event in run.fetch(time.perf_counter() - 1e-3)]
    return seen


def check_steps(spec, tmp_path, kept):
    """The same of the steps alone: kept after so many, gone on with, and taken again in another run."""
    with closing(Run(spec, tmp_path / "whole")) as run, closing(Run(spec, tmp_path / "run")) as broken:
        whole = taken(run, STEPS)
        adapters.save(run.model, spec, tmp_path / "whole" / "adapter")
        stream = iter(broken.batches)
        before = taken(broken, kept, stream)
        assert not Checkpoint(broken).keep({"kept": True})
        before += taken(broken, kept + 1, stream)
        assert before == whole[: kept + 1]
        broken.saved_at = broken.steps_done
    with closing(Run(spec, tmp_path / "run")) as run:
        assert Checkpoint(run).resume() == ({"kept": True}, "") and run.steps_done == kept
        assert taken(run, STEPS) == whole[kept:] and run.losses == whole
        adapters.save(run.model, spec, tmp_path / "run" / "adapter")
    found, wanted = (load_file(tmp_path / n / "adapter" / adapters.TENSORS) for n in ("run", "whole"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@CPU
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_as_if_nothing_had_happened(method, tiny_model, gpt2_model, toy_task, tmp_path):
    """AdaLoRA cuts its ranks in the course of these steps."""
    model = gpt2_model if method == "bitfit" else tiny_model
    check_steps(small(model, method, steps=STEPS), tmp_path, random.Random(method).randint(1, STEPS - 1))


@CPU
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "fp32"])
def test_every_optimizer_does(optimizer, tiny_model, toy_task, tmp_path):
    """On matrices large enough for 8 bits."""
    used = {"optimizer_precision": "fp32"} if optimizer == "fp32" else {"optimizer": optimizer}
    check_steps(small(tiny_model, "last-block", steps=STEPS, **used), tmp_path, 4)


@CPU
@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"precision": "bf16"}, {"batch_size": 3}], ids=str
)
def test_so_does_every_setting(settings, tiny_model, toy_task, tmp_path):
    check_steps(small(tiny_model, "lora", steps=STEPS, **settings), tmp_path, 5)


RUNS = [
    {"method": "lora", "dropout": 0.3, "accumulation": 3}, {"method": "full", "precision": "bf16"}, {"method": "prompt"},
    {"method": "adalora", "steps": 25, "dropout": 0.1},
]  # fmt: skip


@CPU
@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_a_whole_run_does(settings, tiny_model, toy_task, tmp_path):
    spec = small(tiny_model, **{"steps": STEPS, **settings})
    check_resumed(spec, tmp_path, random.randint(2, spec.steps))


@pytest.fixture
def spec(toy_spec):
    return resolve(toy_spec.but(steps=STEPS))


def test_a_run_broken_off_again_and_again(spec, tmp_path):
    whole = list(train(spec, tmp_path / "whole"))
    until(spec, tmp_path / "run", 3)
    for step in (4, 5, 8):
        until(spec, tmp_path / "run", step, resume=True)
    events = list(train(spec, tmp_path / "run", resume=True))
    assert [e["when"] for e in events if e["type"] == "eval"] == ["after"]
    check_same(whole, events, tmp_path / "run", tmp_path / "whole")
    assert events[-1]["seconds"] > events[-1]["training_seconds"] > 0


@CPU
@pytest.mark.parametrize("step", [3, STEPS // 2, STEPS])
def test_a_run_that_leaves_says_nothing_more_and_goes_on_from_that_very_step(step, spec, tmp_path, monkeypatch):
    """Also in the midst of an evaluation."""
    monkeypatch.setattr(checkpoint, "SOONEST", 1e9)
    whole, out = list(train(spec, tmp_path / "whole")), tmp_path / "run"
    for last in train(spec, out):
        if last["type"] == "step" and last["step"] == step:
            (out / LEAVE).touch()
    assert last["type"] in ("step", "progress") and left(out) == ["adapter", CHECKPOINT, LEAVE]
    (out / LEAVE).unlink()
    events = list(train(spec, out, resume=True))
    assert resumed_at(events) == step
    check_same(whole, events, out, tmp_path / "whole")


@CPU
@pytest.mark.parametrize("step", [3, STEPS // 2])
def test_a_stopped_run_goes_on_from_that_very_step(step, spec, tmp_path, monkeypatch):
    """In the middle too, where the stop leaves an evaluation to be made."""
    monkeypatch.setattr(checkpoint, "SOONEST", 1e9)
    whole, out = list(train(spec, tmp_path / "whole")), tmp_path / "run"
    for done in train(spec, out):
        if done["type"] == "step" and done["step"] == step:
            (out / STOP).touch()
    assert done["stopped"] and left(out) == ["adapter", CHECKPOINT]
    events = list(train(spec, out, resume=True))
    assert resumed_at(events) == done["steps"] == step
    assert [e["when"] for e in events if e["type"] == "eval"] == ["during", "after"]
    check_same(whole, events, out, tmp_path / "whole")


def test_a_stop_that_came_with_the_end_is_heeded(spec, tmp_path):
    """It says what is there; the run goes on the next time."""
    until(spec, tmp_path, 5)
    (tmp_path / STOP).touch()
    *_, done = train(spec, tmp_path, resume=True)
    assert done["stopped"] and done["steps"] == 4 and left(tmp_path) == ["adapter", CHECKPOINT]
    *_, done = train(spec, tmp_path, resume=True)
    assert not done["stopped"] and done["steps"] == STEPS


def test_a_run_that_diverged_leaves_no_checkpoint(spec, tmp_path, monkeypatch):
    """It would diverge again. Resumed before, it falls back on the same step as the whole run."""
    monkeypatch.setattr(loop, "SNAPSHOTS", 3)  # a copy every other step
    said, judge = [], loop.Snapshots.judge
    for out, parts in ((tmp_path / "whole", []), (tmp_path / "run", [5, 6])):
        for step in parts:
            until(spec, out, step, resume=True)
        with monkeypatch.context() as patch:
            patch.setattr(
                loop.Snapshots, "judge", lambda s, done, *rest: "loss is bad" if done == 6 else judge(s, done, *rest)
            )
            with pytest.raises(Exception, match="after step 4 is kept") as error:
                list(train(spec, out, resume=True))
        said.append(str(error.value))
        assert left(out) == ["adapter"]
    assert said[0] == said[1]
    found, wanted = (load_file(tmp_path / n / "adapter" / adapters.TENSORS) for n in ("run", "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def cut(file):
    os.truncate(file, file.stat().st_size - 100)


def cut_short(file):
    os.truncate(file, 5)


def empty(file):
    file.write_bytes(b"")


def foreign(file):
    save_file({"x": torch.zeros(2)}, file)


def edited(**changes):
    def edit(file):
        from safetensors import safe_open

        with safe_open(file, "pt") as saved:
            state = json.loads(saved.metadata()["state"])
        save_file(load_file(file), file, {"state": json.dumps(state | changes)})

    return edit


def fewer_tensors(file):
    tensors = load_file(file)
    tensors.pop(max(tensors))
    rewritten(file, tensors)


def other_shapes(file):
    rewritten(file, {name: t.flatten() for name, t in load_file(file).items()})


def other_types(file):
    rewritten(file, {name: t.double() for name, t in load_file(file).items()})


def rewritten(file, tensors):
    from safetensors import safe_open

    with safe_open(file, "pt") as saved:
        metadata = saved.metadata()
    save_file(tensors, file, metadata)


SPOILT = [
    cut, cut_short, empty, foreign, fewer_tensors, other_shapes, other_types, edited(format=0), edited(task=""),
    edited(spec={"rank": 3}), edited(numbers={"no such parameter": {}}), edited(numbers={}),
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_checkpoint_that_cannot_be_used_is_left_alone(spoil, spec, tmp_path):
    """The run is what it would have been without."""
    with closing(Run(spec, tmp_path)) as run:
        whole = taken(run, 3)
        assert not Checkpoint(run).keep({})
    spoil(tmp_path / CHECKPOINT)
    with closing(Run(spec, tmp_path)) as run:
        state, why = Checkpoint(run).resume()
        assert state == {} and why.startswith("the checkpoint cannot be used (") and run.steps_done == 0
        assert taken(run, 3) == pytest.approx(whole, abs=0 if hardware.here().device == "cpu" else 1e-3)


def test_another_spec_starts_from_the_beginning(spec, tmp_path):
    until(spec, tmp_path, 5)
    events = until(resolve(spec.but(seed=3)), tmp_path, 1, resume=True)
    assert events[2]["message"] == (
        "This run starts from the beginning: the checkpoint cannot be used (its run has seed=0 (not 3))."
    )
    assert list(losses(events)) == [1]


def test_a_new_run_leaves_no_checkpoint_of_an_older_one(spec, tmp_path):
    until(spec, tmp_path, 5)
    assert len(losses(until(spec, tmp_path, 1))) == 1 and CHECKPOINT not in left(tmp_path)


@pytest.mark.parametrize("at", [1, 3])
def test_a_full_disk_ends_the_checkpoints_and_not_the_run(at, spec, tmp_path, monkeypatch):
    """What was written before is kept, and nothing half written."""
    whole, out, writes = list(train(spec, tmp_path / "whole")), tmp_path / "run", []

    def full(descriptor):
        writes.append(left(out))
        if len(writes) > 2 * (at - 1):  # each checkpoint waits for its file and for its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    events = list(train(spec, out, resume=True))
    (note,) = [e for e in events if e["type"] == "note"]
    assert note["message"].startswith("No more checkpoints are kept (No space left on device): ")
    assert f"{CHECKPOINT}.part" in writes[-1] and (CHECKPOINT in writes[-1]) == (at > 1) and len(writes) == 2 * at - 1
    check_same(whole, events, out, tmp_path / "whole")


def test_a_disk_with_no_room_for_checkpoint_and_adapter(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    events = until(spec, tmp_path, 4)
    assert sum(e["type"] == "note" for e in events) == 1 and left(tmp_path) == ["adapter"]


def test_an_optimizer_whose_state_has_no_place_in_the_file(spec, tmp_path, monkeypatch):
    """It is told once, and the run can only start from the beginning."""
    step = torch.optim.AdamW.step

    def stepped(self, *args):
        step(self, *args)
        for state in self.state.values():
            state["history"] = [1]

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    events = until(spec, tmp_path, 4)
    assert [e["message"] for e in events if e["type"] == "note"] == [
        "No more checkpoints are kept (the optimizer adamw keeps a list): if this run is interrupted, it goes on from an "
        "earlier step, or from the beginning."
    ]
    assert left(tmp_path) == ["adapter"]


def test_a_checkpoint_waits_until_the_last_one_has_paid_for_itself(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SOONEST", 1.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0.05)
    run = Run(spec, tmp_path)
    kept = Checkpoint(run)
    for at, due in ((0.5, False), (1.1, True)):
        run.training_seconds = at
        assert kept.due() == due
    kept.keep({})
    assert kept.written_at == 1.1 and 0 < kept.costs < 1
    kept.costs = 0.2
    for at, due in ((5.0, False), (5.2, True)):
        run.training_seconds = at
        assert kept.due() == due
    run.close()


@CPU
def test_a_process_killed_at_any_time(toy_spec, toy_file, tmp_path, monkeypatch):
    """By the signal that nothing can catch; on the command line, and with the file in the midst of being written too."""
    out = tmp_path / "run"
    spec = resolve(toy_spec.but(task=str(toy_file), steps=60, method="adalora", rank=4, dropout=0.1))
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    argv = ["train", "--spec", str(tmp_path / "spec.json"), "--out", str(out), "--json"]
    code = f"{OFTEN}; from peftlab.cli import main; main({argv!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    seen = []
    for line in child.stdout:
        seen.append(json.loads(line))
        if len(losses(seen)) == 3:
            time.sleep(random.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
            break
    seen += [json.loads(line) for line in child.stdout if line.endswith("\n")]
    assert child.wait() == -signal.SIGKILL and 3 <= len(losses(seen)) < 60
    must_go_on(spec, out)
    monkeypatch.setattr(checkpoint, "SOONEST", 1e9)
    events = list(train(spec, out, resume=True))
    assert resumed_at(events) >= len(losses(seen)) - 1
    whole = list(train(spec, tmp_path / "whole"))
    assert losses(seen).items() <= losses(whole).items()
    check_same(whole, events, out, tmp_path / "whole")


def test_the_command_line(tiny_model, toy_file, tmp_path, run):
    spec = RunSpec(model=str(tiny_model), task=str(toy_file), steps=4, precision="fp32")
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    out = tmp_path / "run"
    asked = ("train", "--spec", tmp_path / "spec.json", "--resume")

    def refused(*more):
        status, said, wrong = run(*asked, *more)
        assert status == 2 and not said and wrong.count("\n") == 1
        return wrong

    assert "--out is missing" in refused()
    assert "there is no run to resume" in refused("--out", out)
    out.mkdir()
    (out / "letter.txt").touch()
    assert "there is no run in this folder" in refused("--out", out)
    (out / "letter.txt").unlink()
    until(resolve(spec), out, 3)
    assert "its run has seed=0 (not 4); give its own folder" in refused("--out", out, "--seed", "4")
    status, said, told = run(*asked, "--out", out, "--json")
    assert status == 0 and [e["step"] for e in map(json.loads, said.splitlines()) if e["type"] == "resumed"] == [2]
    assert "resumed after step 2" in told
    assert "has come to its end" in refused("--out", out)
    assert "its run has seed=0" in refused("--out", out, "--seed", "4")


def test_with_no_checkpoint_yet_the_command_line_says_so(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SOONEST", 1e9)
    until(spec, tmp_path, 2)  # the adapter was kept
    must_go_on(spec, tmp_path)
    assert until(spec, tmp_path, 1, resume=True)[2]["message"] == (
        "This run starts from the beginning: there is no checkpoint."
    )
    with pytest.raises(SpecError, match="its run has seed=0 \\(not 1\\)"):
        must_go_on(resolve(spec.but(seed=1)), tmp_path)
