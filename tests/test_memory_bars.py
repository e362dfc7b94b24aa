"""The Memory tab's data: what the page draws between two answers of the server is what the server would have said."""

import json
import random
import re
import shutil
import subprocess

import pytest

pytest.importorskip("gradio")

from demos import memory_calculator
from demos.page.tab import Asked
from peftlab import RunSpec, predict, resolve, units
from peftlab.memory import exact
from peftlab.show.memory_figures import bars_value, memory_sentence
from peftlab.show.settings import method_name

SPECS = (
    RunSpec(model="llama-3.1-8b", rank=16),
    RunSpec(model="smollm2-135m", rank=16, precision="bf16", gradient_checkpointing=True),
    RunSpec(model="gpt2", method="dora", rank=4, dropout=0.1),
    RunSpec(model="qwen3-0.6b", method="houlsby"),
    RunSpec(model="olmoe-1b-7b", method="ln", precision="bf16"),
    RunSpec(model="llama-2-7b", method="qlora", rank=64),
    RunSpec(model="llama-3.1-70b", method="lora", n_gpus=8, sharding="fsdp"),
    RunSpec(model="opt-1.3b", method="full", accumulation=4),
)
POINTS = [(b, s, r) for b in (1, 3, 64) for s in (16, 512, 4096) for r in (1, 16, 256)]


def asked_for(spec, convention="exact"):
    return Asked(spec, {"convention": convention, "share": 0.5}, {})


def value_of(spec, at=None):
    """The page's data for a spec, with the sliders at (batch, length, rank)."""
    reports, forms = memory_calculator.seen(asked_for(spec))
    return json.loads(json.dumps(bars_value(reports, forms, at or memory_calculator.at(spec))))


def evaluated(run, at):
    """Bytes by kind at the peak, as DRAW's `parts` evaluates them."""
    moments = [
        {
            kind: max(0, sum(c * at[0] ** i * at[1] ** j * at[2] ** k for c, i, j, k in terms))
            for kind, terms in m.items()
        }
        for m in run["form"]["moments"]
    ]
    return max(moments, key=lambda kinds: sum(kinds.values()))


def moved(spec, at):
    batch, length, rank = at
    spec = spec.but(batch_size=batch, sequence_length=length)
    return spec.but(rank=rank) if resolve(spec).rank else spec


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.model} {s.method or 'lora'}")
def test_the_pages_polynomials_are_predict(spec):
    runs = value_of(spec)["runs"]
    assert len(runs) == 1 + ((spec.method or "lora") != "full")
    for at in POINTS:
        for run, asked in zip(runs, memory_calculator.both(spec), strict=False):
            report, parts = predict(resolve(moved(asked, at))), evaluated(run, at)
            assert sum(parts.values()) == pytest.approx(report.allocated, rel=1e-9, abs=16)
            assert run["form"]["reserve"] * sum(parts.values()) + run["form"]["context"] == pytest.approx(
                report.process, rel=1e-9, abs=16
            )


def test_full_fine_tuning_is_one_bar():
    (run,) = value_of(RunSpec(model="llama-3.1-8b", method="full"))["runs"]
    assert run["name"] == "Full fine-tuning" and run["exact"] is None


def test_a_convention_and_a_bare_count_have_states_alone():
    spec = RunSpec(model="llama-3.1-8b", rank=16)
    for asked, convention in ((spec, "12n"), (spec.but(model="100B", rank=None), "exact")):
        reports, forms = memory_calculator.seen(asked_for(asked, convention))
        value = bars_value(reports, forms, memory_calculator.at(asked))
        assert [run["form"] for run in value["runs"]] == [None, None] == [run["exact"] for run in value["runs"]]
        assert [sum(run["states"].values()) for run in value["runs"]] == [r.states for r in reports]
        assert "Not in these bars" in value["closed"] and value["exact"] == "" and "alone" in value["words"]["it"]


def test_the_exact_parts_add_up_to_the_process(tiny_model):
    spec = RunSpec(model=str(tiny_model), batch_size=2, sequence_length=64)
    _, forms = memory_calculator.seen(asked_for(spec))
    reports = tuple(exact(resolve(s)) for s in memory_calculator.both(spec))
    value = bars_value(reports, forms, memory_calculator.at(spec))
    assert [sum(run["exact"].values()) for run in value["runs"]] == [r.process for r in reports]
    assert units.size(reports[1].allocated) in value["exact"] and re.search("The .*closed form.* had", value["exact"])


def test_names_are_escaped(monkeypatch):
    report = predict(resolve(RunSpec(model="gpt2")))
    from dataclasses import replace

    value = bars_value((replace(report, model_name="<b>", method_name="<i>"),), (None,), (1, 1, 1))
    assert value["model"] == "&lt;b&gt;" and value["runs"][0]["name"].startswith("&lt;i&gt;")


NODE = shutil.which("node")
EMPTY = ' class=""'
HARNESS = """
const {draw: source, cases} = JSON.parse(require('fs').readFileSync(0));
const nothing = () => {};
const said = cases.map(({value, points}) => {
  const places = {}, listeners = {};
  const element = {clientWidth: 800, querySelector: (name) => places[name] ??= {innerHTML: '', clientWidth: 800, classList: {toggle: nothing}}};
  const window = {addEventListener: (name, f) => { listeners[name] = f; }};
  class ResizeObserver { observe() {} }
  const watch = (name, f) => { listeners[name] = f; }, peftlab = {redrawn: nothing};
  const make = new Function('peftlab', 'props', 'element', 'watch', 'trigger', 'window', 'document', 'ResizeObserver', 'setTimeout', 'clearTimeout',
    source + '; return () => props.value.runs.map(parts);');
  const parts = make(peftlab, {value}, element, watch, nothing, window, {addEventListener: nothing}, ResizeObserver, nothing, nothing);
  return points.map((at) => {
    listeners['peftlab-written']({detail: {batch_size: at[0], sequence_length: at[1], rank: at[2]}});
    listeners.value();
    return {parts: parts(), sentence: places['.sentence'].innerHTML, bars: places['.bars'].innerHTML};
  });
});
console.log(JSON.stringify(said));
"""
"""The page's own script with stand-ins for what the browser gives it."""


def drawn(cases):
    """What the script draws, at each point of each case."""
    sent = json.dumps({"draw": memory_calculator.DRAW, "cases": cases})
    done = subprocess.run([NODE, "-e", HARNESS], input=sent, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not NODE, reason="no node")
def test_the_pages_script_says_what_python_does():
    """At 56 random places of the sliders: the bytes, and the whole opening sentence."""
    draw = random.Random(0)
    cases = [
        {
            "value": value_of(spec),
            "points": [(draw.randint(1, 64), draw.randrange(16, 8192, 16), draw.randint(1, 256)) for _ in range(7)],
        }
        for spec in SPECS
    ]
    for spec, case, answers in zip(SPECS, cases, drawn(cases), strict=True):
        for at, answer in zip(case["points"], answers, strict=True):
            reports = [predict(resolve(moved(s, at))) for s in memory_calculator.both(spec)]
            for run, parts, report in zip(case["value"]["runs"], answer["parts"], reports, strict=False):
                assert sum(parts.values()) == pytest.approx(report.process, rel=1e-9, abs=16)
                assert {k: parts[k] for k in evaluated(run, at)} == pytest.approx(evaluated(run, at), rel=1e-12)
            assert answer["sentence"].replace(EMPTY, "") == memory_sentence(*reports)
            names = re.findall(r'<div class="bar-name">(.*?) <small>', answer["bars"])
            assert names == [method_name(r) for r in reports][: len(names)]


@pytest.mark.skipif(not NODE, reason="no node")
def test_the_pages_script_shows_the_exact_figures_only_where_they_hold(tiny_model):
    spec = RunSpec(model=str(tiny_model), batch_size=2, sequence_length=64, rank=4)
    _, forms = memory_calculator.seen(asked_for(spec))
    reports = tuple(exact(resolve(s)) for s in memory_calculator.both(spec))
    value = bars_value(reports, forms, memory_calculator.at(spec))
    case = {"value": value, "points": [(2, 64, 4), (2, 64, 5), (3, 64, 4), (2, 64, 4)]}
    (answers,) = drawn([case])
    shown = [answer["parts"] for answer in answers]
    whole = [run["exact"] for run in value["runs"]]
    assert shown[0] == shown[3] == whole and shown[1][1] != whole[1] and shown[2][0] != whole[0]
    assert answers[0]["sentence"].replace(EMPTY, "") == memory_sentence(*reports)
