"""Races: one racer's end is its own, the board is what the runs gave, intervals are those of a library."""

import csv
import gc
import io
import json
import math

import pytest
from peft.tuners.lora import LoraLayer

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


def test_all_see_the_same_rows_in_the_same_order(spec, tmp_path):
    racers = along(spec, {"rank": ["1", "2"]})
    events = list(race(racers, tmp_path, seeds=2))
    lines = lines_of(events)
    assert [len(line.scores) for line in lines] == [2, 2]
    first, other = (line.losses[0][0] for line in lines)
    assert first == pytest.approx(other, rel=1e-4)  # LoRA starts as the base: the first loss is of the rows alone
    assert lines[0].base_scores == lines[1].base_scores and lines[0].base_loss == lines[1].base_loss
    assert lines[0].losses[0] != lines[0].losses[1]
    assert [e["racer"] for e in events if e["type"] == "line"] == [0, 1, 0, 1]  # all have a seed before one has two


def test_the_line_is_what_the_adapter_says(spec, tmp_path):
    events = list(race(along(spec, {"method": ["lora", "full"]}), tmp_path))
    for i, line in enumerate(lines_of(events)):
        (done,) = (e["event"] for e in events if e.get("racer") == i and e.get("event", {}).get("type") == "done")
        assert line.forgetting == [done["forgetting"]] and line.steps == done["steps"]
        assert line.score == pytest.approx(next(iter(done["eval"]["after"].values())))
    assert not list(tmp_path.iterdir())  # a full fine-tuning is as large as its base


def test_a_racer_leaves_nothing_in_memory(spec, tmp_path):
    def adapted():
        return sum(isinstance(thing, LoraLayer) for thing in gc.get_objects())

    gc.collect()
    before = adapted()
    gc.disable()
    try:
        for event in race(along(spec, {"rank": ["1", "2"]}), tmp_path):
            if event["type"] == "line":
                assert adapted() == before
    finally:
        gc.enable()


def test_a_race_goes_on_from_what_is_known(spec, tmp_path):
    racers = along(spec, {"rank": ["1", "2"]})
    first = lines_of(list(race(racers, tmp_path)))
    events = list(race(racers, tmp_path, seeds=2, known=first))
    assert {e["seed"] for e in events if e["type"] == "run"} == {1}
    for before, after in zip(first, lines_of(events), strict=True):
        assert after.scores[:1] == before.scores and len(after.scores) == 2


def test_a_stop_ends_the_race_and_keeps_what_is_there(spec, tmp_path):
    events = race(along(spec, {"rank": ["1", "2", "4"]}), tmp_path)
    seen = []
    for event in events:
        seen.append(event)
        if event["type"] == "line" and event["racer"] == 0:
            (tmp_path / STOP).touch()
    lines = lines_of(seen)
    assert seen[-1]["stopped"] and [len(line.scores) for line in lines] == [1, 0, 0]
    assert not (tmp_path / STOP).exists()


def test_a_budget_in_seconds_gives_each_the_steps_that_fit(spec, tmp_path):
    lines = lines_of(list(race(along(spec, {"rank": ["1", "64"]}), tmp_path, seconds=0.5)))
    assert all(line.steps >= 1 and line.training_seconds[0] < 5 for line in lines)
    with pytest.raises(SpecError, match="seconds=0"):
        list(race(along(spec, {"rank": ["1", "64"]}), tmp_path, seconds=0.0))


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


def test_two_settings_race_in_every_combination(spec):
    racers = along(spec, {"method": ["lora", "full"], "learning-rate": ["1e-3", "1e-2"]})
    assert [racer.name for racer in racers] == [
        f"{method}, learning rate {rate}" for method in ("LoRA", "Full fine-tuning") for rate in ("1e-3", "1e-2")
    ]
    assert [(racer.spec.method, racer.spec.learning_rate) for racer in racers][2] == ("full", 1e-3)


def test_the_base_is_measured_once(spec, tmp_path):
    events = [e["event"] for e in race(along(spec, {"rank": ["1", "2"]}), tmp_path) if e["type"] == "run"]
    before = [e for e in events if e["type"] == "eval" and e["when"] == "before"]
    assert before[0]["metrics"] == before[1]["metrics"] and before[0]["examples"] == before[1]["examples"]
    kinds = [e["type"] for e in events]
    second = kinds.index("loading", kinds.index("loading") + 1)
    assert kinds[second : second + 3] == ["loading", "start", "eval"]  # nothing is measured in between


def test_without_values_all_methods_that_suit_the_model(spec):
    found = [racer.spec.method for racer in along(spec, {"method": []})]
    assert "bitfit" not in found and {"lora", "full", "prompt", "houlsby", "ia3"} <= set(found)


def board():
    def line(name, scores, **more):
        return Line(name, {}, 10, 1.0, 20, 30, scores=scores, **more)

    return [
        line("a", [[1, 0, 1, 1]], loss=[0.5], forgetting=[0.1], training_seconds=[2.0], apart=1.5, steps=4),
        line(
            "b", [[1, 1, 1, 1], [1, 1, 1, 0]], loss=[0.2, 0.4], forgetting=[0, 0.2], training_seconds=[1, 2], apart=1.1
        ),
        line("c", [], error="it diverged"),
    ]


def test_sorting_puts_the_best_first_and_those_without_last():
    assert [line.name for line in ranked(board())] == ["b", "a", "c"]
    assert [line.name for line in ranked(board(), "training_seconds")] == ["b", "a", "c"]
    assert [line.name for line in ranked(board(), "steps")] == ["a", "b", "c"]
    assert [line.name for line in ranked(board(), "merged")] == ["a", "b", "c"]
    with pytest.raises(SpecError, match="sort=scor.*score"):
        column("scor")


def test_the_csv_is_the_board():
    rows = list(csv.DictReader(io.StringIO(to_csv(board()))))
    for line, row in zip(board(), rows, strict=True):
        assert row["racer"] == line.name and row["error"] == (line.error or "")
        for c in COLUMNS:
            value, said = c.of(line), row[f"{c.title} ({c.unit})" if c.unit else c.title]
            assert (said == "") if value is None else float(said) == pytest.approx(value)


@pytest.mark.parametrize(
    "values", [[1, 0, 1, 1, 0, 1, 1, 1, 0, 1] * 4, [0.5, 1, 0, 0.25] * 5, list(range(30))], ids=len
)
def test_the_interval_is_scipys(values):
    import numpy as np
    from scipy import stats

    theirs = stats.bootstrap(
        (np.asarray(values, float),), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    near = max(0.05 * (theirs.high - theirs.low), 1 / len(values) + 1e-9)  # a mean moves by whole rows
    assert bootstrap(values) == pytest.approx(tuple(theirs), abs=near)


def test_an_interval_of_nothing_and_of_one_number():
    assert all(map(math.isnan, bootstrap([]))) and bootstrap([1.0, 1.0]) == (1.0, 1.0)


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
