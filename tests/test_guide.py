"""What the lectures advise, and what stands beside it: every piece names what exists, every sentence is computed."""

import pytest

from peftlab import RunSpec, count, predict, resolve, units
from peftlab.base.models import MODELS
from peftlab.catalog import FAMILIES
from peftlab.lectures import facts
from peftlab.lectures.guide import CASES, GROUPS, OF_MODEL, SIDES, SPECTRUM, beside
from peftlab.lectures.lessons import finding
from peftlab.lectures.published import of_benchmark
from peftlab.methods import METHODS
from peftlab.show import guide

LECTURES = ("lecture-11-2", "kiit-tutorial", "beginners-guide", "vanderbilt-slides")


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.key)
def test_every_situation_names_what_exists(case):
    assert case.group in GROUPS and set(case.methods) <= set(METHODS) and case.source.startswith(LECTURES)
    assert case.when and case.advice and case.why and (not case.model or case.model in MODELS)
    assert bool(case.here or case.raced) == bool(beside(case, case.model or "gemma-3-270m"))
    assert case.group != "none" or not case.methods  # to train nothing is the advice


def test_the_guide_has_all_that_the_lectures_list():
    assert [f.key for f in SPECTRUM] == ["prompt-based", "selective", "additive", "full"]
    assert {f.key for f in SPECTRUM} == set(FAMILIES)
    not_to = [c.source for c in CASES.values() if "When Not to Use PEFT?" in c.source]
    assert sorted(source[-1] for source in not_to) == list("123456")
    assert len([c for c in CASES.values() if c.source.startswith("lecture-11-2, Recap")]) == 3
    assert len([c for c in CASES.values() if c.group == "gemma"]) == 4
    ticked = [c for c in CASES.values() if c.ticked]
    assert any(c.group == "none" for c in ticked) and any(c.methods for c in ticked)
    of_kiit = [s.of for s in SIDES if s.source == "kiit-tutorial"]
    assert of_kiit == ["Last layer only", "Adapters", "Prompt tuning", "Prefix tuning", "LoRA"]


def test_sentences_follow_the_model():
    small, large = (facts.counted("lora", model) for model in ("gemma-3-270m", "llama-3.1-8b"))
    assert "1,898,496 of 268,098,176 numbers (0.708%)" in small and small != large
    assert facts.counted("bitfit", "gemma-3-270m").startswith("Gemma 3 270M has no bias to train")
    lora = predict(resolve(RunSpec(model="llama-3.1-8b", method="lora", gpu=facts.GPU)))
    assert f"LoRA about {units.size(lora.needed)}" in beside(CASES["memory"], "llama-3.1-8b")
    assert beside(CASES["many"], "no-such-model-at-all") == ""


def test_the_map_has_every_method_with_its_count_or_its_reason():
    on = facts.places("smollm2-135m-instruct")
    assert [p.key for p in on] == list(METHODS)
    for place in on:
        if place.report:
            assert place.report == count(resolve(RunSpec(model="smollm2-135m-instruct", method=place.key)))
        else:
            assert place.key == "bitfit" and "has no bias to train" in place.reason and place.length == 0
    by_share = sorted((p for p in on if p.report), key=lambda p: p.report.trainable_percent)
    assert [p.length for p in by_share] == sorted(p.length for p in by_share) and by_share[-1].length == 1
    said = guide.map_sentence(on)
    assert f"{len(METHODS)} methods</b>, three ideas: steer, select or add." in said
    assert "11,520 numbers (0.00856%)" in said and "134,515,008" in said


def test_every_sentence_beside_the_advice_is_used_and_what_was_raced_here_follows_what_others_published():
    assert {piece.here for piece in (*CASES.values(), *SIDES)} - {""} == {*OF_MODEL, *of_benchmark()}
    pieces = [piece for piece in (*CASES.values(), *SIDES) if piece.raced]
    assert {piece.raced for piece in pieces} >= {"near-full", "forgets-less", "trains-faster", "prompts-small"}
    for piece in pieces:
        end = f"In the race recorded here on NVIDIA H100 80GB HBM3: {finding(piece.raced).words}."
        assert beside(piece, "gpt2").endswith(end)
