"""The server's half of the store: a function of what the page says."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

gr = pytest.importorskip("gradio")

import app
from demos.memory_calculator import LESSONS, exact, own_config
from demos.page import address
from peftlab import resolve
from peftlab.memory import closed_form
from peftlab.room import worker
from peftlab.spec import SETTINGS

STORE = app.demo.store
TABS = list(STORE.tabs)


def answer(tab, opened=(), kept=None, **state):
    return STORE.answer({"number": 1, "tab": tab, "state": state, "open": list(opened), "kept": kept or {}})


@pytest.mark.parametrize("tab", TABS)
def test_every_tab_answers_with_what_a_browser_can_take(tab):
    """And draws what is folded once that is open. Controls and panels have names of their own."""
    of = STORE.tabs[tab]
    assert not set(of.controls) & set(of.panels)
    folded = {f"{tab}.{name}" for name in of.folded}
    closed, opened = answer(tab), answer(tab, of.folds)
    assert not opened["problems"] and closed["show"] and not folded & set(closed["show"])
    assert set(opened["show"]) <= {f"{tab}.{name}" for name in (*of.controls, *of.panels)}
    assert all(update["__type__"] == "update" for update in json.loads(json.dumps(opened["show"])).values())
    one, other = answer(tab, model="gpt2", rank="4"), answer(tab, rank="4", model="gpt2")
    assert one.pop("visitor") != other.pop("visitor") and one == other  # two browsers that are new here


def test_no_choice_has_the_name_of_a_setting():
    assert not set(STORE.choices) & set(SETTINGS)
    assert len(STORE.choices) == sum(len(tab.choices) for tab in STORE.tabs.values())


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({"model": "", "convention": "", "rank": ""}, {}),
        ({"method": "prompt", "rank": "4", "virtual_tokens": "8"}, {"method": "prompt", "virtual_tokens": "8"}),
        ({"method": "prompt", "rank": "x"}, {"method": "prompt", "rank": "x"}),
        ({"rank": "0", "batch_size": "x", "steps": "8"}, {"steps": "8", "rank": "0", "batch_size": "x"}),
    ],
)
def test_a_link_says_what_is_not_as_usual_and_what_is_refused(said, kept):
    answered = answer("memory", **said)
    assert answered["state"] == kept and set(answered["problems"]) == {n for n, v in kept.items() if v in ("x", "0")}
    assert answered["show"]["memory.rank"]["visible"] is (said.get("method") != "prompt")


def test_a_link_of_another_version_says_so_and_shows_what_this_one_makes_of_it():
    assert answer("memory", v="1", rank="16")["state"] == {"rank": "16"}
    answered = answer("memory", v="2", rank="16")
    assert answered["state"] == {"v": "2", "rank": "16"} and set(answered["problems"]) == {"v"}
    assert "another version of peftlab, and this one reads version 1" in answered["problems"]["v"]
    assert answered["show"]["memory.rank"]["value"] == 16
    assert STORE.read({"v": "2", "rank": "16"}).spec.rank == 16  # for a press


def test_what_is_refused_stays_in_its_box():
    box = answer("memory", rank="100000")["show"]["memory.rank"]
    assert (box["value"], box["minimum"], box["maximum"]) == (100000, 1, 100000)
    beyond = answer("memory", sequence_length="100000")  # further than the slider usually reaches, and right
    assert beyond["show"]["memory.sequence_length"]["maximum"] == 100000 and not beyond["problems"]


def test_a_bare_count_has_no_step_to_draw_and_no_rank():
    shown = answer("memory", model="100B", share="2")["show"]
    assert shown["memory.timeline"]["visible"] is False and shown["memory.rank"]["visible"] is False
    assert [run["name"] for run in shown["memory.bars"]["value"]["runs"]][1] == "LoRA, 2% trained"


@pytest.mark.parametrize("text, says", [("{", "not JSON"), ('{"model_type": "llama"}', "hidden_size is missing")])
def test_a_config_that_is_none_is_refused_where_it_is_pasted(text, says):
    refused, key = own_config(text)
    assert says in refused and key == ""


def test_the_exact_figure_takes_the_estimates_place(monkeypatch):
    fresh = {"model": "smollm2-135m", "batch_size": "3"}
    assert answer("memory", **fresh)["slow"] is True
    traced = [slow.arguments[0] for slow in STORE.tabs["memory"].slow(STORE.read(fresh))]
    reports = {spec: closed_form(resolve(spec)).report() for spec in traced}
    monkeypatch.setattr(worker, "known", lambda work, spec: reports[spec] if work is exact else None)
    assert answer("memory", **fresh)["slow"] is False


def test_every_lesson_of_memory_is_what_its_button_writes():
    for spec, rule in LESSONS.values():
        asked = STORE.read(address.link(spec, convention=rule))
        assert (asked.spec, asked["convention"]) == (spec.but(method=spec.method or "lora"), rule)


def test_what_ends_while_it_is_drawn_is_looked_at_once_more(monkeypatch):
    race, over = STORE.tabs["race"], []
    monkeypatch.setattr(race, "again", lambda asked: None if over else 0.5)
    monkeypatch.setattr(race, "draw", lambda asked: {"told": lambda: over.append(1) or ""})
    assert answer("race")["again"] == 0.5


@pytest.mark.parametrize("typed", ["9" * 20, "9" * 5000, "-3", "8.5", "1e999", "nan", "5", ""])
@pytest.mark.parametrize(("tab", "name"), [("memory", "rank"), ("live", "rank"), ("compare", "temperature")])
def test_any_number_is_answered_in_json_and_stays_in_its_box(tab, name, typed):
    answered = answer(tab, **{name: typed})
    text = json.dumps(answered)
    assert "our fault" not in text and not any(len(digits) > 16 for digits in re.findall(r"[:,] (\d+)[,}]", text))
    if typed in ("-3", "8.5"):
        box = answered["show"][f"{tab}.{name}"]
        assert answered["problems"][name] and box["minimum"] <= box["value"] == float(typed) <= box["maximum"]


def test_a_preset_is_one_write_and_what_is_set_after_it_stays():
    chosen = answer("live", preset="alpha-r")["state"]
    assert chosen["preset"] == "alpha-r" and len(chosen) > 1
    after = answer("live", preset="alpha-r", steps="77")["state"]
    assert after.items() >= {**chosen, "steps": "77"}.items()
    other = answer("live", **chosen | {"alpha": "3"})["state"]
    assert other["alpha"] == "3" and "preset" not in other


def test_the_exact_answer_leaves_what_is_refused_in_its_box(monkeypatch):
    async def once(work, spec):
        return closed_form(resolve(spec)).report()

    monkeypatch.setattr(worker, "once", once)
    question = {"number": 1, "tab": "memory", "state": {"rank": "-3"}}
    with ThreadPoolExecutor(1) as apart:  # the main thread may have a loop of its own
        exactly = apart.submit(asyncio.run, STORE.exact(question)).result()
    assert exactly["show"]["memory.rank"] == STORE.answer(question)["show"]["memory.rank"]
