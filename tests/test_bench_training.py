"""The trainers that ours is held against: they run, on the same rows, and the document says what each took."""

import json

import pytest
from tiny import run_of, small

from peftlab import hardware, resolve
from peftlab.base import weights
from peftlab.bench import record_gears, record_generation, record_speed, training
from peftlab.bench.random_weights import random_weights
from peftlab.bench.training import PEERS, YARDSTICK
from peftlab.data import tasks
from peftlab.methods import METHODS
from peftlab.run.batches import IGNORED, encode


@pytest.fixture
def spec(toy_spec):
    return toy_spec.but(steps=3, batch_size=2)


def test_every_trainer_that_is_installed_takes_the_same_steps(spec, tmp_path, monkeypatch):
    monkeypatch.delitem(PEERS, "torch.compile")  # which takes minutes
    document = record_speed(spec, tmp_path / "speed.json", seeds=2, say=lambda line: None)
    assert document == json.loads((tmp_path / "speed.json").read_text())
    assert (document["floor_seconds"] is None) == (hardware.here().device == "cpu")
    for row in document["rows"]:
        if "is not installed" in row.get("error", ""):
            continue
        assert "error" not in row, row
        assert [run["seed"] for run in row["runs"]] == [0, 1][: 2 if row["name"] in training.SEEDED else 1]
        for run in row["runs"]:
            assert run["step_seconds"] > 0 and run["tokens_per_second"] > 0 and 0 <= run["score"] <= 1


def test_every_methods_gear_is_listed(spec, tmp_path):
    document = record_gears(spec, tmp_path / "gears.json", say=lambda line: None)
    assert document == json.loads((tmp_path / "gears.json").read_text())
    assert [m["method"] for m in document["methods"]] == list(METHODS)
    assert {m.get("gear") for m in document["methods"] if "error" not in m} == (
        {"eager"} if hardware.here().device == "cpu" else {"eager", "graph"}
    )


def test_random_weights_take_the_models_shapes_and_rows_of_one_length(spec, tied_model, tmp_path, monkeypatch):
    from peftlab.base import models

    monkeypatch.setattr(models, "DEFAULT", str(tied_model))  # whose tokenizer is lent
    asked = spec.but(sequence_length=64)
    document = record_speed(asked, tmp_path / "x.json", chosen=["peftlab"], random=True, say=lambda line: None)
    (run,) = document["rows"][0]["runs"]
    assert document["random_weights"] and document["spec"]["model"] == asked.model and document["spec"]["task"] is None
    assert "score" not in run and run["step_seconds"] > 0
    made = random_weights(asked, tmp_path / "made")
    base = weights.load(resolve(made))
    own = weights.load(resolve(asked))
    assert [p.shape for p in base.model.parameters()] == [p.shape for p in own.model.parameters()]
    lengths = {len(pair) for pair in encode(base.tokenizer, tasks.find(made.task), tasks.find(made.task).train)}
    assert max(lengths) <= 64 and min(lengths) > 58


def test_the_yardstick_learns_what_ours_learns(spec, monkeypatch, tmp_path):
    """Its losses are means over the same answers: after the same steps the adapters are the same."""
    seen = []
    monkeypatch.setattr(training, "_scored", lambda model, *_: seen.append(model) or 0.0)
    spec = resolve(spec.but(steps=4))
    PEERS[YARDSTICK][1](spec)
    run = run_of(spec, tmp_path)
    ours = [p for p in run.model.parameters() if p.requires_grad]
    theirs = [p for p in seen[0].parameters() if p.requires_grad]
    stream = iter(run.batches)
    for _ in range(4):
        list(run._launch(next(stream)))
    near = 2e-3 if hardware.here().device == "cpu" else 0.2  # Adam makes a whole step of a small gradient's rounding
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < near * b.norm()


def test_a_peer_that_fails_says_so_and_the_others_go_on(spec, tmp_path, monkeypatch):
    def broken(spec):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(PEERS, "broken", ("torch", broken))
    monkeypatch.setitem(PEERS, "absent", ("no_such_package", broken))
    rows = record_speed(spec, tmp_path / "x.json", chosen=["broken", "absent", "peftlab"], say=lambda line: None)[
        "rows"
    ]
    assert rows[0]["error"] == "RuntimeError: no such kernel" and rows[1]["error"] == "no_such_package is not installed"
    assert len(rows[2]["runs"]) == 1


def test_the_mask_covers_padding_alone(tiny_model, toy_task):
    spec = small(tiny_model, "lora", batch_size=4)
    batch = next(training._batches(spec, weights.load(resolve(spec))))
    columns = training._columns(batch)
    assert columns["attention_mask"].sum() == batch.tokens and (columns["labels"] != IGNORED).sum() == batch.answers


def test_decoding_is_held_against_transformers(spec, tmp_path):
    document = record_generation(spec, tmp_path / "generation.json", say=lambda line: None)
    assert [(row["model"], row["streams"]) for row in document["rows"]] == [
        ("base", 1),
        ("base", 4),
        ("lora", 1),
        ("lora", 4),
    ]
    assert document["same_text_in_fp32"]
    for row in document["rows"]:
        assert row["peftlab"] > 0 and row["transformers"] > 0
