"""Answers kept as bytes: the same as fresh ones, bounded, and nothing of one visitor's in another's."""

import asyncio
import json

import pytest

gr = pytest.importorskip("gradio")

import app
from demos.memory_calculator import exact as trace
from demos.page import answers
from demos.page.answers import Answers
from peftlab import PeftlabError, RunSpec, resolve
from peftlab.memory import activations, closed_form
from peftlab.room import rooms, worker

STORE = app.demo.store
MEMORY = STORE.tabs["memory"]


@pytest.fixture
def kept():
    return Answers(STORE)


@pytest.fixture
def done(monkeypatch):
    """What the slow work gives, by its arguments: nothing until something is put here."""
    results = {}
    monkeypatch.setattr(worker, "known", lambda work, *arguments: results.get(arguments))

    async def once(work, *arguments):
        (spec,) = arguments
        results[arguments] = closed_form(spec).report()

    monkeypatch.setattr(worker, "once", once)
    return results


def asks(tab="memory", opened=(), kept=None, number=1, **state):
    """By default from a browser that has its token."""
    token = {"visitor": rooms.here().signer.sign("somebody")} if kept is None else kept
    return {"number": number, "tab": tab, "state": state, "kept": token, "open": list(opened)}


STATES = [
    {},
    {"rank": "64"},
    {"model": "gpt2", "method": "dora", "batch_size": "3", "sequence_length": "48"},
    {"model": "gemma-3-270m", "sequence_length": "2048", "gradient_checkpointing": "true"},
    {"model": "100B", "convention": "8n", "share": "0.7"},
    {"method": "prompt", "rank": "4"},
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("opened", [(), ("memory.numbers", "memory.room")])
def test_a_kept_answer_has_the_bytes_of_a_fresh_one(kept, state, opened):
    question = asks(opened=opened, number=7, **state)
    fresh = kept.made(question)
    assert kept.known(question) == fresh == Answers(STORE).made(question)
    assert json.loads(fresh) == json.loads(json.dumps(STORE.answer(question)))
    assert json.loads(kept.known({**question, "number": "x"})) == json.loads(fresh) | {"number": "x"}
    turned = dict(reversed(state.items()))
    assert kept.known(asks(opened=opened[::-1], number=7, **turned)) == fresh and len(kept.finished) == 1


def test_each_new_browser_gets_a_token_of_its_own_beside_what_is_kept(kept):
    kept.made(asks(rank="3", kept={"visitor": "forged"}))
    (finished,) = kept.finished.values()
    assert not {"visitor", "number"} & finished.parts.keys()
    tokens = [json.loads(kept.known(asks(rank="3", kept={})))["visitor"] for _ in range(2)]
    assert tokens[0] != tokens[1] and all(map(rooms.here().signer.read, tokens))
    assert "visitor" not in json.loads(kept.known(asks(rank="3")))


def test_what_is_refused_or_fails_is_not_kept(kept, monkeypatch):
    for state in ({"rank": "0"}, {"rank": "x", "model": "gpt2"}, {"model": "no such"}, {"nosuch": "1"}):
        assert json.loads(kept.made(asks(**state)))["problems"]
    monkeypatch.setattr(MEMORY, "draw", lambda asked: 1 / 0)
    assert "our fault" in json.loads(kept.made(asks()))["problems"][""]
    assert not kept.finished and kept.held == 0


def test_what_others_change_is_not_kept(kept):
    for question in (
        asks("live"),
        asks("compare"),
        asks(opened=["memory.measured"]),
        asks(opened=["memory.conventions"]),
    ):
        assert kept.key(sound(question)) is None and kept.known(question) is None
        assert json.loads(kept.made(question))["show"] and not kept.finished
    assert kept.key(sound(asks(text="x" * answers.LONGEST))) is None
    assert kept.key(sound(asks(rank=2**70))) is None
    folds = {panel for panel in MEMORY.changing if MEMORY.folded[panel]}
    assert folds == {"claims", "measured"}


def sound(question):
    return answers.sound(question)


def test_so_many_bytes_are_kept_and_the_latest_stay(kept):
    kept.room = 70_000
    for rank in range(1, 9):
        kept.made(asks(rank=str(rank)))
        kept.known(asks(rank="1"))
    sizes = [len(key) + one.size for key, one in kept.finished.items()]
    assert kept.held == sum(sizes) <= kept.room and 2 <= len(sizes) < 8
    assert [json.loads(key)[1]["rank"] for key in kept.finished][-1] == "1"
    kept.made(asks(rank="1"))
    assert kept.held == sum(len(key) + one.size for key, one in kept.finished.items())


def test_a_trace_that_is_done_takes_the_place_of_the_estimate(kept, done):
    question = asks(model="gpt2", rank="5")
    assert json.loads(kept.made(question))["slow"] and kept.known_exact(question) is None
    both = [resolve(RunSpec(model="gpt2", method=m, rank=5, gpu="h100-80gb")) for m in ("full", "lora")]
    exact = json.loads(asyncio.run(kept.made_exact(question)))
    assert len(done) == 2 and kept.known_exact(question) and json.loads(kept.known(question))["slow"] is False
    assert exact == json.loads(kept.known_exact(question)) == json.loads(json.dumps(asyncio.run(STORE.exact(question))))
    assert {spec.method for (spec,) in done} == {spec.method for spec in both} and trace
    done.clear()  # another question's trace, long after
    kept.made(other := asks(model="gpt2", rank="6"))
    assert kept.known(other)
    asyncio.run(worker.once(trace, *MEMORY.slow(STORE.read({"model": "gpt2", "rank": "6"}))[1].arguments))
    assert kept._find(kept.key(sound(other))) is None


def test_a_trace_that_fails_is_said_and_not_kept(kept, monkeypatch):
    async def fails(work, *arguments):
        raise PeftlabError("no trace")

    monkeypatch.setattr(worker, "once", fails)
    said = json.loads(asyncio.run(kept.made_exact(asks(rank="7"))))
    assert said["show"]["memory.problem"]["value"] == "no trace" and not kept.finished


def test_only_what_is_drawn_soon_is_drawn_at_once(kept):
    assert kept.known(asks(rank="9")) == kept.known(asks(rank="9"))
    slow = [asks("live"), asks(opened=["memory.room"]), asks(model="org/name"), asks(model=["gpt2"]), asks(nosuch="1")]
    for question in slow:
        assert not kept.is_quick(sound(question)) and kept.known(question) is None


def test_one_question_sees_slow_work_as_done_or_not_done_throughout(done):
    asked = STORE.read({"model": "gpt2"})
    slow = MEMORY.slow(asked)
    assert [asked.known(one) for one in slow] == [None, None]
    for one in slow:
        asyncio.run(worker.once(one.work, *one.arguments))
    assert [asked.known(one) for one in slow] == [None, None] and all(
        STORE.read({"model": "gpt2"}).known(s) for s in slow
    )


def test_what_the_first_visitors_would_wait_for_is_made_beforehand(monkeypatch):
    from demos import memory_calculator

    some = {key: memory_calculator.MODELS[key] for key in ("gpt2", "gemma-3-270m", "bert-base-uncased")
            if key in memory_calculator.MODELS}  # fmt: skip
    monkeypatch.setattr(memory_calculator, "MODELS", some)
    activations._moments.cache_clear()
    assert len(list(MEMORY.beforehand())) > 2 * 10
    made = activations._moments.cache_info().misses
    for state in ({"model": "gpt2", "rank": "77", "batch_size": "9"}, {"model": "gemma-3-270m", "method": "dora"}):
        assert not STORE.answer(asks(**state))["problems"]
    assert activations._moments.cache_info().misses == made
