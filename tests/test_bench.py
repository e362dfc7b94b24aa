"""The measurements that a user can repeat: they run, compare like with like, and say what each took."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import run_of, steps

from peftlab import SpecError, hardware, resolve
from peftlab.base import models, weights
from peftlab.bench import peers, record, reliability
from peftlab.bench.peers import PEERS, YARDSTICK, Peer
from peftlab.bench.speed import random_weights, record_speed
from peftlab.data import tasks
from peftlab.run.batches import IGNORED

ON_CPU = hardware.here().device == "cpu"


@pytest.fixture
def spec(toy_spec):
    return toy_spec.but(steps=3, batch_size=2)


def test_every_trainer_that_is_installed_takes_the_same_steps(spec, tmp_path, monkeypatch):
    first, *_, last = PEERS
    assert (first, last) == ("peftlab", "Trainer with Liger")
    monkeypatch.setattr(torch, "compile", lambda model: model)  # to compile takes minutes
    document = record_speed(spec, tmp_path / "speed.json", print, seeds=2)
    assert document == json.loads((tmp_path / "speed.json").read_text())
    assert (document["floor_seconds"] is None) == ON_CPU and YARDSTICK in (tmp_path / "speed.svg").read_text()
    for row in document["rows"]:
        if "is not installed" in row.get("error", ""):
            continue
        assert "error" not in row, row
        assert [run["seed"] for run in row["runs"]] == [0, 1][: 1 + PEERS[row["name"]].seeded]
        for run in row["runs"]:
            assert run["step_seconds"] > 0 and run["tokens_per_second"] > 0 and 0 <= run["score"] <= 1


def test_a_recipe_is_scored_over_seeds_on_all_held_out_rows(spec, tmp_path, monkeypatch):
    toy = tasks.TASKS["toy"]
    monkeypatch.setitem(tasks.TASKS, "toy", replace(toy, more=toy.train[:2]))
    document = reliability.record_reliability(spec.but(seed=5), tmp_path / "r.json", print, 2, beside=True)
    assert document == json.loads((tmp_path / "r.json").read_text())
    assert [run["seed"] for run in document["runs"]] == [5, 6] and document["items"] == 5
    scores = [run["score"] for run in document["runs"]]
    assert (document["mean"], document["worst"]) == (sum(scores) / 2, min(scores))
    assert all(run["score"] * 5 == round(run["score"] * 5) for run in document["runs"])
    assert all(0 < run["training_seconds"] < run["wait_seconds"] for run in document["runs"])
    assert document["trainer"]["wait_seconds"] > document["trainer"]["training_seconds"] > 0


def test_each_methods_gear_is_listed(spec, tmp_path, monkeypatch):
    monkeypatch.setattr("peftlab.bench.record.METHODS", ("lora", "adalora", "bitfit"))
    document = record.record_gears(spec, tmp_path / "gears.json", print)
    assert document == json.loads((tmp_path / "gears.json").read_text())
    lora, adalora, bitfit = document["methods"]
    assert (lora["gear"], adalora["gear"]) == ("eager" if ON_CPU else "graph", "eager")
    assert "no bias" in bitfit["error"]


def test_random_weights_take_the_models_shapes_and_rows_of_one_length(spec, tied_model, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "DEFAULT", str(tied_model))  # whose tokenizer is lent
    asked = spec.but(sequence_length=64)
    document = record_speed(asked, tmp_path / "x.json", print, chosen=["peftlab"], random=True)
    (run,) = document["rows"][0]["runs"]
    assert document["random_weights"] and document["spec"]["model"] == asked.model and document["spec"]["task"] is None
    assert "score" not in run and run["step_seconds"] > 0
    made = resolve(random_weights(asked, tmp_path / "made"))
    base, own = weights.load(made), weights.load(resolve(asked))
    assert [p.shape for p in base.model.parameters()] == [p.shape for p in own.model.parameters()]
    assert all(58 < len(pair) <= 64 for pair in peers.pairs(base, made))


def test_the_yardstick_learns_what_ours_learns(spec, tmp_path):
    """Its losses are means over the same answers: after the same steps the adapters are the same."""
    spec = resolve(spec.but(steps=4))
    base = weights.load(spec)
    yardstick = peers.attached(base, spec)
    peers.by_trainer(base, yardstick, spec)
    for batch in (batch.trimmed() for batch in peers.batches(base, spec)):
        columns = peers.columns(batch)  # the mask covers padding alone
        assert columns["attention_mask"].sum() == batch.tokens and (columns["labels"] != IGNORED).sum() == batch.answers
    run = run_of(spec, tmp_path)
    ours = [p for p in run.model.parameters() if p.requires_grad]
    theirs = [p for p in yardstick.parameters() if p.requires_grad]
    steps(run, 4)
    near = 2e-3 if ON_CPU else 0.2  # Adam makes a whole step of a small gradient's rounding
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < near * b.norm()


def test_a_peer_that_fails_says_so_and_the_others_go_on(spec, tmp_path, monkeypatch):
    def broken(spec):
        raise RuntimeError("no such kernel")

    for name, package in (("broken", "torch"), ("absent", "no_such_package")):
        monkeypatch.setitem(PEERS, name, Peer(name, package, broken))
    document = record_speed(spec, tmp_path / "x.json", print, chosen=["broken", "absent", "peftlab"])
    failed, absent, ours = document["rows"]
    assert (failed["error"], absent["error"]) == ("RuntimeError: no such kernel", "no_such_package is not installed")
    assert len(ours["runs"]) == 1
    with pytest.raises(SpecError, match="peer=peftlap: .*did you mean peftlab"):
        record_speed(spec, tmp_path / "x.json", print, chosen=["peftlap"])


def test_decoding_is_held_against_transformers(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "TOKENS", 8)  # as many as are timed; the text is compared over more
    document = record.record_generation(spec, tmp_path / "generation.json", print)
    asked = [(row["model"], row["streams"]) for row in document["rows"]]
    assert asked == [(model, streams) for model in ("base", "lora") for streams in record.STREAMS]
    assert document["same_text_in_fp32"]
    assert all(row["peftlab"] > 0 and row["transformers"] > 0 for row in document["rows"])
