"""What the page takes from visitors: links that round-trip, and no way to this machine's files."""

import random

import pytest

gr = pytest.importorskip("gradio")

from starlette.applications import Starlette
from starlette.testclient import TestClient

import app
from demos.page import address
from peftlab import RunSpec, SpecError
from peftlab.bench import visitors
from peftlab.memory import CONVENTIONS

STORE = app.demo.store


def test_links_round_trip():
    draw = random.Random(0)
    for _ in range(50):
        spec = address.OPENING.but(
            model=draw.choice(["gpt2", "llama-2-7b", "100B"]),
            rank=draw.randint(1, 300),
            alpha=draw.choice([None, 0.5, 16.0]),
            task=draw.choice([None, "voice"]),
            layers=draw.choice([None, "first:4", "0-3,7"]),
        )
        choices = {"convention": draw.choice([*CONVENTIONS, "exact"]), "sort": draw.choice(["score", "forgetting"])}
        asked = STORE.read(address.link(spec, **choices))
        assert asked.spec == spec and choices.items() <= asked.choices.items()
        assert STORE.read(STORE.link(asked)).choices == asked.choices
    assert STORE.read({}).spec == address.OPENING and STORE.link(STORE.read({})) == {}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("rank", "0", "at least 1"),
        ("rank", "abc", "whole number"),
        ("rank", "1000000000", "at most 65536"),
        ("nosuch", "1", "no such setting"),
        ("convention", "3n", "no such convention"),
        ("task", "/etc/hosts", "no such task"),
        ("lesson", "x", "no such lesson"),
        ("prompt", "x" * 2001, "shorten it"),
        ("model", "x" * 20_001, "shorten it"),
        ("temperature", "nan", "from 0 to"),
    ],
)
def test_a_refused_setting_is_said_and_the_rest_is_shown(name, value, says):
    answer = STORE.answer({"number": 7, "tab": "memory", "state": {"batch_size": "2", name: value}})
    assert says in answer["problems"][name] and list(answer["problems"]) == [name]
    assert answer["number"] == 7 and answer["state"] == {"batch_size": "2", name: value}
    assert answer["show"]["memory.batch_size"]["value"] == 2


@pytest.mark.parametrize(
    "question", [{}, {"tab": "x"}, {"state": None}, {"state": [1]}, {"state": {}, "open": 3, "tab": "lora"}]
)
def test_a_question_that_is_none_is_answered_without_a_traceback(question):
    assert set(STORE.answer(question)) >= {"show", "problems", "state"}


@pytest.mark.parametrize("model", ["/etc/passwd", "../shared", "assets/tasks", "app.py", "~/.bashrc", "xxxxxxxxxxxx"])
def test_no_visitor_names_a_file(model):
    with pytest.raises(SpecError, match="no such model") as refused:
        address.public({"model": model})
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-135M", "1.5b", "gpt2", "13 B"])
def test_hub_ids_and_counts_pass(model):
    assert address.public({"model": model}) == RunSpec(model=model)


def test_the_foot_of_the_page_tells_how_far_the_base_model_is_until_that_is_over(monkeypatch):
    (path,) = visitors._fetched({"js_on_load": app.FOLLOW})
    routes = TestClient(Starlette(routes=app.demo.routes))
    about = app.preparation
    begun = []
    monkeypatch.setattr(about, "begin", lambda: begun.append(1))
    for state, again, said in (
        ({"ready_at": None, "error": None}, True, "looking"),
        ({"ready_at": None, "error": "no <network>"}, False, "no &lt;network&gt;"),
        ({"ready_at": app.BEGUN + 9.5, "error": None}, False, "ready 9.5 s after the server began"),
    ):
        for name, value in state.items():
            monkeypatch.setattr(about, name, value)
        told = routes.get(f"/{path}").json()
        assert told["again"] is again and said in told["chip"] and ("<button" in told["chip"]) is bool(state["error"])
    assert not begun and routes.post(f"/{path}").json()["chip"] and begun


def test_the_page_itself_sends_no_event_as_it_opens():
    """An event of Gradio's costs the server as much as three answers, and everybody who comes would send it."""
    config = app.demo.get_config_file()
    assert not [c for c in config["components"] if c["type"] == "timer"]
    assert not [
        t for of in config["dependencies"] if of["backend_fn"] for t in of["targets"] if t[1] in ("load", "tick")
    ]
