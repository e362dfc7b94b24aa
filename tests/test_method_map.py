"""The map of methods on the page: every method once, what it trains, and what happens when one is chosen."""

import re
from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio")

from demos import method_map, methods, page
from peftlab import RunSpec, count, published, words
from peftlab.catalog.guide import CASES, TABLES
from peftlab.catalog.methods import ABOUT
from peftlab.methods import METHODS

CHIP = re.compile(r'<button type="button" data-method="([^"]+)"([^>]*)>(.*?)</button>', re.DOTALL)


def chips(model, chosen="lora"):
    """Method → (attributes, content), in the page's order."""
    found = CHIP.findall(method_map.spectrum(model, chosen)["families"])
    assert len(found) == len({key for key, *_ in found})
    return {key: (attributes, content) for key, attributes, content in found}


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "gpt2", "bert-base", "t5-base"])
def test_every_method_is_there_once_with_its_share_or_its_reason(model):
    on = chips(model)
    assert set(on) == set(METHODS)
    for key, (attributes, content) in on.items():
        if 'aria-disabled="true"' in attributes:
            assert "title=" in attributes and "not for this model" in content
            with pytest.raises(page.SpecError):
                count(RunSpec(model=model, method=key))
        else:
            share = words.percent(count(RunSpec(model=model, method=key)).trainable_percent / 100)
            assert f"<span>{share}</span>" in content


def test_the_spectrum_goes_from_the_least_to_the_most_intrusive():
    keys = list(chips("gpt2"))
    family = [METHODS[key].about.family for key in keys]
    assert list(dict.fromkeys(family)) == ["prompt-based", "selective", "additive", "full"]
    deep = [METHODS[key].about.reparameterized for key in keys if METHODS[key].about.family == "additive"]
    assert deep == sorted(deep)  # those with modules of their own, then the reparameterized


def test_one_chip_is_pressed_and_names_are_escaped(monkeypatch):
    pressed = [key for key, (attributes, _) in chips("gpt2", "ia3").items() if 'aria-pressed="true"' in attributes]
    assert pressed == ["ia3"]
    from dataclasses import replace

    monkeypatch.setitem(ABOUT, "oft", replace(ABOUT["oft"], name="<b>&"))
    assert "&lt;b&gt;&amp;" in chips("gpt2")["oft"][1]


def test_a_method_new_to_the_registry_appears_by_itself(monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(ABOUT, "mine", replace(ABOUT["ln"], name="Mine"))
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["ln"], key="mine"))
    assert "Mine" in chips("gpt2")["mine"][1]
    with gr.Blocks():
        view = method_map.build(gr.State(page.OPENING))
    assert f"{len(METHODS)} methods" in view.show(RunSpec(model="gpt2", method="mine"))[2]


@pytest.fixture
def tab():
    """The tab, and its events by the component that starts them."""
    with gr.Blocks() as demo:
        view = method_map.build(gr.State(page.OPENING))
    events = {demo.blocks[f.targets[0][0]]: f.fn for f in demo.fns.values() if f.targets}
    return SimpleNamespace(
        view=view, events=events, problem=view.outputs[0], model=view.outputs[1], map=view.outputs[3]
    )


def request(name):
    return SimpleNamespace(session_hash=name)


def test_choosing_a_method_makes_it_the_settings_everywhere(tab):
    choose = tab.events[tab.map]
    begin = RunSpec(model="gpt2", method="lora", rank=64, task="voice")
    problem, spec, line, panel = choose(request("a"), begin, {"method": "houlsby", "families": ""})
    assert not problem and (spec.model, spec.method, spec.task, spec.rank) == ("gpt2", "houlsby", "voice", None)
    assert page.visitor(request("a"))._spec == spec
    assert f"{count(spec).trainable_parameters:,}" in line and panel == methods.method_panel("houlsby")
    assert words.size(count(spec).adapter_bytes) in line


def test_a_method_that_does_not_suit_is_refused_and_changes_nothing(tab):
    answer = tab.events[tab.map](request("b"), RunSpec(model="gpt2"), {"method": "oft", "families": ""})
    assert isinstance(answer, page.Refused) and "oft" in answer[0] and page.visitor(request("b"))._spec is None


def test_a_model_that_the_method_does_not_suit_begins_anew(tab):
    begin = RunSpec(model="gpt2", method="bitfit")
    problem, spec, *_ = tab.events[tab.model](request("c"), begin, "llama-2-7b")
    assert not problem and (spec.model, spec.method) == ("llama-2-7b", None)
    _, spec, *_ = tab.events[tab.model](request("c"), begin, "opt-125m")
    assert (spec.model, spec.method) == ("opt-125m", "bitfit")


def test_the_tab_follows_what_others_set(tab):
    spec = RunSpec(model="gpt2", method="ia3")
    shown = tab.view.show(spec)
    assert len(shown) == len(tab.view.outputs) and shown[0] == "" and shown[1] == "gpt2"
    assert "GPT-2" in shown[2] and shown[3]["method"] == "ia3" and shown[6] == methods.method_panel("ia3")
    refused = tab.view.show(RunSpec(model="100B"))
    assert len(refused) == len(tab.view.outputs) and "100B" in refused[0]


def test_advice_is_of_what_is_ticked():
    ticked = [key for key, case in CASES.items() if case.ticked]
    text = method_map.advice(iter(ticked), "gpt2")
    assert text.count('<section class="case">') == len(ticked) > 1 and "First try without training" in text
    assert "<b>LoRA</b> in 2 of 3" in text
    extreme = method_map.advice(["gemma-extreme"], "gpt2")
    assert "Gemma 3 270M has no bias to train" in extreme and "differs" in extreme and "35,136" not in extreme
    assert "Tick" in method_map.advice([], "gpt2")


def test_pros_and_cons_have_counts_of_the_model():
    text = method_map.pros_and_cons("gpt2")
    for key in ("head", "houlsby", "prompt", "prefix", "lora"):
        assert f"{count(RunSpec(model='gpt2', method=key)).trainable_parameters:,} of 124,439,808" in text


def test_the_tables_count_what_holds():
    holds, differ, text = method_map.tables()
    assert holds + differ == sum(len(table.cells) for table in TABLES)
    assert (text.count(">holds<"), text.count(">differs<")) == (holds, differ)
    assert "Infused" in text and "<script" not in text


def test_every_run_of_the_chart_is_in_its_table():
    text = method_map.all_runs()
    assert text.count("<tr>") == 1 + len(published.runs())
    charts, said = method_map.benchmark("memory", "accuracy")
    assert set(charts) == {"light", "dark"} and "7 of 63 runs" in said
