"""The race tab without a browser: what a link carries, the board, and what may race here."""

import csv
import io

import pytest

pytest.importorskip("gradio")

from demos import method_race
from demos.method_race import CARRIED, Choice, board, findings, racers, so_far, status, suited
from peftlab import RunSpec, SpecError
from peftlab.lessons import LESSONS
from peftlab.race import COLUMNS, ranked


@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        Choice("rank", "forgetting"),
        Choice("modules", values="query,value;query,key;all-linear", seconds="5", seeds="2"),
        Choice("rate", values="1e-3;3e-3"),
    ],
    ids=lambda choice: choice.query(),
)
def test_the_link_carries_the_choice(choice):
    assert Choice.read(choice.query()) == choice
    assert bool(choice.query()) == (choice != Choice())
    assert not set(CARRIED) & set(RunSpec.__dataclass_fields__)  # the settings' own words


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("lesson=rnk", "lesson=rnk"),
        ("sort=colour", "sort=colour"),
        ("seconds=-1", "seconds=-1"),
        ("seconds=inf", "seconds=inf"),
        ("seeds=99", "at most 5"),
        ("seeds=x", "seeds=x"),
    ],
)
def test_a_link_that_is_none_is_refused(query, says):
    with pytest.raises(SpecError, match=says):
        Choice.read(query)


@pytest.mark.parametrize("key", LESSONS)
@pytest.mark.parametrize("sort", [c.key for c in COLUMNS])
def test_the_board_is_sorted_as_asked(key, sort):
    lines = method_race.recorded(key).lines
    made = board(lines, sort)
    rows = list(csv.DictReader(io.StringIO(made["csv"])))
    order = [line.name for line in ranked(lines, sort)]
    assert [row["racer"] for row in rows] == order
    places = [made["html"].index(f"<b>{method_race.escape(name)}</b>") for name in order[:3]]
    assert places == sorted(places) and made["sort"] == sort


def test_a_column_nobody_has_is_not_shown():
    assert "time a token" not in board(method_race.recorded("rank").lines, "score")["html"]


@pytest.mark.parametrize("key", LESSONS)
def test_each_lesson_runs_live_whatever_is_set(key):
    """On a model and method that other tabs may have chosen, and with only names that the chooser knows."""
    spec = RunSpec(model="llama-3.1-8b", method="ia3")
    field = racers(spec, Choice(key))
    raced = set(LESSONS[key].values) if key == "size" else {"smollm2-135m-instruct"}
    assert len(field) == len(LESSONS[key].values) and {r.spec.model for r in field} == raced
    assert set(LESSONS[key].values) <= {value for _, value in suited(LESSONS[key], spec)}


def test_a_race_of_one_or_of_too_many_is_refused():
    with pytest.raises(SpecError, match="at least 2"):
        racers(RunSpec(), Choice("rank", values="8"))
    with pytest.raises(SpecError, match="at most 24"):
        racers(RunSpec(), Choice("rank", values=";".join(map(str, range(1, 30)))))


def test_what_is_not_ours_is_text():
    line = method_race.recorded("rank").lines[0]
    line = type(line)(**vars(line) | {"name": "<script>", "error": "<b>no"})
    assert "<script>" not in board([line], "score")["html"] and "<b>no" not in board([line], "score")["html"]


def test_findings_say_whether_each_claim_holds():
    for lesson in LESSONS.values():
        said = findings(lesson, lesson.recordings()[0].lines)
        assert said.count("holds here") + said.count("does not hold here") == len(lesson.claims)
        assert all(method_race.escape(claim.says) in said for claim in lesson.claims)


def test_the_bar_counts_runs_and_names_who_runs():
    lines = [vars(line) | {"scores": [], "error": None} for line in method_race.recorded("rank").lines[:2]]
    events = [
        {"type": "racers", "lines": lines, "seeds": 2},
        {"type": "run", "racer": 0, "seed": 0, "event": {"type": "step", "step": 3, "loss": 1.5}},
    ]
    found, running, last = so_far(events)
    assert running == {0: [1.5]} and f"{found[0].name}, step 3" in status(events, found, last)
    events.append({"type": "line", "racer": 0, "line": lines[0] | {"error": "it diverged"}})
    found, running, last = so_far(events)
    assert found[0].error and running == {0: [1.5]} and "2 of 4 runs" in status(events, found, last)


@pytest.mark.parametrize("model", ["llama-2-70b", "/etc", "bert-base"])
def test_only_models_that_train_here_race(model):
    with pytest.raises(SpecError, match=f"model={model}: no model that trains here"):
        racers(RunSpec(), Choice("size", values=f"smollm2-135m-instruct;{model}"))
