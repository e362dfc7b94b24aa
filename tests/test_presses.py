"""What the presses of Live and Compare do, and what these tabs show before, during and after."""

import html
import json
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from tiny import wait_for

from demos import live_finetune, side_by_side
from demos.live_finetune import Live
from demos.method_race import Race
from demos.page import address
from demos.page.store import blocks
from demos.side_by_side import Compare
from peftlab import PeftlabError, SpecError, adapters
from peftlab.base.models import DEFAULT
from peftlab.compare import ComparisonReport, Exchange, Reply, score_of
from peftlab.measured import runs as recorded_runs
from peftlab.memory import here
from peftlab.race import scores
from peftlab.resolve import resolve_here
from peftlab.room import host, jobs, rooms
from peftlab.run import STOP
from peftlab.show import comparisons, runs
from peftlab.spec import SETTINGS

START = {
    "type": "start", "spec": {"steps": 2}, "metric": "exact_match", "model": "Tiny", "heldout": 40, "gear": "eager", "why_eager": "x",
}  # fmt: skip
STEP = {"type": "step", "step": 1, "steps": 2, "loss": 1.5, "seconds": 0.1, "eta_seconds": 0.1, "examples": 4}
DONE = {
    "type": "done", "steps": 1, "stopped": False, "seconds": 1.0, "tokens_per_second": 9.0, "device": "here", "measured_peak_bytes": None,
    "predicted_peak_bytes": None,
}  # fmt: skip


class Trainer:
    """A run that takes a step each time it is let on, and ends when it is stopped."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)

    def __call__(self, arguments, folder, again):
        for event in (START, STEP, None):
            assert self.go.acquire(timeout=20)
            if event:
                yield event
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "numbers").write_text("1")
        yield DONE | {"stopped": (folder / STOP).exists()}

    def goes(self, job, steps, events):
        """Once it has gone on so often and so many events are known."""
        self.go.release(steps)
        wait_for(lambda: job.over or len(job.events) >= events)


class Visit:
    """A browser: what it keeps, and what its tab shows."""

    def __init__(self, tab, visitor="ann") -> None:
        self.store, self.tab = blocks(tab).store, tab
        self.kept, self.state = {"visitor": rooms.here().signer.sign(visitor)}, {}

    def press(self, work):
        """What a press shows, the last of each panel; the browser keeps what it is to keep."""
        asked = self.store.read(self.state, self.kept)
        last = {name: value for values in work(asked) for name, value in values.items()}
        self.kept |= last.pop("kept", {})
        return last

    def sees(self):
        question = {"number": 1, "tab": self.tab.key, "state": self.state, "kept": self.kept, "open": []}
        answer = self.store.answer(question)
        shown = {name.split(".")[1]: update for name, update in answer["show"].items()}
        return shown | {name: answer[name] for name in ("again", "follow", "problems")}

    @property
    def job(self):
        return rooms.here().find(self.kept["run"])


@pytest.fixture(autouse=True)
def own_room(room):
    return room


@pytest.fixture
def trainer(monkeypatch, room):
    made = Trainer()
    monkeypatch.setitem(jobs.WORK, "train", made)
    monkeypatch.setitem(jobs.WORK, "race", made)
    yield made
    made.go.release(1000)


def test_a_run_from_the_press_to_its_download(trainer):
    ann = Visit(Live())
    seen = ann.sees()
    assert seen["sentence"]["value"].startswith("Recorded on H200: ") and seen["again"] is None
    assert seen["go"]["interactive"] and not seen["stop"]["interactive"] and not seen["keep"]["visible"]
    ann.press(ann.tab.train)
    assert ann.job.owner == "ann" and ann.job.spec.model == DEFAULT
    seen = ann.sees()
    assert seen["sentence"]["value"] == "Starting the run." and "The run begins" in seen["bar"]["value"]
    assert "A recording" in seen["bar"]["value"]  # whose curves stand until there are others
    assert not seen["go"]["interactive"] and seen["go"]["value"] == "Training" and seen["again"]
    trainer.goes(ann.job, 2, 3)
    ann.state = {"task": "voice"}
    seen = ann.sees()  # another task leaves one's own run on screen
    assert "read 4 examples" in seen["sentence"]["value"] and "step 1 of 2" in seen["bar"]["value"]
    assert list(seen["loss"]["value"]["light"]["data"][0]["y"]) == [1.5]
    trainer.goes(ann.job, 1, 4)
    seen = ann.sees()  # so does a page that is loaded again
    assert seen["again"] is None and seen["go"]["value"] == "Train again" and seen["go"]["interactive"]
    file = seen["keep"]["value"]
    assert seen["keep"]["visible"] and file.url.startswith("gradio_api/peftlab/adapter/") and file.path.endswith(".zip")
    assert ann.sees()["keep"]["value"] == file  # the page is not given another link each time


def test_a_run_that_does_not_fit_is_refused_with_a_button_that_cures_it(trainer, monkeypatch):
    monkeypatch.setattr(here, "_free", lambda: 2_000_000_000)
    tab = Live()
    demo = blocks(tab)
    press = next(f for f in demo.fns.values() if tab.panels["go"]._id in {i for i, _ in f.targets if i} and f.fn)
    kept = {"visitor": rooms.here().signer.sign("ann")}
    question = {"state": {"batch_size": "64", "precision": "fp32"}, "kept": kept}
    last = {component: value for values in press.fn(question) for component, value in values.items()}
    shown = last[tab.panels["problem"]]
    assert "batch size 64: this needs" in shown and "2 GB of it is free here" in shown
    assert ">Use batch size 1 and accumulation 64</button>" in shown and not rooms.here().running("ann")
    (button,) = re.findall(r'data-replace="(.*?)" data-keeping="(.*?)"', shown)
    written, keeping = (json.loads(html.unescape(text)) for text in button)
    assert written == {"batch_size": "1", "accumulation": "64"} and keeping == list(SETTINGS)  # as store.js writes it
    ann = Visit(Live())
    ann.state = question["state"] | written
    ann.press(ann.tab.train)
    assert ann.sees()["problems"] == {} and (ann.job.spec.batch_size, ann.job.spec.accumulation) == (1, 64)


def test_of_two_presses_at_once_both_follow_the_one_run(trainer, monkeypatch):
    own, page = rooms.Room.start, Visit(Live())

    def late(room, *arguments):
        own(room, *arguments)  # the other press
        return own(room, *arguments)

    monkeypatch.setattr(rooms.Room, "start", late)
    page.press(page.tab.train)
    assert page.job is rooms.here().running("ann")


def test_a_run_of_another_kind_is_not_taken_for_ones_own(trainer):
    spec = resolve_here(live_finetune.here(address.OPENING))
    rooms.here().start("race", {"spec": spec.to_dict()}, "ann")
    ann = Visit(Live())
    with pytest.raises(SpecError, match="already under way"):
        ann.press(ann.tab.train)


def test_who_waits_sees_how_many_are_ahead_and_may_leave(trainer):
    ann, bob = Visit(Live()), Visit(Live(), "bob")
    ann.press(ann.tab.train)
    first, window = ann.job, Visit(Live())
    assert "problem" not in ann.press(ann.tab.train) and ann.job is first  # a second press starts no second run
    window.press(window.tab.train)  # nor does one in a second window, which has not heard of the run
    assert window.job is first and len(rooms.here()._jobs) == 1
    bob.press(bob.tab.train)
    seen = bob.sees()
    assert "1 ahead of it" in seen["bar"]["value"] and seen["sentence"]["value"] == "Waiting: 1 run ahead of yours."
    bob.press(bob.tab.stop)
    seen = bob.sees()
    assert bob.job.over and "Stopped while it waited" in seen["bar"]["value"] and seen["go"]["interactive"]
    assert not ann.job.over


def test_stop_says_so_until_it_has_stopped(trainer):
    ann = Visit(Live())
    ann.press(ann.tab.train)
    trainer.goes(ann.job, 2, 3)
    assert ann.sees()["stop"]["interactive"]
    ann.press(ann.tab.stop)
    window = Visit(Live())
    window.kept = ann.kept  # a second tab of the same browser sees it too, and what comes of it
    for tab in (ann, window):
        assert tab.sees()["stop"] == {"interactive": False, "value": "Stopping", "__type__": "update"}
    trainer.goes(ann.job, 1, 4)
    seen = ann.sees()
    assert seen["stop"] == {"interactive": False, "value": "Stop and keep", "__type__": "update"}
    assert "Stopped early; what it learned is kept." in seen["bar"]["value"] == window.sees()["bar"]["value"]


def test_looking_again_draws_charts_only_for_a_new_point(trainer, monkeypatch):
    drawn = []
    monkeypatch.setattr(runs, "charts", lambda events: drawn.append(len(events)) or {})
    runs.charts_of.cache_clear()
    ann = Visit(Live())
    ann.press(ann.tab.train)
    trainer.goes(ann.job, 2, 3)
    drawn.clear()
    ann.sees()
    ann.job.add({"type": "progress", "what": "measuring", "share": 0.5})
    ann.sees()
    assert drawn == [3]
    runs.charts_of.cache_clear()


def test_every_tab_says_why_its_score_is_another_one():
    live = next(r for r in recorded_runs() if r["spec"]["task"] == "ticket" and r["spec"]["method"] == "lora")
    said = scores.elsewhere(scores.of_run(live))
    assert "The same task and method: 88% in Compare (rank 2, 60 steps of 8 examples, learning rate 0.004" in said
    assert "mean of 3 seeds, 40 steps of 4 examples, on NVIDIA H100 80GB HBM3); on 40 items" in said
    assert "85% is known only to lie between 71% and 93%" in said
    assert said in runs.recording("ticket")["said"].replace("&#x27;", "'")
    adapter = next(a for a in adapters.bundled() if a.name == "ticket-lora")
    assert "85% in Live (rank 8, 60 steps of 16 examples, learning rate 0.003" in comparisons.whence(adapter)


def answers(*texts):
    for text in texts:
        yield Reply("base", text, 1.0), Reply("mine", text.upper(), 2.0)


def test_ask_both_streams_and_says_how_long_it_took(monkeypatch):
    ann, asked = Visit(Compare()), []
    monkeypatch.setattr(side_by_side, "GENERATE", lambda *all: asked.append(all) or answers("a", "ab "))
    ann.state = {"prompt": "Hello", "temperature": "0.5", "tokens": "16", "decoding_seed": "7"}
    seen = ann.press(ann.tab.ask)
    assert (seen["left"], seen["right"]) == ("ab", "AB")
    assert seen["said"].startswith("Base 1.0 s, adapter 2.0 s, just now")
    ((adapter, prompt, decoding),) = asked
    assert (adapter.name, prompt) == ("ticket-lora", "Hello")
    assert (decoding.max_new_tokens, decoding.temperature, decoding.seed) == (16, 0.5, 7)


def test_a_recorded_answer_is_shown_where_there_is_one_and_none_to_another_prompt():
    ann = Visit(Compare())
    first = ann.sees()
    assert '"name"' in first["right"]["value"] and "Recorded when the adapter was made" in first["said"]["value"]
    assert first["example"]["value"] == first["prompt"]["value"]
    ann.state = {"prompt": "Hello"}
    other = ann.sees()
    assert (other["right"]["value"], other["example"]["value"]) == ("", None) and "Press Ask" in other["said"]["value"]
    ann.state = {"prompt": "Hello!"}
    assert ann.sees()["right"] != other["right"]  # so that the page takes a press's answer to the last prompt away


@pytest.fixture
def scorer(monkeypatch):
    """A scoring that goes on once it is let."""
    rows = tuple(Exchange("p", "r", (Reply("base", "", 0, 0), Reply("mine", "x", 0, 1))) for _ in range(4))
    report = ComparisonReport(
        "ticket", "exact_match", rows, (score_of("base", [0] * 4), score_of("mine", [1] * 4, 0.2)), ("a note",)
    )
    go = threading.Event()

    def scores(arguments, folder, again):
        yield {"type": "progress", "what": "scoring", "share": 0.5}
        assert go.wait(20)
        yield {"type": "done", "report": report.to_dict()}

    monkeypatch.setitem(jobs.WORK, "score", scores)
    assert ComparisonReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    yield go
    go.set()


def test_score_is_a_job_that_shows_how_far_it_is_and_then_the_report(scorer):
    ann, bob = Visit(Compare()), Visit(Compare(), "bob")
    ann.press(ann.tab.score)
    job = rooms.here().find(ann.kept["scoring"])
    wait_for(lambda: len(job.events) == 2)
    seen = ann.sees()
    assert seen["measuring"]["value"] == "Scoring, 50%" and seen["halt"]["visible"] and seen["again"]
    assert not seen["measure"]["interactive"] and seen["follow"] == f"compare/{job.id}"
    ann.press(ann.tab.score)  # a second press starts no second one
    assert ann.kept["scoring"] == job.id and bob.sees()["measuring"]["value"] == ""
    ann.state = {"adapter": "voice-lora"}
    seen = ann.sees()
    assert seen["measuring"]["value"] == "Another adapter is being scored." and seen["follow"] is None
    bob.press(bob.tab.score)
    assert bob.sees()["measuring"]["value"] == "The scoring waits: 1 ahead of it."
    ann.state = {}
    scorer.set()
    wait_for(lambda: job.over)
    seen = ann.sees()
    assert "wins <b>4</b> of 4" in seen["sentence"]["value"] and "Measured here" in seen["whence"]["value"]
    assert 'aria-label="nats:' in seen["sentence"]["value"] and seen["measure"]["interactive"]
    assert seen["again"] is None and not seen["halt"]["visible"] and seen["measuring"]["value"] == ""
    ann.state = {"adapter": "voice-lora"}
    assert "Recorded on" in ann.sees()["whence"]["value"]


def test_a_scoring_may_be_cancelled_and_a_server_that_ends_leaves_none_to_resume(scorer, room):
    ann = Visit(Compare())
    ann.press(ann.tab.score)
    job = room.find(ann.kept["scoring"])
    ann.press(ann.tab.halt)
    scorer.set()
    wait_for(lambda: job.over)
    assert "Cancelled: nothing is kept." in ann.sees()["measuring"]["value"] and ann.sees()["measure"]["interactive"]
    lost = jobs.Job(room.records.add("lost", "score", job.arguments, "bob", False), room.folder / "lost", room.records)
    lost.interrupted()
    assert lost.over and not lost.resumable and lost.events[-1]["message"].endswith("start it again.")


def test_a_host_that_trains_nothing_scores(scorer, room, monkeypatch):
    monkeypatch.setattr(room, "settings", replace(room.settings, train=False))
    ann = Visit(Compare())
    ann.press(ann.tab.score)
    scorer.set()
    wait_for(lambda: room.find(ann.kept["scoring"]).over)
    assert "wins" in ann.sees()["sentence"]["value"]


def test_a_press_that_fails_frees_its_button(monkeypatch):
    def fails(*all):
        raise PeftlabError("no <model>")
        yield

    monkeypatch.setattr(side_by_side, "GENERATE", fails)
    tab = Compare()
    demo = blocks(tab)
    press = next(f for f in demo.fns.values() if tab.panels["ask"]._id in {i for i, _ in f.targets if i} and f.fn)
    last = {component: value for values in press.fn({"state": {}, "kept": {}}) for component, value in values.items()}
    seen = {name: last.get(component) for name, component in tab.panels.items()}
    assert seen["ask"]["interactive"] and seen["problem"] == "no &lt;model&gt;" and seen["asking"] == ""


def test_an_adapter_trained_here_is_chosen_where_nothing_else_was_and_is_nobody_elses(trained_here):
    ann, bob = Visit(Compare()), Visit(Compare(), "bob")
    first, last = (trained_here(adapters.bundled()[-1].folder, "ann").id for _ in range(2))
    seen = ann.sees()["adapter"]
    assert seen["value"] == last and [key for _, key in seen["choices"]][:2] == [last, first]
    bob.state = {"adapter": first}
    seen = bob.sees()
    assert "not here, or not yours" in seen["problems"]["adapter"] and first not in str(seen["adapter"]["choices"])
    ann.state = {"adapter": "ticket-lora"}
    assert ann.sees()["adapter"]["value"] == "ticket-lora"


def test_a_space_without_storage_says_why_a_run_is_gone_and_one_with_storage_does_not(monkeypatch):
    live, race = Visit(Live()), Visit(Race())
    live.kept["run"] = race.kept["race"] = "ticket-lora-" + "0" * 32
    monkeypatch.setenv("SPACE_ID", "ann/peftlab")
    monkeypatch.delenv("PEFTLAB_DATA", raising=False)
    monkeypatch.setattr(rooms.here(), "forgets", host.forgets())
    why = r" is not here any more\. This server began .* ago, and forgets runs when it sleeps or restarts\."
    assert re.search(f"Your last run{why}", live.sees()["bar"]["value"])
    assert re.search(f"Your last race{why}", race.sees()["bar"]["value"])
    monkeypatch.setenv("PEFTLAB_DATA", "/data/peftlab")
    monkeypatch.setattr(rooms.here(), "forgets", host.forgets())
    assert (
        live.sees()["bar"]["value"].count("forgets") == 0
        and "Your last run is not here any more." in live.sees()["bar"]["value"]
    )


def test_an_adapter_that_another_version_saved_hides_no_other(trained_here):
    ann = Visit(Compare())
    odd, good = (trained_here(adapters.bundled()[-1].folder, "ann") for _ in range(2))
    (odd.folder / "adapter" / adapters.MANIFEST).write_text('{"version": 2}')
    keys = [key for _, key in ann.sees()["adapter"]["choices"]]
    assert good.id in keys and odd.id not in keys and "ticket-lora" in keys


def test_a_link_to_a_run_that_is_gone_or_is_none_says_so(trainer):
    ann = Visit(Live())
    ann.state = {"run": "ticket-lora-" + "0" * 32}
    assert "The run of this link is not here any more." in ann.sees()["bar"]["value"]
    score = rooms.here().records.add("a-scoring", "score", {"spec": {}}, "ann", False)
    ann.state = {"run": score.id}
    seen = ann.sees()
    assert seen["problems"] == {} and "The run of this link is not here any more." in seen["bar"]["value"]
    ann.state, ann.kept["run"] = {}, "ticket-lora-" + "1" * 32
    assert "Your last run is not here any more." in ann.sees()["bar"]["value"]
    old = rooms.here().records.add("of-another-version", "train", {"spec": {"of_tomorrow": 1}}, "ann", False)
    ann.kept["run"] = old.id
    seen = ann.sees()
    assert seen["problems"] == {} and "made by another version of peftlab" in seen["bar"]["value"]
    assert seen["go"]["interactive"]


def test_two_presses_of_resume_are_one(trainer):
    ann = Visit(Live())
    ann.press(ann.tab.train)
    wait_for(lambda: ann.job.begun)
    ann.press(ann.tab.stop)
    trainer.go.release(9)
    wait_for(lambda: ann.job.over)
    job = ann.job
    assert ann.sees()["resume"] == {"visible": True, "interactive": True, "__type__": "update"}
    while trainer.go.acquire(blocking=False):
        pass
    assert "problem" not in ann.press(ann.tab.resume) and "problem" not in ann.press(ann.tab.resume)
    assert ann.job is job and not job.over


def test_train_after_cancel_is_a_run_of_its_own(trainer):
    ann = Visit(Live())
    ann.press(ann.tab.train)
    first = ann.job
    wait_for(lambda: first.begun)
    ann.press(ann.tab.cancel)
    seen = ann.sees()
    assert first.cancelling and seen["cancel"]["value"] == "Cancelling" and seen["stop"]["value"] == "Stop and keep"
    ann.press(ann.tab.train)
    assert ann.job is not first and not ann.job.over
    trainer.go.release(9)
    wait_for(lambda: ann.job.over)
    assert first.events[-1]["cancelled"] and ann.job.events[-1]["type"] == "done"


def test_a_run_that_waits_to_go_on_says_how_many_are_ahead(trainer):
    ann, bob = Visit(Live()), Visit(Live(), "bob")
    ann.press(ann.tab.train)
    wait_for(lambda: ann.job.begun)
    ann.press(ann.tab.stop)
    trainer.go.release(9)
    wait_for(lambda: ann.job.over)
    while trainer.go.acquire(blocking=False):
        pass
    bob.press(bob.tab.train)
    wait_for(lambda: bob.job.begun)
    ann.press(ann.tab.resume)
    assert "The run waits to go on: 1 ahead of it" in ann.sees()["bar"]["value"]
    ann.press(ann.tab.cancel)
    seen = ann.sees()
    assert "what it had learned before it went on is kept" in seen["bar"]["value"] and seen["resume"]["visible"]


def test_a_host_that_shows_everything_has_no_train_button(trainer, monkeypatch):
    monkeypatch.setattr(rooms.here(), "settings", replace(rooms.here().settings, train=False))
    seen = Visit(Live()).sees()
    assert not seen["go"]["visible"] and "shows everything and trains nothing" in seen["bar"]["value"]


def test_a_host_of_other_models_begins_with_one_of_them(trainer, monkeypatch):
    chosen = replace(rooms.here().settings, models=("gemma-3-270m",))
    monkeypatch.setattr(rooms.here(), "settings", chosen)
    monkeypatch.setattr(live_finetune, "host", SimpleNamespace(settings=lambda: chosen))
    ann = Visit(Live())
    seen = ann.sees()
    assert seen["model"]["value"] == "gemma-3-270m" and "Gemma 3 270M" in seen["bar"]["value"] and not seen["problems"]
    ann.press(ann.tab.train)
    assert ann.job.spec.model == "gemma-3-270m"
    with pytest.raises(SpecError, match="this host trains gemma-3-270m") as refused:
        rooms.here().start("train", {"spec": {}}, "bob")
    assert refused.value.settings == {"model": "gemma-3-270m"} and refused.value.change == "Gemma 3 270M"


def test_a_question_that_cannot_be_repeated_is_answered(trainer):
    page = Visit(Live())
    page.state = {"learning_rate": "\ud800"}
    seen = page.sees()
    assert "learning-rate=?" in str(seen["problems"]) and json.dumps(seen).encode()


def test_only_a_model_that_somebody_chose_is_said_to_be_set_aside():
    said = Visit(Live()).sees()["note"]["value"]
    assert said.startswith("Runs with ") and "set aside" not in said.lower()
    ann = Visit(Live())
    ann.state = {"model": "llama-2-7b"}
    assert ann.sees()["note"]["value"].startswith("Set aside here: <b>Llama 2 7B</b>")
