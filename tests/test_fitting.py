"""A run that this machine's memory does not hold is refused, with what it needs, what is free and what would fit."""

import pickle
import threading
from dataclasses import replace

import pytest
import torch
from tiny import FREE, wait_for

from peftlab import RunSpec, hardware, resolve
from peftlab.base import weights
from peftlab.errors import DoesNotFit, SpecError
from peftlab.memory import here, must_fit
from peftlab.race import along, race
from peftlab.resolve import resolve_here
from peftlab.room import jobs
from peftlab.run import train
from peftlab.units import size


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    machine = hardware.Machine("cpu", "here", None, 2, 10**12)
    monkeypatch.setattr(hardware, "here", lambda: machine)


@pytest.fixture
def free(monkeypatch):
    """Makes so many bytes free."""
    return lambda n: monkeypatch.setattr(here, "_free", lambda: int(n))


def refusal(spec, **rest):
    with pytest.raises(DoesNotFit) as refused:
        must_fit(resolve_here(spec), **rest)
    return refused.value


def needs(spec):
    return here.peak(resolve_here(spec), 0).bytes


def test_a_refusal_has_the_need_what_is_free_and_a_change_that_fits_by_the_same_prediction(toy_spec, free):
    spec = toy_spec.but(batch_size=64)
    limit = (needs(spec) + needs(spec.but(batch_size=1, accumulation=64))) / 2
    free(limit)
    refused = refusal(spec)
    assert refused.settings == {"batch_size": 1, "accumulation": 64}
    changed = spec.but(**refused.settings)
    now = here.peak(resolve_here(changed), int(limit))
    assert now.bytes <= limit < needs(spec)
    assert str(refused) == (
        f"LoRA on tiny-llama, batch size 64: this needs {size(needs(spec))} of memory (by a trace of its step), and "
        f"{size(int(limit))} of it is free here; with batch size 1 and accumulation 64 it needs {size(now.bytes)}"
    )
    must_fit(resolve_here(changed))
    free(needs(spec))
    must_fit(resolve_here(spec))


RUNS = [
    (RunSpec(batch_size=4), 2e9, ["batch_size", "accumulation"]),
    (RunSpec(batch_size=1), 1e9, ["gradient_checkpointing"]),
    (RunSpec(batch_size=1, rank=512), 3e9, ["rank", "alpha"]),
    (RunSpec(method="full"), 3e9, ["method", "precision", "learning_rate"]),
    (RunSpec(model="smollm2-1.7b", batch_size=1, quantization="nf4"), 6e8, ["model"]),
    (RunSpec(model="smollm2-1.7b"), 1e9, ["batch_size", "accumulation", "model"]),
    (RunSpec(), 1e7, []),
]


@pytest.mark.parametrize("spec, limit, names", RUNS, ids=lambda value: str(value) if isinstance(value, list) else "")
def test_the_cheapest_change_comes_first_and_a_smaller_model_last(spec, limit, names, free, monkeypatch):
    def cannot(*_, **__):
        raise SpecError("no trace")

    monkeypatch.setattr(here, "exact", cannot)  # the closed form decides where a step cannot be traced
    free(limit)
    refused = refusal(spec)
    assert list(refused.settings) == names and "(by the closed form)" in str(refused)
    if names:
        must_fit(resolve_here(spec.but(**refused.settings)))
    else:
        assert str(refused).endswith("train a smaller model, or on a machine with more")


def test_a_smaller_model_is_one_that_the_host_offers(free):
    free(1e9)
    spec = RunSpec(model="smollm2-1.7b", batch_size=1, gradient_checkpointing=True, quantization="nf4")
    assert refusal(spec).settings["model"] != "smollm2-135m"
    assert refusal(spec, offered=["smollm2-135m"]).settings == {"model": "smollm2-135m"}
    assert refusal(spec, offered=["smollm2-1.7b"]).settings == {}


def test_what_is_not_known_is_let_through(toy_spec, free, monkeypatch):
    must_fit(resolve_here(toy_spec.but(batch_size=4096)))  # what is free
    free(1)
    monkeypatch.setattr(here, "_bytes", lambda report: float("inf"))
    must_fit(resolve_here(toy_spec))


def test_rows_shorter_than_the_longest_allowed_count_as_they_are(toy_spec, free):
    spec = toy_spec.but(sequence_length=256, batch_size=64)
    assert needs(spec) == needs(spec.but(sequence_length=96))
    free(here._closed(resolve_here(spec.but(sequence_length=96))))
    must_fit(resolve_here(spec))


def test_a_base_that_is_trained_in_place_stays_beside_its_copy(toy_spec):
    full = resolve_here(toy_spec.but(method="full"))
    report = here.predict(full)
    assert here._closed(full) == report.allocated + (1 + here.COPIES) * report.trainable_weights


def test_models_that_stay_loaded_are_let_go_where_a_run_needs_their_memory(nothing_loaded, toy_spec, tied_model, free):
    spec = resolve_here(toy_spec)
    weights.load(spec), weights.load(resolve(toy_spec.but(model=str(tied_model))))
    both = weights.allocated()
    free(here.peak(spec, 10**12).bytes + both)
    here.make_room(spec)
    assert weights.allocated() == both
    free(here.peak(spec, 10**12).bytes)
    here.make_room(spec)
    assert weights.loaded(spec) and weights.allocated() < both


def test_a_room_refuses_before_it_queues_and_again_where_a_run_begins(room, toy_spec, free, monkeypatch):
    began = []

    def trains(arguments, folder, again):
        began.append(arguments["spec"])
        yield from train(jobs.resolved(arguments["spec"]), folder)

    monkeypatch.setitem(jobs.WORK, "train", trains)
    arguments = {"spec": toy_spec.to_dict()}
    free(1000)
    with pytest.raises(DoesNotFit, match="1 kB of it is free"):
        room.start("train", arguments, "ann")
    assert room.running("ann") is None and not began
    free(10**12)
    monkeypatch.setattr(room, "_queue", lambda job: (free(1000), type(room)._queue(room, job)))  # while it waits
    job = room.start("train", arguments, "ann")
    wait_for(lambda: job.over)
    assert began and job.events[-1]["type"] == "error" and "1 kB of it is free" in job.events[-1]["message"]


def test_while_another_run_is_under_way_the_whole_memory_counts(room, toy_spec, free, monkeypatch):
    go = threading.Event()

    def waits(arguments, folder, again):
        yield {"type": "start"}
        assert go.wait(20)

    monkeypatch.setitem(jobs.WORK, "train", waits)
    arguments = {"spec": toy_spec.to_dict()}
    room.start("train", arguments, "ann")
    free(1000)
    last = room.start("train", arguments, "bob")
    small = replace(hardware.here(), memory_bytes=2000)
    monkeypatch.setattr(hardware, "here", lambda: small)
    with pytest.raises(DoesNotFit, match="this machine has 2 kB"):
        room.start("train", arguments, "cem")
    go.set()
    wait_for(lambda: last.over)


def test_each_racer_is_refused_by_itself_and_a_host_bounds_all_of_them(room, toy_spec, free, tmp_path):
    racers = along(toy_spec, {"batch_size": ["2", "512"]})
    small, large = (needs(racer.spec) for racer in racers)
    free((small + large) / 2)
    lines = list(race(racers, tmp_path, latency=False))[-1]["lines"]
    assert lines[0]["error"] is None and "batch size 512: this needs" in lines[1]["error"]
    racers = [(racer.name, racer.spec.but(steps=10_000).to_dict()) for racer in racers]
    with pytest.raises(SpecError, match=r"and a run here has at most 20,000,000; try \d+"):
        room.start("race", {"spec": toy_spec.to_dict(), "racers": racers}, "ann")
    with pytest.raises(SpecError, match="steps=1: .* lower the batch"):
        room.start("train", {"spec": toy_spec.but(steps=1, batch_size=60_000, accumulation=9).to_dict()}, "ann")


def test_the_command_line_says_it_in_a_line(run, toy_spec, toy_file, free, tmp_path):
    free(1000)
    status, out, err = run("train", "--model", toy_spec.model, "--task", toy_file, "--out", tmp_path / "out")
    assert status == 2 and not out and "of memory" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_refusal_passes_between_processes():
    error = pickle.loads(pickle.dumps(DoesNotFit("no", {"rank": 8}, "rank 8")))
    assert (str(error), error.settings, error.change) == ("no", {"rank": 8}, "rank 8")


MEMINFO = "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n"


@pytest.mark.parametrize(
    "line, files, expected",
    [
        ("0::/a/b", {}, 1_024_000),
        ("0::/a/b", {"a/memory.max": 900_000, "a/memory.current": 500_000, "a/memory.stat": "inactive_file 100000"}, 500_000),
        ("0::/a/b", {"a/memory.max": "max", "a/memory.current": 5, "a/memory.stat": ""}, 1_024_000),
        ("4:memory:/gone", {"memory/memory.limit_in_bytes": 900, "memory/memory.usage_in_bytes": 400,
                            "memory/memory.stat": "total_inactive_file 0"}, 500),
        ("0::/", {"memory.max": 100, "memory.current": 200, "memory.stat": ""}, 0),
    ],
)  # fmt: skip
def test_free_memory_is_what_the_system_and_every_group_leave(line, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "GROUPS", tmp_path / "groups")
    assert hardware.free_memory() is None
    texts = {"proc/meminfo": MEMINFO, "proc/self/cgroup": line}
    for name, text in (texts | {f"groups/{name}": text for name, text in files.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(text))
    assert hardware.free_memory() == expected


def test_models_in_memory_count_as_free_but_not_what_counts_as_free_already(monkeypatch):
    monkeypatch.setattr(hardware, "free_memory", lambda: 1000)
    monkeypatch.setattr(weights, "allocated", lambda: 50)
    monkeypatch.setattr(hardware, "mapped_files", lambda: 20)
    assert FREE() == 1030
    monkeypatch.setattr(hardware, "mapped_files", lambda: 70)
    assert FREE() == 1000
    monkeypatch.setattr(hardware, "free_memory", lambda: None)
    assert FREE() is None
    gpu = replace(hardware.here(), device="cuda")
    monkeypatch.setattr(hardware, "here", lambda: gpu)
    for name, bytes_ in (("mem_get_info", (500, 1000)), ("memory_reserved", 300), ("memory_allocated", 200)):
        monkeypatch.setattr(torch.cuda, name, lambda bytes_=bytes_: bytes_)
    assert FREE() == 500 + 300 - 200 + 50


def test_a_huge_batch_that_does_not_fit_is_offered_a_smaller_one_and_not_as_many_passes(toy_spec, free):
    spec = toy_spec.but(batch_size=2000)
    limit = needs(spec) / 3
    free(limit)
    refused = refusal(spec)
    (size,) = refused.settings.values()
    assert list(refused.settings) == ["batch_size"] and 1 < size < 2000 and size & (size - 1) == 0
    assert f"; with batch size {size} it needs" in str(refused) and refused.change == f"batch size {size}"
    assert needs(spec.but(batch_size=size)) <= limit < needs(spec.but(batch_size=2 * size))
    must_fit(resolve_here(spec.but(**refused.settings)))


def test_a_smaller_model_for_a_huge_batch_comes_with_a_smaller_batch(free, monkeypatch):
    monkeypatch.setattr(here, "_widest", lambda spec: here.Widest(spec.sequence_length, 0))
    monkeypatch.setattr(here, "peak", lambda spec, limit: here.Peak(here._closed(spec)))
    free(1e9)
    refused = refusal(RunSpec(model="smollm2-1.7b", batch_size=2000))
    assert list(refused.settings) == ["batch_size", "model"] and refused.settings["batch_size"] == 1
