"""What a host may set, how a value that cannot be is refused, and what the README tells a host."""

import json

import pytest
from tiny import ROOT

from peftlab import SpecError
from peftlab.data.tasks import TASKS
from peftlab.room import host

README = (ROOT / "README.md").read_text(encoding="utf-8")


def refused(name, text):
    with pytest.raises(SpecError) as said:
        host.Host.read({host.variable(name): text})
    assert "\n" not in str(said.value)
    return str(said.value)


HOME = "this home folder is not known here; write the whole path, such as /srv/peftlab"
WHOLE = "is a whole number from 1 on"


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("data", "~nosuchuser/x", HOME),
        ("copies", "~nosuchuser/x", HOME),
        ("models", ",", "it names no model; give keys by comma, such as smollm2-135m-instruct, or all"),
        ("models", " , ,", "it names no model; give keys by comma, such as smollm2-135m-instruct, or all"),
        ("models", "gpt2,gpt\n-3", "no such model as gpt -3; did you mean gpt2"),
        ("train", "perhaps", "neither yes nor no; write one of the two"),
        ("tokens", "0", f"the most tokens of a run {WHOLE}; try 20000000"),
        ("tokens", "1e999", f"the most tokens of a run {WHOLE}; try 20000000"),
        ("tokens", "9" * 5000, f"the most tokens of a run {WHOLE}; try 20000000"),
        ("tokens", "0", f"the most tokens of a run {WHOLE}; try 20000000"),
        ("models", "gpt-2", "no such model as gpt-2; did you mean gpt2"),
        ("queue", "1.5", f"the most runs that wait {WHOLE}; try 200"),
        ("queue", "-3", f"the most runs that wait {WHOLE}; try 200"),
        ("seconds", "soon", "the most seconds of a run's turn is a number from 1 on; try 3600"),
        ("seconds", "1h", "the most seconds of a run's turn is a number from 1 on; try 3600"),
        ("seconds", "nan", "the most seconds of a run's turn is a number from 1 on; try 3600"),
        ("disk", "10GB", "the most GB that runs take on the disk is a number from 0 on; try 10"),
        ("days", "-1", "the most days that a run is kept is a number from 0 on; try 30"),
        ("memory", "1.01", "the largest share of memory that loaded models take is a number from 0 to 1; try 0.5"),
        ("memory", "50%", "the largest share of memory that loaded models take is a number from 0 to 1; try 0.5"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_limit_and_an_example(name, text, said):
    shown = " ".join(text.split())
    assert refused(name, text).startswith(f"PEFTLAB_{name.upper()}={shown}: {said}")


def test_a_home_that_is_not_known_is_said_of_the_default_too(monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(host.Path, "expanduser", unknown)
    assert refused("queue", "5") == f"PEFTLAB_DATA=~/.local/share/peftlab: {HOME}"


def test_numbers_may_be_written_as_people_write_them():
    for text in ("20000000", "2e7", "20_000_000", " 20000000.0 "):
        tokens = host.Host.read({"PEFTLAB_TOKENS": text}).tokens
        assert tokens == 20_000_000 and isinstance(tokens, int)
    read = host.Host.read({"PEFTLAB_SECONDS": "1.5", "PEFTLAB_MEMORY": "1", "PEFTLAB_DISK": "0"})
    assert (read.seconds, read.memory, read.disk) == (1.5, 1, 0)


def test_no_word_on_models_is_all_of_them():
    for text in ("", "all"):
        assert host.Host.read({"PEFTLAB_MODELS": text}).models == ()
    assert {name: default for name, default, _ in host.table()}["PEFTLAB_MODELS"] == "all"
    assert host.Host.read({"PEFTLAB_MODELS": "gpt2, smollm2-135m,"}).models == ("gpt2", "smollm2-135m")


def test_the_tokens_of_the_default_run_are_those_of_the_ticket_task():
    ticket, meaning = TASKS["ticket"], {name: meaning for name, _, meaning in host.table()}["PEFTLAB_TOKENS"]
    steps, batch = ticket.on_gpu
    assert f"{ticket.steps * ticket.batch_size * ticket.sequence_length:,} on a CPU" in meaning
    assert f"{steps * batch * ticket.sequence_length:,} on a GPU" in meaning


def recording(name):
    return json.loads((ROOT / f"assets/measured/{name}.json").read_text())


def test_what_a_class_waits_is_from_the_recordings_that_are_named():
    part = " ".join(README.split("## A room full of people")[1].split("## The tree")[0].split())
    cpu, gpu = recording("train-ticket-cpu"), recording("reliability-ticket-h200")
    on_cpu, on_gpu, ticket = cpu["events"][-1]["seconds"], gpu["wait_seconds"], TASKS["ticket"]
    assert (cpu["spec"]["steps"], cpu["spec"]["batch_size"]) == (ticket.steps, ticket.batch_size)
    assert (gpu["spec"]["steps"], gpu["spec"]["batch_size"]) == tuple(ticket.on_gpu)
    assert f"{cpu['hardware']} the default run took {on_cpu:.0f} s (`train-ticket-cpu.json`)" in part
    assert f"so about {49 * on_cpu / 60:.0f} minutes" in part
    assert f"{gpu['hardware']} it had its score after {on_gpu:.1f} s (`reliability-ticket-h200.json`)" in part
    assert f": about {49 * on_gpu / 60:.0f} minutes" in part
    room = recording("room-visitors-cpu")["visitors"]
    assert room["visitors"] == 50 and room["different"] == room["foreign_messages"] == room["errors"] == 0
    assert f"Of the 50 runs {room['cancelled']} were cancelled, and the other {room['finished']} came out" in part
