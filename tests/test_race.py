"""Races: one racer's end is its own, the board is what the runs gave, intervals are those of a library."""

import csv
import gc
import io
import json
import math
from statistics import fmean

import numpy as np
import pytest
from peft.tuners.lora import LoraLayer
from scipy import stats

from peftlab import RunSpec, SpecError, resolve
from peftlab.count import count
from peftlab.race import COLUMNS, Line, Racer, along, bootstrap, column, race, ranked, to_csv
from peftlab.run import STOP


@pytest.fixture
def spec(tiny_model, toy_task):
    return RunSpec(model=str(tiny_model), task="toy", learning_rate=1e-2, steps=4)


def lines_of(events):
    return [Line(**line) for line in events[-1]["lines"]]


def test_one_that_diverges_ends_alone(spec, tmp_path):
    racers = along(spec, {"method": ["lora", "ia3", "full", "houlsby"]})
    racers[2] = Racer("Full, far too fast", resolve(spec.but(method="full", learning_rate=10, steps=40)))
    events = list(race(racers, tmp_path))
    lines = lines_of(events)
    assert [line.name for line in lines] == [racer.name for racer in racers]
    assert "diverged at a learning rate of 10" in lines[2].error and not lines[2].scores
    for racer, line in zip(racers, lines, strict=True):
        assert line.trainable_parameters == count(resolve(racer.spec)).trainable_parameters
        if not line.error:
            assert line.steps == 4 and len(line.losses[0]) == 4 and line.scores[0] and 0 <= line.score <= 1
            assert math.isfinite(line.loss[0]) and math.isfinite(line.forgetting[0]) and line.apart > 0
    assert lines[0].merged > 0 and lines[3].merged is None  # a bottleneck cannot be merged


def test_a_race_of_two_seeds_that_goes_on_from_one(spec, tmp_path):
    """All see the same rows in the same order; the line is what the adapter says; nothing stays in memory or on the disk."""

    def adapted():
        return sum(isinstance(thing, LoraLayer) for thing in gc.get_objects())

    racers = along(spec, {"rank": ["1", "2"]})
    gc.collect()
    before, first = adapted(), list(race(racers[:1], tmp_path))
    gc.disable()
    told = [(event, adapted()) for event in race(racers, tmp_path, seeds=2, known=lines_of(first))]
    gc.enable()
    assert all(left == before for event, left in told if event["type"] == "line")
    events = [event for event, _ in told]
    assert not list(tmp_path.iterdir())  # a full fine-tuning is as large as its base
    assert [e["racer"] for e in events if e["type"] == "line"] == [1, 0, 1]  # all have a seed before one has two
    own = [e["event"] for e in first + events if e["type"] == "run"]
    kinds, done = [e["type"] for e in own], [e for e in own if e["type"] == "done"]
    before = [e for e in own if e["type"] == "eval" and e["when"] == "before"]
    assert all(e["metrics"] == before[0]["metrics"] and e["examples"] == before[0]["examples"] for e in before)
    second = kinds.index("loading", 1)
    assert kinds[second : second + 3] == ["loading", "start", "eval"]  # the base is measured once: nothing in between
    one, other = lines = lines_of(events)
    assert one.losses[0][0] == pytest.approx(other.losses[0][0], rel=1e-4)  # LoRA starts as the base
    assert one.base_scores == other.base_scores and one.base_loss == other.base_loss and one.losses[0] != one.losses[1]
    for line, runs in zip(lines, (done[::2], done[1::2]), strict=True):
        assert line.forgetting == [e["forgetting"] for e in runs] and line.steps == runs[0]["steps"]
        assert [fmean(seed) for seed in line.scores] == pytest.approx([e["eval"]["after"]["exact_match"] for e in runs])


def test_a_stop_ends_the_race_and_keeps_what_is_there(spec, tmp_path):
    seen = []
    for event in race(along(spec, {"rank": ["1", "2", "4"]}), tmp_path):
        seen.append(event)
        if event["type"] == "line" and event["racer"] == 0:
            (tmp_path / STOP).touch()
    lines = lines_of(seen)
    assert seen[-1]["stopped"] and [len(line.scores) for line in lines] == [1, 0, 0]
    assert not (tmp_path / STOP).exists()


def test_a_budget_in_seconds_gives_each_the_steps_that_fit(spec, tmp_path):
    racer = Racer("one", resolve(spec))
    (line,) = lines_of(list(race([racer], tmp_path, seconds=0.1)))
    assert line.steps >= 1 and line.training_seconds[0] < 5
    with pytest.raises(SpecError, match="seconds=0"):
        list(race([racer], tmp_path, seconds=0.0))


def test_what_is_no_race_is_refused(spec):
    for setting, values, says in (
        ("rank", ["8"], "at least 2"),
        ("rank", ["8", "8"], "at least 2"),
        ("rnak", ["1", "2"], "no such setting; did you mean rank"),
        ("rank", ["1", "much"], "rank=much"),
        ("method", ["lora", "lorra"], "lorra"),
    ):
        with pytest.raises(SpecError, match=says):
            along(spec, {setting: values})
    with pytest.raises(SpecError, match="a race is of one task"):
        list(race([Racer(t, resolve(spec.but(task=t))) for t in ("toy", "ticket")], None))


def test_two_settings_race_in_every_combination_and_without_values_all_methods_that_suit_the_model(spec):
    racers = along(spec, {"method": ["lora", "full"], "learning-rate": ["1e-3", "1e-2"]})
    assert [racer.name for racer in racers] == [
        f"{method}, learning rate {rate}" for method in ("LoRA", "Full fine-tuning") for rate in ("1e-3", "1e-2")
    ]
    assert (racers[2].spec.method, racers[2].spec.learning_rate) == ("full", 1e-3)
    found = {racer.spec.method for racer in along(spec, {"method": []})}
    assert "bitfit" not in found and {"lora", "full", "prompt", "houlsby", "ia3"} <= found


def board():
    """Lines of two racers that finished and one that did not."""
    counted = ({}, 10, 1.0, 20, 30)
    one = {"loss": [0.5], "forgetting": [0.1], "training_seconds": [2.0], "apart": 1.5, "steps": 4}
    other = {"loss": [0.2, 0.4], "forgetting": [0, 0.2], "training_seconds": [1, 2], "apart": 1.1}
    return [
        Line("a", *counted, scores=[[1, 0, 1, 1]], **one),
        Line("b", *counted, scores=[[1, 1, 1, 1], [1, 1, 1, 0]], **other),
        Line("c", *counted, error="it diverged"),
    ]


def test_sorting_puts_the_best_first_and_those_without_last():
    for by, order in (("score", "bac"), ("training_seconds", "bac"), ("steps", "abc"), ("merged", "abc")):
        assert [line.name for line in ranked(board(), by)] == list(order)
    with pytest.raises(SpecError, match="sort=scor.*score"):
        column("scor")


def test_the_csv_is_the_board():
    rows = list(csv.DictReader(io.StringIO(to_csv(board()))))
    for line, row in zip(board(), rows, strict=True):
        assert row["racer"] == line.name and row["error"] == (line.error or "")
        for c in COLUMNS:
            value, said = c.of(line), row[f"{c.title} ({c.unit})" if c.unit else c.title]
            assert (said == "") if value is None else float(said) == pytest.approx(value)


@pytest.mark.parametrize("values", [(1, 0, 1, 1, 0, 1, 1, 1, 0, 1) * 4, (0.5, 1, 0, 0.25) * 5], ids=len)
def test_the_interval_is_scipys(values):
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(1)).confidence_interval
    near = max(0.05 * (theirs.high - theirs.low), 1 / len(values) + 1e-9)  # a mean moves by whole rows
    assert bootstrap(values) == pytest.approx(tuple(theirs), abs=near)
    assert all(map(math.isnan, bootstrap(()))) and bootstrap((1.0, 1.0)) == (1.0, 1.0)


def test_the_command_line(run, tiny_model, toy_file, tmp_path):
    args = ("--model", tiny_model, "--task", toy_file, "--steps", 2, "--vary", "rank", 1, 2)
    status, out, err = run("race", *args, "--out", tmp_path / "race.json", "--csv", tmp_path / "race.csv")
    assert status == 0 and "rank 1: 1 of 1 seeds" in err and "95% interval" in out
    document = json.loads((tmp_path / "race.json").read_text())
    names = [line["name"] for line in document["lines"]]
    assert document["vary"] == {"rank": ["1", "2"]} and names == ["rank 1", "rank 2"]
    assert (tmp_path / "race.csv").read_text() == to_csv([Line(**line) for line in document["lines"]])
    assert run("race", *args, "--sort", "speed")[0] == 2
    file = tmp_path / "again.json"
    _, _, err = run("race", *args, "--vary", "learning-rate", "1e-4", "--out", file)
    assert "rank 2, learning rate 1e-4: 1 of 1" in err
    assert "of 1 seeds" not in run("race", *args, "--learning-rate", "1e-4", "--out", file)[2]  # nothing is left to run
    assert [line["name"] for line in json.loads(file.read_text())["lines"]] == names  # as this command says
    before = file.read_text()
    status, _, err = run("race", *args[:-2], 2, 4, "--learning-rate", "1e-4", "--out", file)
    assert status == 2 and "it has rank 1, which is not in this race" in err and file.read_text() == before
