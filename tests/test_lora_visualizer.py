"""The LoRA tab outside its picture: what it answers, charts and words of real studies, the proofs, the layer from scratch."""

import pytest

gr = pytest.importorskip("gradio")

from demos import proving, real_weights
from demos.lora_visualizer import LESSONS, Lora
from demos.page import adapter_choice, address
from demos.page.store import blocks
from peftlab import PeftlabError, adapters
from peftlab.compare import study
from peftlab.room import rooms, worker
from peftlab.show import shapes, studies

STORE = blocks(Lora()).store
TAB = STORE.tabs["lora"]
MATHEMATICS = TAB.folded["study"]


def answer(*opened, kept=None, **state):
    return STORE.answer({"number": 1, "tab": "lora", "state": state, "kept": kept or {}, "open": list(opened)})


def read(kept=None, **state):
    return STORE.read(state, kept)


def test_the_matrix_that_is_asked_for_is_shown():
    shown = answer(MATHEMATICS, matrix="value", layer="3")["show"]
    assert "layer 3's value matrix" in shown["lora.study"]["value"] and "lora.weight_pictures" not in shown
    assert (shown["lora.matrix"]["value"], shown["lora.layer"]["value"]) == ("value", 3)


def test_a_matrix_is_decomposed_in_the_other_process_and_only_where_its_picture_is_in_sight(monkeypatch):
    monkeypatch.setattr(real_weights, "is_here", lambda: True)
    fold = TAB.folded["weight_pictures"]
    assert answer(MATHEMATICS)["slow"] is False and answer(fold)["slow"] is True
    assert "being decomposed" in answer(fold)["show"]["lora.weight_pictures"]["value"]
    asked = (studies.images, "value", 3, 5)
    monkeypatch.setattr(worker, "known", lambda *work: "<img>" if work == asked else None)
    seen = answer(fold, matrix="value", layer="3", directions="5")
    assert seen["slow"] is False and seen["show"]["lora.weight_pictures"]["value"] == "<img>"
    monkeypatch.setattr(real_weights, "is_here", lambda: False)
    assert answer(fold)["slow"] is False and "not here yet" in answer(fold)["show"]["lora.weight_pictures"]["value"]


def test_the_bounds_are_those_of_the_model_that_is_studied():
    every = [m for s in studies.bundled().values() for m in s.matrices]
    bounds = max(m.layer for m in every), max(max(m.shape) for m in every)
    assert bounds == (real_weights.LAST_LAYER, real_weights.WIDTH)


def test_a_bare_count_has_nothing_to_draw_here_and_the_opening_model_is_shown():
    shown = answer(model="100B", rank="4")
    assert "100B: a bare count has no matrices to draw; Llama 3.1 8B is shown" in shown["problems"]["model"]
    value = shown["show"]["lora.picture"]["value"]
    assert (value["key"], value["at"]["rank"]) == (address.OPENING.model, 4)
    assert shown["state"] == {"model": "100B", "rank": "4"}


@pytest.mark.parametrize("rank", ["abc", "100000"])
def test_a_refused_rank_is_in_the_link_in_its_box_and_in_the_refusal(rank):
    shown = answer(rank=rank, alpha="3")
    assert f"rank={rank}" in shown["problems"]["rank"] and shown["state"] == {"rank": rank, "alpha": "3"}
    at = shown["show"]["lora.picture"]["value"]["at"]
    assert (at["refused"], at["rank"], at["alpha"]) == ({"rank": rank}, 8, 3)


def test_past_break_even_is_past_it_in_every_matrix():
    value = shapes.value(LESSONS["Past break-even"])
    rank, adapted = value["at"]["rank"], value["at"]["targets"]
    of = [m for m in value["modules"] if m["name"] in adapted]
    assert len(of) == 7 and all(rank * (m["d_in"] + m["d_out"]) > m["d_in"] * m["d_out"] for m in of)


def test_every_lesson_can_be_shown():
    for spec in LESSONS.values():
        shown = answer(**address.link(spec))
        assert not shown["problems"] and shown["show"]["lora.picture"]["value"]["key"] == spec.model


def test_a_matrix_that_no_adapter_changes_is_refused_and_another_one_is_shown():
    shown = answer(MATHEMATICS, matrix="up")
    assert "matrix=up: no studied adapter changes it" in shown["problems"]["matrix"]
    assert "query matrix" in shown["show"]["lora.study"]["value"]


def test_an_adapter_is_studied_once_and_drawn_from_then_on(monkeypatch, trained_here):
    mine = adapter_choice.bundled()["voice-lora"]
    job = trained_here(mine.folder, "ann", study.FILE)
    folder, key = job.folder / "adapter", job.id
    kept = {"studied": key, "visitor": rooms.here().signer.sign("ann")}
    assert "yours" not in str(answer(MATHEMATICS, kept=kept | {"visitor": "ann"})["show"]["lora.studied"]["choices"])
    shown = answer(MATHEMATICS, kept=kept)["show"]
    assert "yours" not in shown["lora.study"]["value"] and shown["lora.studied"]["value"] == key
    assert shown["lora.studied"]["choices"][0][0].startswith("yours: ")

    def studying(adapter):
        yield 0.5, None
        (folder / study.FILE).write_bytes((mine.folder / study.FILE).read_bytes())
        yield 1.0, study.recorded(adapters.read(folder))

    monkeypatch.setattr(real_weights, "studying", studying)
    with pytest.raises(PeftlabError, match="no adapter is chosen"):
        list(real_weights.adding(read()))
    told = list(real_weights.adding(read(kept)))
    assert told[0]["add"]["value"] == "Studying, 50%" and told[-1] == {"kept": {"studied": key}}
    assert "of yours" in answer(MATHEMATICS, kept=kept)["show"]["lora.study"]["value"]
    assert key not in str(answer(kept=kept)["state"])  # ids of runs are in no link


@pytest.mark.parametrize("mine", [None, 3, [3, None], ["../x"], ["gone"]])
def test_adapters_that_are_not_here_are_not_offered(mine):
    shown = answer(MATHEMATICS, TAB.folded["proved"], kept={"visitor": mine, "studied": mine, "proof_adapter": mine})
    assert [key for _, key in shown["show"]["lora.studied"]["choices"]] == list(adapter_choice.bundled())
    assert not shown["problems"] and shown["show"]["lora.proof_adapter"]["value"] in adapter_choice.bundled()
    with pytest.raises(PeftlabError, match="not here, or not yours"):
        adapter_choice.of(read(), "../adapters")


def test_a_proof_tells_how_it_goes_on_with_the_adapter_and_the_prompt_that_were_chosen(monkeypatch):
    asked = read({"proof_adapter": "ticket-lora"}, proof_prompt="Hello")
    first = adapter_choice.task_of(adapter_choice.bundled()["ticket-lora"]).heldout[0].prompt
    assert (proving.prompt(read({"proof_adapter": "ticket-lora"})), proving.prompt(asked)) == (first, "Hello")
    monkeypatch.setattr(proving, "DIAL", lambda of, prompt: iter([(0.0, "base"), (1.0, f"{of.name}-{prompt}")]))
    begins, first, both = (shown["proved"] for shown in proving.prove("dial", asked))
    assert "Answering five times" in begins and "base" in first and "ticket-lora-Hello" in both

    def refused(*_):
        raise PeftlabError("the prompt is empty")

    monkeypatch.setattr(proving, "MERGE", refused)
    told = proving.prove("merge", asked)
    assert "four models" in next(told)["proved"] and next(told) == {"proved": ""}
    with pytest.raises(PeftlabError, match="empty"):
        next(told)
