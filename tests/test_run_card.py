"""What the page says of a run: the figures while it goes on, the card afterwards, and what it advises and why."""

import html
import json
import re
from dataclasses import replace

import pytest
import torch

from peftlab import RunSpec, measured, resolve
from peftlab.data import tasks
from peftlab.run import gears
from peftlab.run.events import standing
from peftlab.show import run_card, runs, suggestions
from peftlab.show.marks import MUCH
from peftlab.spec import SETTINGS

SPEC = resolve(RunSpec(model="smollm2-135m-instruct", task="ticket", precision="bf16", steps=40))
START = {
    "type": "start", "spec": SPEC.to_dict(), "metric": "exact_match", "model": "Small", "heldout": 40, "gear": "eager",
    "why_eager": "no CUDA GPU here",
}  # fmt: skip
DONE = {
    "type": "done", "steps": 40, "stopped": False, "seconds": 37.0, "training_seconds": 26.3, "tokens_per_second": 545.0,
    "eval": {"before": {"exact_match": 0.0}, "after": {"exact_match": 0.775}, "items": 40}, "forgetting": 0.02,
    "predicted_peak_bytes": None, "measured_peak_bytes": None, "device": "2 cores",
}  # fmt: skip
LEVEL = [3.0, 1.0] + [0.1, 0.12] * 19


@pytest.fixture(autouse=True)
def as_long_as_the_tasks_own(monkeypatch):
    """The task's own run has 40 steps wherever the tests run, as SPEC has."""
    monkeypatch.setitem(tasks.TASKS, "ticket", replace(tasks.TASKS["ticket"], steps=40, on_gpu=None))


def step(n, loss, **more):
    rate = SPEC.learning_rate * gears.schedule(n - 1, 40)
    return {
        "type": "step", "step": n, "steps": 40, "loss": loss, "gradient_norm": 1.5, "learning_rate": rate, "seconds": 0.5,
        "eta_seconds": 1.0, "examples": 4 * n, **more,
    }  # fmt: skip


def ended(losses=LEVEL, **done):
    """The events of a run with these losses, whose last event differs from DONE in `done`."""
    return [START, *(step(n, loss) for n, loss in enumerate(losses, 1)), {**DONE, "steps": len(losses), **done}]


def scored(value):
    return {"eval": {**DONE["eval"], "after": {"exact_match": value}}}


def plain(text):
    """Without markup and what it says on hover."""
    text = re.sub(r'<span class="tip">.*?</span>', "", text)
    return html.unescape(re.sub(r"<[^>]+>", " ", text)).replace("  ", " ")


def cells(events):
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small></dd>", run_card.figures(events))
    return {plain(name).strip(): (value, plain(below)) for name, value, below in found}


def parts(events, spec=SPEC, **more):
    found = re.findall(r"<h4>(.*?)</h4>(.*?)</section>", run_card.card(events, spec, **more))
    return {title: plain(text) for title, text in found}


def advice(events, spec=SPEC, adapter=""):
    return {one.label: one for one in suggestions.suggestions(events, spec, adapter)}


def test_the_figures_have_their_places_before_there_is_anything_to_say():
    names = ["Loss", "Learning rate", "Gradient norm", "Tokens/s", "Memory"]
    assert list(cells([])) == list(cells([START])) == list(cells(ended())) == names
    assert {value for value, _ in cells([]).values()} == {"–"}


def test_the_figures_are_the_newest_and_say_what_the_trainer_does():
    found = cells([START, step(1, 2.0, tokens_per_second=300.0), step(2, 1.0, tokens_per_second=512.3)])
    assert found["Loss"] == ("1.43", "last step 1") and found["Tokens/s"][0] == "512"  # (0.75 × 2 + 1) / 1.75
    assert found["Learning rate"][0] == "0.0015" and found["Gradient norm"][0] == "1.5"
    text = run_card.figures(ended())
    assert text.count("<polyline") == 2 and f"clipped to at most {gears.CLIP:g}" in text
    assert gears.WARMUP == 0.1 and "rises to 0.003 over the first tenth of the steps" in text


def test_memory_is_told_only_where_it_was_counted():
    assert cells([START, step(1, 2.0)])["Memory"] == ("–", "on a GPU only") == cells(ended())["Memory"]
    assert cells([START, step(1, 2.0, peak_bytes=773_000_000)])["Memory"] == ("773 MB", "so far")
    gpu = {"measured_peak_bytes": 773_000_000, "predicted_peak_bytes": 777_000_000}
    assert cells(ended(**gpu))["Memory"] == ("773 MB", "777 MB predicted")
    assert "Peak memory 773 MB on 2 cores; 777 MB predicted, 0.52% above it" in parts(ended(**gpu))["What it cost"]
    assert "emory" not in parts(ended())["What it cost"]


def test_the_card_has_its_place_while_a_run_goes_on_and_none_where_nothing_was_learned():
    assert list(parts([START, step(1, 2.0)])) == list(parts(ended())) == list(run_card.TITLES)
    assert "<button" not in run_card.card([START, step(1, 2.0)], SPEC)
    assert not parts([START, {"type": "error", "message": "no"}])
    assert not parts([{"type": "done", "steps": 0, "stopped": True, "message": "nothing"}])


def test_the_card_says_what_changed_and_what_it_cost():
    found = parts(ended())
    assert "0% → 78% on 40 held-out items, 95% interval 62% to 88%." in re.sub(r"\s+", " ", found["What changed"])
    assert "2,442,240 numbers trained, 1.82%; a file of 9.77 MB" in found["What changed"]
    assert "chance" not in found["What changed"]
    assert "26 s of training, 37 s with loading and measuring; 545 tokens/s" in found["What it cost"].replace("  ", " ")
    assert "no CUDA GPU here" in re.sub(r"\s+", " ", found["What it cost"]) and "nergy" not in found["What it cost"]
    few = {"eval": {"before": {"exact_match": 0.05}, "after": {"exact_match": 0.1}, "items": 40}}
    assert "That may be chance." in parts(ended(**few))["What changed"]
    unmeasured = {
        "eval": {"before": {"exact_match": 0.0}, "after": None, "items": 40},
        "forgetting": None,
        "stopped": True,
    }
    found = parts(ended(**unmeasured))
    assert "not measured" in found["What changed"] and "Not measured" in found["What it forgot"]


@pytest.mark.parametrize(
    "change, says",
    [
        (-0.01, "Nothing : ordinary prose costs it no more"),
        (0.02, "Almost nothing"),
        (0.2, "perplexity 22% higher"),
        (4.4, "perplexity 81 times as high"),
    ],
)
def test_what_it_forgot_is_said_in_nats_and_in_words_and_beside_recorded_runs(change, says):
    said = re.sub(r"\s+", " ", parts(ended(forgetting=change))["What it forgot"])
    of, known = run_card.recorded_forgetting(SPEC.model, "ticket")
    more = sum(other > change for other in known)
    assert (
        says in said
        and f"Of {len(known)} recorded runs of {of}, {'all' if more == len(known) else more or 'none'} forgot" in said
    )


def test_a_recording_is_not_counted_beside_itself():
    run = next(r for r in measured.runs() if r["spec"]["task"] == "intent")
    spec = resolve(RunSpec.from_dict(run["spec"]))
    _, known = run_card.recorded_forgetting(spec.model, "intent")
    said = run_card.beside_recorded(run["events"][-1]["forgetting"], spec)
    assert said.startswith(f"Of {len(known) - 1} recorded runs of this model") and "none forgot more" in said


def test_a_loss_falls_still_only_where_it_is_more_than_chance():
    assert not suggestions.still_falls(LEVEL) and not suggestions.still_falls([]) and not suggestions.still_falls([1.0])
    falling = [4 - 0.05 * n for n in range(40)]
    assert "2.77 on average in the third quarter of the steps, 2.27 in the last" in suggestions.still_falls(falling)
    assert suggestions.still_falls([1.7, 1.5, 0.5]) and not suggestions.still_falls([1.7, 0.5, 0.6])
    assert not suggestions.still_falls([4 - 0.0005 * n for n in range(40)])  # surely, but by too little
    torch.manual_seed(0)
    noise = torch.rand(200, 40).tolist()
    assert sum(bool(suggestions.still_falls(losses)) for losses in noise) < 0.06 * len(noise)


def test_advice_is_only_what_the_runs_numbers_ask_for():
    falling = [4 - 0.05 * n for n in range(40)]
    assert advice(ended(falling))["80 steps"].run["steps"] == "80"
    level = advice(ended())
    assert list(level) == ["8 examples a step"] and "160 of 813 training rows" in level["8 examples a step"].why
    assert list(advice(ended([1.0, 1.01] * 20))) == ["Learning rate 0.006"]
    lost = advice(ended(forgetting=MUCH + 0.1))
    assert lost["Learning rate 0.0015"].run["learning_rate"] == "0.0015" and len(lost) == 2
    assert list(advice(ended([1.0, 1.01] * 20, forgetting=1.0))) == ["8 examples a step", "Learning rate 0.0015"]
    assert list(advice(ended(falling, **scored(1.0)))) == ["Rank 1"]  # nothing left to gain, though the loss falls
    stopped = advice(ended([3.0, 2.0, 1.0], stopped=True))
    assert list(stopped) == ["All 40 steps"] and "after 3 of 40" in stopped["All 40 steps"].why


def test_advice_stays_in_the_ranges_and_never_is_empty():
    most = int(SETTINGS["steps"].high or 0)
    falling = [4 - 0.05 * n for n in range(40)]
    if most:
        assert f"{2 * most} steps" not in advice(ended(falling), resolve(SPEC.but(steps=most)))
    read = resolve(SPEC.but(training_rows=8))
    assert list(advice(ended(), read)) == ["Seed 1"] and advice(ended(), read)["Seed 1"].run["seed"] == "1"
    one = resolve(SPEC.but(rank=1))
    other = next(task for key, task in tasks.TASKS.items() if key != "ticket")
    assert list(advice(ended(**scored(1.0)), one)) == [other.name]


def test_advice_writes_what_differs_and_leaves_the_machine_its_choices():
    assert suggestions.settings_of(resolve(SPEC.but(steps=None))) == {
        "model": SPEC.model,
        "method": "lora",
        "task": "ticket",
    }
    own = resolve(RunSpec(method="qlora", rank=4, steps=12, learning_rate=1e-4, gpu="h100-80gb"))
    found = suggestions.settings_of(own)
    assert {name: found.pop(name) for name in ("rank", "steps", "learning_rate")} == {
        "rank": "4", "steps": "12", "learning_rate": "0.0001",
    }  # fmt: skip
    assert set(found) == {"model", "method", "task"} and found["method"] == "qlora"


def test_only_the_owner_is_offered_to_compare():
    assert "Compare" not in advice(ended())
    told = advice(ended(forgetting=1.0), adapter="ticket-lora-1")
    assert list(told)[-1] == "Compare" and len(told) == 3
    text = run_card.card(ended(), SPEC, "ticket-lora-1")
    writes = json.loads(html.unescape(re.search(r'data-opens="compare" data-write="([^"]*)"', text)[1]))
    assert writes == {"adapter": "ticket-lora-1"}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_recording_has_its_figures_and_its_card(task):
    shown = runs.recording(task)
    run = next(r for r in measured.runs() if r["spec"]["task"] == task)
    assert "–" not in [value for value, _ in cells(run["events"]).values()]
    assert (
        shown["card"].count("<section>") == 4 and "data-replace" in shown["card"] and "data-opens" not in shown["card"]
    )


def test_what_a_run_notes_and_that_it_went_on_is_said_beside_its_steps():
    on = {"type": "resumed", "step": 20}
    assert "It went on after step 20." in runs.status(standing([START, step(20, 1.0), on, step(21, 1.0)]))
    anew = {"type": "resumed", "step": 0, "message": "This run starts from the beginning: <none>."}
    note = {"type": "note", "message": "No more checkpoints are kept (full): it goes on."}
    said = runs.status([START, anew, note, step(1, 1.0)])
    assert "from the beginning: &lt;none&gt;." in said and "(full): it goes on.<" in said
    assert "It ended after 9 seconds" in runs.status(ended(message="It ended after 9 seconds", stopped=True))


def test_the_answers_keep_their_places_from_the_first_moment():
    prompts = [row.prompt for row in tasks.TASKS["ticket"].heldout[: runs.SHOWN]]
    said = [{"prompt": p, "text": "x" * 300, "score": 0.0} for p in prompts]
    at = [
        {"type": "eval", "when": when, "step": n, "metrics": {"exact_match": 0.0}, "examples": said}
        for when, n in (("before", 0), ("after", 9))
    ]
    pictures = [runs._answers(events, "ticket") for events in ([START], [START, at[0]], [START, *at])]
    assert len({(text.count("<tr>"), text.count("<td"), text.count("<th>")) for text in pictures}) == 1
    assert all(html.escape(p) in pictures[0] for p in prompts) and "at step 9" in pictures[2]


def test_a_run_of_fewer_steps_than_the_tasks_own_is_first_advised_that_number():
    for losses in (LEVEL[:12], [3 - 0.1 * n for n in range(12)], [1.0] * 12):  # level, falling, hardly moved
        told = advice(ended(losses), resolve(SPEC.but(steps=12)))
        assert next(iter(told)) == "40 steps" and told["40 steps"].run["steps"] == "40"
        assert told["40 steps"].why == "It took 12 steps; this task's own run takes 40."
    short, lost = resolve(SPEC.but(steps=12)), ended(LEVEL[:12], forgetting=MUCH + 0.1)
    assert list(advice(lost, short, "mine")) == ["40 steps", "Learning rate 0.0015", "Compare"]
    assert "40 steps" not in advice(ended(LEVEL[:12], **scored(1.0)), short)  # nothing is left to gain
    assert list(advice(ended(LEVEL[:5], stopped=True), short)) == ["All 12 steps"]
    assert advice(ended([1.0]), resolve(SPEC.but(steps=1)))["40 steps"].why.startswith("It took 1 step; ")


def test_a_stopped_run_that_can_go_on_is_told_apart_from_one_that_begins_anew():
    stopped = ended([3.0, 2.0, 1.0], stopped=True)
    said = "It was stopped after 3 of 40 steps."
    assert advice(stopped)["All 40 steps"].why == said  # somebody else's: there is no Resume
    assert advice(stopped, adapter="mine")["All 40 steps"].why == f"{said} Resume goes on from there; this begins anew."


def test_a_task_of_short_answers_makes_the_rows_of_answers_low():
    assert tasks.TASKS["intent"].max_new_tokens <= runs.BRIEF < tasks.TASKS["voice"].max_new_tokens
    said = {name: runs.shown_of([], resolve(RunSpec(task=name)))["said"] for name in ("intent", "voice")}
    assert 'kept brief"' in said["intent"] and 'kept"' in said["voice"]
