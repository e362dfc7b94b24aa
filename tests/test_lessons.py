"""Lessons: the recorded races say what the page says they do, and the registry's learning rates come from the sweep."""

import json
from dataclasses import replace
from statistics import fmean

import pytest

from peftlab.count import count, why_not
from peftlab.lectures import lessons
from peftlab.lectures.lessons import LESSONS
from peftlab.lectures.statements import FAILS, HOLDS, OPEN, STATEMENTS
from peftlab.measured import MEASURED
from peftlab.methods import METHODS
from peftlab.race import Line
from peftlab.race.recordings import Board
from peftlab.resolve import resolve
from peftlab.show import figures, races
from peftlab.spec import RunSpec


def recorded(key):
    return LESSONS[key].recordings()[0]


def line(method="lora", score=0.5, **more):
    spec = resolve(RunSpec(method=method)).to_dict() | more.pop("settings", {})
    usual = {"loss": [0.1], "forgetting": [0.1], "training_seconds": [1.0], "apart": 1.5, "merged": 1.0, "steps": 40}
    right = round(40 * score)
    scores = {"scores": [[1.0] * right + [0.0] * (40 - right)]}
    return Line(method, spec, 10, 1.0, 20, 30, **usual | scores | more)


@pytest.mark.parametrize("key", LESSONS)
def test_every_statement_has_a_recorded_figure_and_every_question_an_answer(key):
    lesson, record = LESSONS[key], recorded(key)
    found = lesson.findings(record.lines)
    assert [statement for statement, _ in found] == lesson.statements
    for statement, each in found:
        assert each.words and (each.interval is not None) == (statement.test in ("scores", "one_rate"))
    assert lesson.answered(record.lines) in lesson.options
    assert "peftlab race" in record.commands[0] and record.hardware and record.versions["torch"]


def test_every_suitable_method_was_raced_and_learned():
    lines = {line.spec["method"]: line for line in recorded("methods").lines}
    assert set(lines) == {key for key in METHODS if not why_not(key, "smollm2-135m-instruct")}
    assert [(r.device, r.seeds) for r in LESSONS["methods"].recordings()] == [("cuda", (3, 3)), ("cpu", (1, 1))]
    for found in [*lines.values(), *LESSONS["methods"].recordings()[1].lines]:
        assert found.error is None and found.scores and all(loss < found.base_loss for loss in found.loss)
        assert found.trainable_parameters == count(resolve(RunSpec.from_dict(found.spec))).trainable_parameters
    assert lines["lora"].score >= lines["full"].score - 0.03


def test_the_default_learning_rates_are_as_good_as_the_best_of_the_sweep():
    board = Board(recorded("rate").lines)
    swept = {line.spec["method"] for line in board.lines}
    assert swept == {key for key in METHODS if not why_not(key, "smollm2-135m-instruct")}
    for method in swept:
        rate = resolve(RunSpec(method=method)).learning_rate
        assert board.score(method=method, learning_rate=rate) >= board.score(method=method) - lessons.NEAR, method
    board = Board(recorded("rank").lines)
    for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        rate = resolve(RunSpec(method="lora", rank=rank)).learning_rate
        assert board.score(rank=rank, learning_rate=rate) >= board.score(rank=rank) - lessons.NEAR, rank


def test_the_best_rate_is_where_the_score_is_highest_and_of_equals_the_loss_lowest():
    lines = [
        line(score=score, loss=[loss], settings={"learning_rate": rate})
        for rate, score, loss in ((1e-3, 0.5, 0.1), (3e-3, 0.7, 0.3), (1e-2, 0.7, 0.2), (3e-2, 0.1, 0.05))
    ]
    assert Board(lines).best("learning_rate", "lora") == 1e-2


def test_verdicts_turn_with_the_figures():
    def verdict(id, *lines):
        return lessons.raced(STATEMENTS[id], lines).verdict

    assert verdict("near-full", line("lora", 0.8), line("full", 0.8)) == HOLDS
    assert verdict("near-full", line("lora", 0.4), line("full", 0.8)) == FAILS
    assert verdict("full-better", line("lora", 0.8), line("full", 0.4)) == FAILS  # than the best of all others
    assert verdict("forgets-less", line("lora", forgetting=[0.1]), line("full", forgetting=[0.2])) == HOLDS
    assert verdict("forgets-less", line("lora", forgetting=[0.3]), line("full", forgetting=[0.2])) == FAILS
    ranks = [line(score=0.7, settings={"rank": rank}) for rank in (4, 8, 32, 64)]
    assert verdict("ranks-alike", *ranks) == HOLDS
    assert verdict("ranks-alike", *ranks[:-1], replace(ranks[-1], scores=[[0.0] * 40])) == FAILS
    rates = [line(method, settings={"learning_rate": rate}) for method, rate in (("lora", 1e-3), ("full", 1e-4))]
    assert verdict("lora-rate", *rates) == HOLDS
    assert verdict("lora-rate", *[replace(each, spec={**each.spec, "learning_rate": 1e-3}) for each in rates]) == FAILS
    assert LESSONS["methods"].findings([line("ia3")]) == []  # no statement has all its racers


def test_a_difference_within_its_interval_is_not_decided():
    """LoRA answers four rows of forty that full fine-tuning does not, and full fine-tuning five others."""
    rows = [1.0] * 20 + [0.0] * 11
    lora = line("lora", scores=[[*rows, *[1.0] * 4, *[0.0] * 5]])
    full = line("full", scores=[[*rows, *[0.0] * 4, *[1.0] * 5]])
    found = lessons.raced(STATEMENTS["near-full"], [lora, full])
    low, high = found.interval
    assert found.verdict == OPEN and low < -0.03 < high
    assert found.points == f"−{-100 * low:.0f} to +{100 * high:.0f} points"


def test_scores_are_compared_row_by_row_with_the_mean_over_seeds_and_racers():
    seeds = [[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    settings = [(method, {"training_rows": rows}) for method in ("lora", "full") for rows in (8, 16, 32)]
    found = lessons.raced(STATEMENTS["few-rows"], [line(method, settings=s, scores=seeds) for method, s in settings])
    assert found.interval == (0, 0) and found.verdict == HOLDS and found.words == "LoRA 50%, Full fine-tuning 50%"


def test_the_legend_names_what_all_know_and_of_a_few_all():
    every = recorded("rate").lines
    few = [line for line in every if line.spec["method"] in ("prompt", "prefix")]
    for lines, named in ((every, {"Full fine-tuning", "LoRA"}), (few, {"Prompt tuning", "Prefix tuning"})):
        chart = races.score_chart(lines, "learning_rate", "Exact records", "light")
        assert chart.layout.showlegend and {trace.name for trace in chart.data if trace.showlegend} == named


@pytest.mark.parametrize("key", LESSONS)
def test_charts_show_what_was_measured(key):
    theme = "light" if key == "rate" else "dark"
    lines = [x for x in recorded(key).lines if x.scores]
    chart = races.score_chart(lines, LESSONS[key].setting, "Exact records", theme)
    shown = sorted(value for trace in chart.data for value in (trace.x if trace.error_x.array is not None else trace.y))
    numbers = isinstance(lines[0].spec[LESSONS[key].setting], int | float)
    expected = lines if numbers else races.best_rates(lines)
    assert shown == pytest.approx(sorted(100 * x.score for x in expected))
    assert chart.layout.template.layout.font.color == figures.PALETTE[theme]["text"]
    losses = races.loss_chart(lines[:1], 40, theme).data[0]
    assert losses.y[0] == pytest.approx(fmean(run[0] for run in lines[0].losses)) and len(losses.y) == lines[0].steps
    names = [trace.name for trace in races.loss_chart(lines, 40, theme).data]
    assert len(names) == len(lines if len(lines) <= 24 else races.best_rates(lines))


def test_of_several_rates_the_best_of_each_racer_is_shown():
    lines = [
        line(method, score, settings={"learning_rate": rate})
        for method, rate, score in (("lora", 1e-3, 0.5), ("full", 1e-4, 0.4), ("lora", 3e-3, 0.7), ("lora", 1e-2, 0.7))
    ]
    assert races.best_rates(lines) == [lines[1], lines[2]]


def test_a_seed_under_way_is_in_the_mean_as_far_as_it_is():
    (trace,) = races.loss_chart([line(losses=[[4.0, 2.0, 1.0], [2.0]])], 3, "light").data
    assert list(trace.y) == [3.0, 2.0, 1.0]


def test_the_sentence_counts_who_is_there():
    done, failed, waiting = line("lora", 0.8, base_scores=[0.0] * 40), line("ia3"), line("full")
    failed.scores, failed.error, waiting.scores = [], "diverged", []
    said = races.race_sentence([failed, done, waiting])
    assert "Of 3 racers (1 ended early, 1 to come)" in said and "80%" in said and "Lowest" not in said
    assert "None has finished yet" in races.race_sentence([waiting])


@pytest.mark.parametrize("file", sorted(MEASURED.glob("race-*.json")), ids=lambda file: file.stem)
def test_recordings_hold_no_number_that_json_does_not_know(file):
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"it has {name}"))
