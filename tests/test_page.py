"""What the page takes from visitors: links that round-trip, and no way to this machine's files."""

import random
from types import SimpleNamespace

import gradio as gr
import pytest

import app
from demos import page
from peftlab import RunSpec, SpecError
from peftlab.memory import CONVENTIONS


def test_links_round_trip():
    draw = random.Random(0)
    for _ in range(50):
        spec = page.OPENING.but(
            model=draw.choice(["gpt2", "llama-2-7b", "100B"]),
            rank=draw.randint(1, 300),
            alpha=draw.choice([None, 0.5, 16.0]),
            task=draw.choice([None, "voice"]),
            layers=draw.choice([None, "first:4", "0-3,7"]),
        )
        convention = draw.choice([*CONVENTIONS, "exact"])
        params = dict(pair.split("=") for pair in app.to_link(spec, convention).split("&"))
        params = {name: value.replace("%3A", ":").replace("%2C", ",") for name, value in params.items()}
        assert app.from_link(params | {"tab": "lora", "__theme": "dark"}) == (spec, convention, "lora", "")


def test_the_opening_needs_no_query():
    assert app.to_link(page.OPENING, page.CONVENTION) == ""
    assert app.from_link({}) == (None, page.CONVENTION, None, "")


@pytest.mark.parametrize("params", [{"rank": "0"}, {"nosuch": "1"}, {"convention": "3n"}, {"task": "/etc/hosts"}])
def test_a_bad_link_says_what_is_wrong(params):
    spec, convention, _, problem = app.from_link(params)
    assert spec is None and convention == page.CONVENTION and problem.startswith("This link cannot be read: ")


@pytest.mark.parametrize("model", ["/etc/passwd", "../shared", "assets/tasks", "app.py", "~/.bashrc"])
def test_no_visitor_names_a_file(model):
    with pytest.raises(SpecError, match="no such model"):
        page.public({"model": model})


def test_hub_ids_and_counts_pass():
    for model in ("HuggingFaceTB/SmolLM2-135M", "1.5b", "gpt2"):
        assert page.public({"model": model}) == RunSpec(model=model)


ME, YOU = SimpleNamespace(session_hash="me"), SimpleNamespace(session_hash="you")


def is_skipped(answer) -> bool:
    return all(part == gr.skip() for part in answer)


def test_a_slow_look_does_not_undo_a_change_made_meanwhile():
    """A page asks for the exact figures as it opens; the link's settings arrive before they are there."""
    change = page.changing(lambda: ("rank 32",))
    look = page.looking(lambda then: (then(), "rank 8"))
    assert look(ME, lambda: None) == (None, "rank 8")
    assert is_skipped(look(ME, lambda: change(ME)))
    assert not is_skipped(look(ME, lambda: change(YOU)))  # somebody else's


def test_a_look_begun_during_a_change_saw_the_settings_before_it():
    overtaken = []

    def slowly():
        overtaken.append(page.made.since("me"))
        return ("rank 32",)

    assert page.changing(slowly)(ME) == ("rank 32",)
    assert overtaken[0]()


def test_of_two_changes_the_later_one_stands():
    later = page.changing(lambda: ("rank 32", "alpha 8"))
    answers = []

    def slowly():
        answers.append(later(ME))
        return ("rank 16", "alpha 16")

    assert is_skipped(page.changing(slowly)(ME))
    assert answers == [("rank 32", "alpha 8")]


def test_a_refused_change_drops_nobody_elses_answer():
    """The exact figures on their way stay wanted: nothing else would ask for them again."""

    def impossible():
        raise SpecError("rank=0: no")

    refused = page.changing(page.refusing(impossible, 2))
    look = page.looking(lambda then: (then(), "exact"))
    (answer, exact) = look(ME, lambda: refused(ME))
    assert exact == "exact" and answer[0] == "rank=0: no" and is_skipped(answer[1:])
