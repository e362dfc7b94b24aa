"""The map of methods on the page: every method once, what it trains, and what happens when one is chosen."""

import re
from dataclasses import replace

import pytest

pytest.importorskip("gradio")

from demos.memory_calculator import Memory
from demos.method_map import Methods
from demos.page.store import blocks
from peftlab import RunSpec, SpecError, count, resolve, units
from peftlab.catalog import ABOUT
from peftlab.lectures import facts
from peftlab.lectures.guide import CASES
from peftlab.memory import exact, predict
from peftlab.methods import METHODS
from peftlab.room import worker
from peftlab.show import guide, marks, methods, statements

STORE = blocks(Methods()).store
TAB = STORE.tabs["methods"]
CHIP = re.compile(r'<button type="button" data-method="([^"]+)"([^>]*)>(.*?)</button>', re.DOTALL)


def chips(model, chosen="lora"):
    """Method → (attributes, content), in the page's order."""
    found = CHIP.findall(guide.spectrum(model, chosen)["families"])
    assert len(found) == len({key for key, *_ in found})
    return {key: (attributes, content) for key, attributes, content in found}


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "t5-base"])
def test_every_method_is_there_once_with_its_share_or_its_reason(model):
    on = chips(model)
    assert set(on) == set(METHODS)
    for key, (attributes, content) in on.items():
        if 'aria-disabled="true"' in attributes:
            assert "title=" in attributes and "not for this model" in content
            with pytest.raises(SpecError):
                count(resolve(RunSpec(model=model, method=key)))
        else:
            share = units.percent(count(resolve(RunSpec(model=model, method=key))).trainable_percent / 100)
            assert f"<span>{share}</span>" in content


def test_the_spectrum_goes_from_the_least_to_the_most_intrusive_and_one_chip_is_pressed():
    on = chips("gpt2", "ia3")
    about = [METHODS[key].about for key in on]
    assert list(dict.fromkeys(each.family for each in about)) == ["prompt-based", "selective", "additive", "full"]
    deep = [each.reparameterized for each in about if each.family == "additive"]
    assert deep == sorted(deep)  # those with modules of their own, then the reparameterized
    assert [key for key, (attributes, _) in on.items() if 'aria-pressed="true"' in attributes] == ["ia3"]


def test_a_method_new_to_the_registry_appears_by_itself_with_its_name_escaped(monkeypatch):
    monkeypatch.setitem(ABOUT, "mine", replace(ABOUT["ln"], name="<b>&"))
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["ln"], key="mine"))
    monkeypatch.setattr(facts, "places", facts.places.__wrapped__)  # what is kept is without it
    assert "&lt;b&gt;&amp;" in chips("gpt2")["mine"][1]
    assert f"{len(METHODS)} methods" in shown(model="gpt2", method="mine")["sentence"]


def answer(opened=(), **state):
    return STORE.answer({"number": 1, "tab": "methods", "state": state, "open": list(opened)})


def shown(**state):
    """What each control and panel holds, by name; folded panels too."""
    updates = answer(set(TAB.folds), **state)["show"]
    return {name.partition(".")[2]: update.get("value") for name, update in updates.items()}


def test_the_tab_shows_the_settings():
    found = shown(model="gpt2", method="houlsby", across="memory", when_none="none", when_peft="default;latency")
    spec = RunSpec(model="gpt2", method="houlsby")
    assert "GPT-2" in found["sentence"] and found["method"]["method"] == "houlsby"
    assert f"{count(resolve(spec)).trainable_parameters:,}" in found["chosen"]
    assert units.size(count(resolve(spec)).adapter_bytes) in found["chosen"]
    assert found["card"] == methods.method_panel("houlsby")
    assert "7 of 63 runs" in found["front"]
    assert (found["when_none"], found["when_peft"]) == ((), ("default", "latency"))
    assert found["advice"].count('<section class="case">') == 2


def test_ticks_as_they_are_at_first_are_not_in_the_link():
    keys = [key for key, case in CASES.items() if case.group == "peft" and case.ticked]
    assert answer(when_peft=";".join(reversed(keys)))["state"] == {}
    assert answer(when_peft="few")["state"] == {"when_peft": "few"}


def test_nothing_folded_is_drawn_before_it_is_open():
    folded, first = {"methods.all_runs", "methods.sides", "methods.checked"}, answer()["show"]
    assert not folded & set(first) and folded <= set(answer(TAB.folds)["show"])
    label = first["methods.counted"]["label"]
    assert (
        label == f"The lectures' tables, checked: {statements.tab_table('methods').counted}"
        and "statements hold" in label
    )


@pytest.mark.parametrize("model, method", [("llama-2-7b", "bitfit"), ("gpt2", "oft")])
def test_a_method_that_does_not_suit_the_model_is_refused_and_lora_shown(model, method):
    found = answer(model=model, method=method)
    assert set(found["problems"]) == {"method"} and method in found["problems"]["method"]
    assert found["state"] == {"model": model, "method": method}  # another model may suit it again
    assert found["show"]["methods.method"]["value"] == guide.spectrum(model, "lora")
    trained = count(resolve(RunSpec(model=model, method="lora"))).trainable_parameters
    assert f"{trained:,}" in found["show"]["methods.chosen"]["value"]
    assert "100B" in answer(model="100B")["problems"]["model"]  # a bare count has nothing to map


def test_memory_is_what_the_memory_tab_says(monkeypatch):
    """Its exact figure once that is known; until then it is said to be about right."""
    asked, memory = STORE.read({}), Memory()
    about = predict(resolve(facts.automatic("llama-3.1-8b", "lora")[0]))
    assert f"LoRA about {units.size(about.needed)}" in shown()["advice"]
    traced = [slow.arguments[0] for slow in TAB.slow(asked)]
    assert resolve(blocks(memory).store.read({}).spec.but(gpu=facts.GPU)) in traced  # the run that Memory traces
    closed = {spec: predict(resolve(spec)) for spec in traced}  # they pass for traces, a tenth smaller
    reports = {s: replace(r, source="trace", reserved=int(r.reserved * 0.9)) for s, r in closed.items()}
    monkeypatch.setattr(worker, "known", lambda work, *given: reports.get(given[0]) if work is exact else None)
    lora, qlora = (units.size(reports[spec].needed) for spec in facts.automatic("llama-3.1-8b", "lora", "qlora"))
    found = shown()
    assert f"LoRA {lora}, QLoRA {qlora}." in found["advice"]
    assert f"{qlora} against {lora} predicted" in found["checked"]
    assert answer()["slow"] is False


def test_what_is_not_in_the_advice_is_not_traced():
    assert not TAB.slow(STORE.read({"when_peft": "none"}))
    assert not TAB.slow(STORE.read({"model": "bert-base"}))  # has no step to trace
    assert len(TAB.slow(STORE.read({"when_full": "small", "when_peft": "none"}))) == 2


def test_units_are_explained():
    found = shown(when_peft="keep")
    assert 'class="how term"' in found["advice"] and marks.TERMS["nats"] in found["advice"]
    assert marks.TERMS["nats"] in found["sides"] and marks.TERMS["amp"] in found["sides"]
