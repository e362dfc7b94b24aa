"""What the lectures advise and compare, and what is found of it: every piece names what exists, every finding recomputes."""

import json
from dataclasses import asdict

import pytest
from tiny import ROOT

from peftlab import RunSpec, count, predict, resolve, units
from peftlab.base.models import MODELS
from peftlab.catalog.methods import FAMILIES
from peftlab.lectures import checks, evidence
from peftlab.lectures.guide import CASES, GROUPS, SIDES, SPECTRUM, TABLES, weighed
from peftlab.lectures.lessons import LESSONS
from peftlab.methods import METHODS
from peftlab.race import Line
from peftlab.show import guide

LECTURES = ("lecture-11-2", "kiit-tutorial", "beginners-guide", "vanderbilt-slides")
CELLS = [(table, cell) for table in TABLES for cell in table.cells]
DIFFER = {
    "LoRA: trainable, rank 64",
    "Modularity: LoRA",
    "Risk of forgetting",
    "Post-attention: paper",
    'Pfeiffer "vector"',
    "Standard LoRA",
    "Selective-layer: q and v",
    "LoRA++ / Dropout-LoRA",
    "Adapters: BitFit",
    "IA³",
    "Prefix tuning",
}


@pytest.fixture(params=["recorded", "not recorded"])
def race(request, tmp_path, monkeypatch):
    """Times of a token, or none."""
    file = tmp_path / "race.json"
    monkeypatch.setattr(evidence, "RACE", file)
    if request.param == "recorded":
        times = {"lora": (1.6, 1.0), "houlsby": (1.5, None), "prompt": (1.04, None), "prefix": (1.1, None)}
        lines = [
            asdict(Line(key, {"method": key, "model": "gpt2"}, 1, 1.0, 1, 1, apart=apart, merged=merged))
            for key, (apart, merged) in times.items()
        ]
        failed = asdict(Line("x", {"method": "dora", "model": "gpt2"}, 0, 0.0, 0, 0, error="out of memory"))
        head = {"hardware": "H", "date": "D", "versions": {"torch": "2"}, "command": "C"}
        file.write_text(json.dumps({**head, "lines": [*lines, failed]}))
    return file


def test_the_families_are_the_registrys_in_the_lectures_order():
    assert [f.key for f in SPECTRUM] == ["prompt-based", "selective", "additive", "full"]
    assert {f.key for f in SPECTRUM} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda c: c.key)
def test_every_situation_names_what_exists(case):
    assert case.group in GROUPS and set(case.methods) <= set(METHODS) and case.source.startswith(LECTURES)
    assert case.when and case.advice and case.why and (not case.model or case.model in MODELS)
    assert not case.here or evidence.here(case.here, case.model or "gemma-3-270m")
    assert case.group != "none" or not case.methods  # to train nothing is the advice


def test_the_guide_has_all_that_the_lectures_list():
    not_to = [c.source for c in CASES.values() if "When Not to Use PEFT?" in c.source]
    assert sorted(source[-1] for source in not_to) == list("123456")
    assert len([c for c in CASES.values() if c.source.startswith("lecture-11-2, Recap")]) == 3
    assert len([c for c in CASES.values() if c.group == "gemma"]) == 4
    assert any(c.ticked and c.group == "none" for c in CASES.values()) and any(
        c.ticked and c.methods for c in CASES.values()
    )
    assert [s.of for s in SIDES if s.source == "kiit-tutorial"] == [
        "Last layer only",
        "Adapters",
        "Prompt tuning",
        "Prefix tuning",
        "LoRA",
    ]


def test_advice_is_weighed_by_how_many_ask_for_it():
    assert weighed([CASES["memory"], CASES["many"], CASES["default"]])[0] == ("lora", 3)


@pytest.mark.parametrize(("table", "cell"), CELLS, ids=lambda part: getattr(part, "of", ""))
def test_every_statement_is_found_to_hold_or_differ(table, cell, race):
    found = checks.found(cell)
    assert table.source.startswith(LECTURES) and found.text and found.holds is not None
    assert found.holds != (cell.of in DIFFER and (cell.of, cell.check) != ("Prefix tuning", "virtual"))
    assert found.holds or cell.why or cell.check == "claim"  # a difference has its reason


def test_times_are_the_recorded_ones_or_the_registrys_words(race):
    cell = next(c for _, c in CELLS if c.of == "LoRA: inference")
    if race.exists():
        assert checks.found(cell).text == "Measured on GPT-2, a token takes 1.60× the base's time apart, 1.00× merged."
        assert set(evidence.race_lines(race)) == {"lora", "houlsby", "prompt", "prefix"}
        assert evidence.race_source(race) == "H, D, torch 2. Command: C"
    else:
        assert checks.found(cell).text == METHODS["lora"].about.inference
        assert evidence.race_lines(race) == {} and evidence.race_source(race) == ""


def test_a_recorded_time_can_contradict_a_lecture(tmp_path, monkeypatch):
    line = asdict(Line("l", {"method": "lora", "model": "gpt2"}, 1, 1.0, 1, 1, apart=1.6, merged=1.4))
    (tmp_path / "slow.json").write_text(json.dumps({"lines": [line]}))
    monkeypatch.setattr(evidence, "RACE", tmp_path / "slow.json")
    assert checks.found(next(c for _, c in CELLS if c.of == "LoRA: inference")).holds is False


def test_checks_can_say_no():
    no = {
        "family": {"method": "bitfit", "wanted": "additive"},
        "paper": {"method": "lora", "authors": "Houlsby", "year": 2019},
        "merges": {"method": "houlsby", "can": True},
        "place": {"method": "lora", "wanted": "series"},
        "file": {"method": "full", "model": "gemma-3-270m"},
        "fewer": {"method": "houlsby", "than": ["pfeiffer"], "model": "gpt2"},
        "same": {"method": "lora", "other": "dora", "model": "gpt2"},
        "extra": {"method": "lora", "over": "dora", "model": "gpt2"},
        "virtual": {"method": "prefix", "model": "gpt2", "per_layer": False},
        "reduced": {
            "spec": {"model": "1B", "method": "full"},
            "than": {"model": "1B", "method": "full"},
            "convention": "8n",
        },
        "gpus": {"spec": {"model": "1B", "method": "full"}, "convention": "8n", "least": 8, "most": 16},
        "all-tasks": {"spec": {"model": "1B", "method": "full"}, "convention": "8n", "trainable": 1_000_000_000},
        "cheaper": {"method": "full", "than": "lora", "model": "llama-3.1-8b"},
    }
    for check, given in no.items():
        assert checks.CHECKS[check](**given).holds is False, check


def test_sentences_follow_the_model():
    small, large = (evidence.counted("lora", model) for model in ("gemma-3-270m", "llama-3.1-8b"))
    assert "1,898,496 of 268,098,176 numbers (0.708%)" in small and small != large
    assert evidence.counted("bitfit", "gemma-3-270m").startswith("Gemma 3 270M has no bias to train")
    lora = predict(resolve(RunSpec(model="llama-3.1-8b", method="lora", gpu=evidence.GPU)))
    assert f"LoRA about {units.size(lora.needed)}" in evidence.here("quantized", "llama-3.1-8b")
    assert evidence.here("", "gpt2") == "" == evidence.here("storage", "no-such-model-at-all")


def test_the_map_has_every_method_with_its_count_or_its_reason():
    on = evidence.places("smollm2-135m-instruct")
    assert [p.key for p in on] == list(METHODS)
    for place in on:
        if place.report:
            assert (
                place.report == count(resolve(RunSpec(model="smollm2-135m-instruct", method=place.key)))
                and not place.reason
            )
        else:
            assert place.key == "bitfit" and "has no bias to train" in place.reason and place.length == 0
    by_share = sorted((p for p in on if p.report), key=lambda p: p.report.trainable_percent)
    assert [p.length for p in by_share] == sorted(p.length for p in by_share) and by_share[-1].length == 1


def test_the_sentence_is_the_counts():
    said = guide.map_sentence(evidence.places("smollm2-135m-instruct"))
    assert f"{len(METHODS)} methods</b>, three ideas: steer, select or add." in said
    assert "11,520 numbers (0.00856%)" in said and "134,515,008" in said


def test_no_number_of_the_guide_is_ours_without_a_computation():
    """Its `says` are the lectures'; what we say of a method beside it is computed."""
    data = json.loads((ROOT / "peftlab" / "catalog" / "guide.json").read_text())
    assert all(e["here"] in evidence.HERE for part in ("cases", "sides") for e in data[part] if "here" in e)
    assert {c["check"] for t in data["tables"] for c in t["cells"]} == set(checks.CHECKS)


def test_what_was_raced_here_stands_beside_what_others_published():
    lesson = LESSONS["methods"]
    figures = {claim.says: found.text for claim, found in lesson.findings(lesson.recordings()[0].lines)}
    assert figures["PEFT forgets less"] in evidence.here("forgetting", "gpt2")
    assert figures["PEFT trains faster"] in evidence.here("quick", "gpt2")
    assert LESSONS["size"].findings(LESSONS["size"].recordings()[0].lines)[0][1].text in evidence.here(
        "gemma-best", "gpt2"
    )
    with pytest.raises(LookupError, match="claim=nobody says so"):
        evidence.raced("nobody says so")
