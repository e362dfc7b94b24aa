"""The race tab without a browser: what a link carries, the board, and what may race here."""

import csv
import io
import queue
from html import escape
from itertools import cycle

import pytest
from tiny import wait_for

pytest.importorskip("gradio")

from demos.method_race import NONE, Race, racers, suited
from demos.page.store import blocks
from peftlab import RunSpec, SpecError
from peftlab.lectures.lessons import LESSONS
from peftlab.race import COLUMNS, ranked
from peftlab.room import jobs, rooms
from peftlab.show import races
from peftlab.show.marks import TERMS

STORE = blocks(Race()).store
TAB = STORE.tabs["race"]


def answer(kept=None, **state):
    return STORE.answer({"number": 1, "tab": "race", "state": state, "kept": kept or {}, "open": []})


def shown(kept=None, **state):
    """The update of each control and panel, by name."""
    found = answer(kept, **state)
    assert not found["problems"]
    return {name.partition(".")[2]: update for name, update in found["show"].items()}


@pytest.mark.parametrize(
    "state",
    [
        {"lesson": "modules", "values": "query,value;query,key;all-linear", "seconds": "5", "seeds": "2"},
        {"lesson": "rate", "values": "1e-3;3e-3", "guess": "about the same", "sort": "forgetting"},
        {"lesson": "rank", "guess": "none"},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_the_link_carries_the_choices(state):
    found = answer(**state)
    assert not found["problems"] and found["state"] == state


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"lesson": "rnk"}, "lesson=rnk"),
        ({"sort": "colour"}, "sort=colour"),
        ({"seconds": "-1"}, "seconds=-1"),
        ({"seconds": "inf"}, "seconds=inf"),
        ({"seeds": "99"}, "from 1 to 5"),
        ({"device": "tpu"}, "device=tpu"),
        ({"lesson": "rank", "guess": "LoRA"}, "guess=LoRA"),
        ({"lesson": "rank", "values": "8"}, "takes 2 to 24 racers, not 1"),
        ({"lesson": "rank", "values": "none"}, "takes 2 to 24 racers, not 0"),
        ({"lesson": "rank", "rank": "4", "values": "8;x"}, "rank=x"),
        ({"lesson": "rank", "values": ";".join(map(str, range(1, 30)))}, "2 to 24 racers, not 29"),
        ({"lesson": "size", "model": "gpt2", "values": "gpt2;/etc"}, "values=/etc: no model that trains here"),
        ({"lesson": "size", "values": "gpt2;llama-2-70b"}, "values=llama-2-70b: no model that trains here"),
        ({"lesson": "size", "values": "gpt2;bert-base"}, "values=bert-base: no model that trains here"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_beside_its_control(state, says):
    (name, text), *others = answer(**state)["problems"].items()
    assert says in text and not others and name == list(state)[-1] and name in {*TAB.controls, "sort"}


def test_a_lesson_that_is_opened_by_a_click_asks_first_and_one_of_a_link_shows():
    assert TAB.also["lesson"] == {"guess": NONE} and "guess" in TAB.clears["lesson"]
    asks, shows = shown(lesson="rank", guess=NONE), shown(lesson="rank")
    assert "A guess first" in asks["sentence"]["value"] and asks["result"]["visible"] is False
    assert asks["guess"].get("value", "") is None and asks["told"]["value"] == ""
    assert not {"board", "scores", "losses", "tested"} & set(asks)
    assert shows["result"]["visible"] is True and "it rises" in shows["told"]["value"]
    told = shown(lesson="rank", guess="it falls")["told"]["value"]
    assert "You said it falls" in told and "it rises" in told
    assert "As you said" in shown(lesson="rank", guess="it rises")["told"]["value"]


def test_the_recording_is_the_device_s():
    assert answer()["show"]["race.device"]["value"] == "cuda"
    on = shown(device="cpu")
    assert on["device"]["value"] == "cpu" and "AMD EPYC" in on["bar"]["value"]
    assert shown(lesson="rank")["device"]["visible"] is (len(races.devices("rank")) > 1)


def test_units_and_the_score_of_other_tabs_are_explained_where_they_are_seen():
    found = shown()
    assert "in Live" in found["bar"]["value"] and "in Compare" in found["bar"]["value"]
    assert "in Live" not in shown(guess=NONE)["bar"]["value"]
    assert TERMS["nats"] in found["board"]["value"]["html"]
    assert TERMS["nats"] in found["tested"]["value"] and TERMS["amp"] in found["tested"]["value"]


@pytest.fixture
def held(monkeypatch, room):
    """A race in whose hands this test is: what it was started with, and its events one by one."""
    told = queue.Queue()

    class Held:
        field = seeds = seconds = None
        events = told

        def say(self, event, job):
            told.put(event)
            wait_for(lambda: any(event.items() <= seen.items() for seen in job.events))

    held = Held()

    def raced(arguments, folder, again):
        held.field, held.seeds, held.seconds = (arguments[name] for name in ("racers", "seeds", "seconds"))
        while (event := told.get(timeout=20)) is not None:
            yield event
            if event["type"] == "done":
                return

    monkeypatch.setitem(jobs.WORK, "race", raced)
    yield held
    for job in list(room._jobs.values()):
        told.put(None)
        wait_for(lambda job=job: job.over)  # while the work is still ours


def token(name):
    """What the server gives a browser of that name."""
    return rooms.here().signer.sign(name)


def press(work, kept, **state):
    """What a press gives, all in one; its `kept` is what the browser keeps from then on."""
    found = {name: value for values in work(STORE.read(state, kept)) for name, value in values.items()}
    return found, kept | found.get("kept", {})


def lines(n=2):
    return [vars(line) | {"scores": [], "losses": [], "error": None} for line in races.recorded("rank").lines[:n]]


RANKS = {"lesson": "rank", "values": "8;16", "seeds": "2", "seconds": "5"}


def test_race_here_starts_the_race_on_screen_and_says_when_it_is_not_yet_there(held):
    _, kept = press(TAB.begin, {"visitor": token("a")}, **RANKS)
    job = rooms.here().find(kept["race"])
    wait_for(lambda: held.field)
    assert [spec["rank"] for _, spec in held.field] == [8, 16] and (held.seeds, held.seconds) == (2, 5)
    before = shown(kept, **RANKS)
    assert "Until yours begins" in before["bar"]["value"] and "Recorded on" in before["bar"]["value"]
    assert before["board"] == shown(**RANKS)["board"]
    assert before["go"] == {"__type__": "update", "value": "Racing", "interactive": False, "visible": True}
    assert before["stop"]["interactive"] is True and answer(kept, **RANKS)["again"] == 0.5
    held.say({"type": "racers", "lines": lines(), "seeds": 2}, job)
    begun = shown(kept, **RANKS)
    assert "Until yours begins" not in begun["bar"]["value"] and "0 of 4 runs" in begun["bar"]["value"]
    assert begun["board"]["value"]["html"].count("<tr>") == 1 + 2  # after a reload too: all of it is of `kept`
    held.say({"type": "done", "lines": lines(), "stopped": False}, job)
    over = shown(kept, **RANKS)
    assert "Done. Run here, live." in over["bar"]["value"] and over["go"]["value"] == "Race again"
    assert over["go"]["interactive"] and not over["stop"]["interactive"] and answer(kept, **RANKS)["again"] is None
    assert over["back"]["visible"] is True
    _, kept = press(TAB.put_away, kept)
    assert shown(kept, **RANKS)["board"] == shown(**RANKS)["board"]


def test_a_race_stands_on_its_lesson_only_and_a_second_press_finds_it(held):
    _, kept = press(TAB.begin, {"visitor": token("b")}, **RANKS)
    held.say({"type": "racers", "lines": lines(), "seeds": 2}, rooms.here().find(kept["race"]))
    hidden = shown(kept, lesson="rank", guess=NONE)
    assert "0 of 4 runs" in hidden["bar"]["value"] and hidden["result"]["visible"] is True
    other = shown(kept, lesson="rate")
    assert "Recorded on" in other["bar"]["value"] and "Until yours" not in other["bar"]["value"]
    assert other["go"]["value"] == "Racing" and other["stop"]["interactive"] is True
    _, again = press(
        TAB.begin, {"visitor": token("b")}, lesson="rate"
    )  # a double click: the browser has not kept the first
    _, other = press(TAB.begin, {"visitor": token("d")}, **RANKS)
    assert again["race"] == kept["race"] != other["race"]
    rooms.here().find(other["race"]).stop()


def test_stop_says_stopping_only_while_it_stops(held):
    _, kept = press(TAB.begin, {"visitor": token("e")}, **RANKS)
    job = rooms.here().find(kept["race"])
    held.say({"type": "racers", "lines": lines(), "seeds": 2}, job)
    found, _ = press(TAB.halt, kept, **RANKS)
    assert job.stopping and found["stop"]["value"] == "Stopping"
    stopping = shown(kept, **RANKS)["stop"]
    assert stopping["value"] == "Stopping" and stopping["interactive"] is False
    held.say({"type": "done", "lines": lines(), "stopped": True}, job)
    wait_for(lambda: job.over)
    assert shown(kept, **RANKS)["stop"]["value"] == "Stop"
    assert "Stopped; what has finished stands." in shown(kept, **RANKS)["bar"]["value"]
    assert not press(TAB.halt, kept)[0]


def test_a_race_that_fails_says_why(held):
    _, kept = press(TAB.begin, {"visitor": token("f")}, **RANKS)
    held.events.put(None)
    wait_for(lambda: rooms.here().find(kept["race"]).over)
    found = shown(kept, **RANKS)
    assert "the run ended without a word" in found["bar"]["value"] and found["go"]["interactive"]
    with pytest.raises(SpecError, match="not 1"):  # what cannot race is refused, and nothing starts
        press(TAB.begin, {"visitor": token("f")}, lesson="rank", values="8")
    assert rooms.here().running("f") is None
    assert "Recorded on" in shown({"visitor": token("f"), "race": "no-such-race"})["bar"]["value"]


def test_a_training_of_ones_own_comes_first(held, monkeypatch):
    monkeypatch.setitem(jobs.WORK, "train", lambda *_: iter([held.events.get(timeout=20)]))
    waiting = rooms.here().start("train", {"spec": {}}, "h")
    with pytest.raises(SpecError, match="already under way"):
        press(TAB.begin, {"visitor": token("h")}, **RANKS)
    assert not press(TAB.halt, {"visitor": token("h")})[0]  # Stop of this tab is a race's
    held.events.put({"type": "done", "steps": 0})
    wait_for(lambda: waiting.over)


@pytest.mark.parametrize("sort, key", zip([c.key for c in COLUMNS], cycle(LESSONS)))
def test_the_board_is_sorted_as_asked(key, sort):
    made = shown(lesson=key, sort=sort)["board"]["value"]
    order = [line.name for line in ranked(races.recorded(key).lines, sort)]
    assert [row["racer"] for row in csv.DictReader(io.StringIO(made["csv"]))] == order
    places = [made["html"].index(f"<b>{escape(name)}</b>") for name in order[:3]]
    assert places == sorted(places)


@pytest.mark.parametrize("lesson", LESSONS.values(), ids=LESSONS)
def test_each_lesson_runs_live_whatever_is_set(lesson):
    """On a model and method that other tabs may have chosen, and with only names that the chooser knows."""
    spec = RunSpec(model="llama-3.1-8b", method="ia3")
    field = racers(spec, lesson)
    raced = set(lesson.values) if lesson.key == "size" else {"smollm2-135m-instruct"}
    assert len(field) == len(lesson.values) and {r.spec.model for r in field} == raced
    assert set(lesson.values) <= {value for _, value in suited(lesson, spec)}
