"""The scripts of the Memory and the LoRA tab: what the page counts, says, draws and reports is what the backend would."""

import json
import random
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

pytest.importorskip("gradio")

from demos import lora_visualizer, memory_calculator
from demos.page import address, store
from demos.page.tab import Asked
from peftlab import RunSpec, SpecError, count, predict, resolve, units
from peftlab.base import architecture
from peftlab.base.models import MODELS
from peftlab.catalog import PRESETS
from peftlab.count import BYTES
from peftlab.memory import exact
from peftlab.methods import METHODS
from peftlab.methods.selection import where
from peftlab.resolve import with_preset
from peftlab.show import marks, memory_figures, settings, shapes
from peftlab.spec import parse_layers

BROWSER = """
const {script, cases} = JSON.parse(require('fs').readFileSync(0)), nothing = () => {}, document = {addEventListener: nothing};
class ResizeObserver { observe() {} }
"""
"""Stand-ins for what the browser gives every script."""


def in_node(harness, script, cases):
    """What a script of the page makes of each case: `harness` defines `of`, which runs it with stand-ins."""
    if not (node := shutil.which("node")):
        pytest.skip("no node")
    code, sent = f"{BROWSER}{harness}console.log(JSON.stringify(cases.map(of)));", {"script": script, "cases": cases}
    done = subprocess.run([node, "-e", code], input=json.dumps(sent), capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


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
BARS = """
const of = ({value, points}) => {
  const places = {}, listeners = {};
  const element = {clientWidth: 800, querySelector: (name) => places[name] ??= {innerHTML: '', clientWidth: 800, classList: {toggle: nothing}}};
  const window = {addEventListener: (name, f) => { listeners[name] = f; }};
  const watch = (name, f) => { listeners[name] = f; }, peftlab = {redrawn: nothing};
  const make = new Function('peftlab', 'props', 'element', 'watch', 'trigger', 'window', 'document', 'ResizeObserver', 'setTimeout', 'clearTimeout',
    script + '; return () => props.value.runs.map(parts);');
  const parts = make(peftlab, {value}, element, watch, nothing, window, document, ResizeObserver, nothing, nothing);
  return points.map((at) => {
    listeners['peftlab-written']({detail: {batch_size: at[0], sequence_length: at[1], rank: at[2]}});
    listeners.value();
    return {parts: parts(), sentence: places['.sentence'].innerHTML, bars: places['.bars'].innerHTML};
  });
};
"""


def value_of(spec, convention="exact"):
    """The reports, and the page's data with the sliders where the spec has them."""
    reports, forms = memory_calculator.seen(Asked(spec, {"convention": convention, "share": 0.5}, {}))
    return reports, json.loads(
        json.dumps(memory_figures.bars_value(reports, forms, memory_calculator.at(resolve(spec))))
    )


def moved(spec, at):
    batch, length, rank = at
    spec = spec.but(batch_size=batch, sequence_length=length)
    return spec.but(rank=rank) if resolve(spec).rank else spec


def test_a_convention_and_a_bare_count_have_states_alone():
    spec = RunSpec(model="llama-3.1-8b", rank=16)
    for asked, convention in ((spec, "12n"), (spec.but(model="100B", rank=None), "exact")):
        reports, value = value_of(asked, convention)
        assert [run["form"] for run in value["runs"]] == [None, None] == [run["exact"] for run in value["runs"]]
        assert [sum(run["states"].values()) for run in value["runs"]] == [r.states for r in reports]
        assert "Not in these bars" in value["closed"] and value["exact"] == "" and "alone" in value["words"]["it"]


def test_names_are_escaped():
    report = replace(predict(resolve(RunSpec(model="gpt2"))), model_name="<b>", method_name="<i>")
    value = memory_figures.bars_value((report,), (None,), (1, 1, 1))
    assert value["model"] == "&lt;b&gt;" and value["runs"][0]["name"].startswith("&lt;i&gt;")


def test_the_bars_script_says_what_python_does():
    """At random places of the sliders: the bytes by kind, and the whole opening sentence."""
    draw = random.Random(0)
    cases = [
        {
            "value": value_of(spec)[1],
            "points": [(draw.randint(1, 64), draw.randrange(16, 8192, 16), draw.randint(1, 256)) for _ in range(12)],
        }
        for spec in SPECS
    ]
    drawn = in_node(BARS, memory_calculator.DRAW, cases)
    for spec, case, answers in zip(SPECS, cases, drawn, strict=True):
        assert len(answers[0]["parts"]) == 1 + ((spec.method or "lora") != "full")
        for at, answer in zip(case["points"], answers, strict=True):
            reports = [predict(resolve(moved(s, at))) for s in memory_calculator.both(spec)]
            for parts, report in zip(answer["parts"], reports, strict=False):
                assert sum(parts.values()) == pytest.approx(report.process, rel=1e-9, abs=16)
                assert {k: parts.get(k, 0) for k in report.peak.bytes} == pytest.approx(report.peak.bytes, abs=16)
            assert answer["sentence"].replace(' class=""', "") == memory_figures.memory_sentence(*reports)
            names = re.findall(r'<div class="bar-name">(.*?) <small>', answer["bars"])
            assert names == [settings.method_name(r) for r in reports][: len(names)]


def test_the_exact_parts_add_up_to_the_process_and_are_shown_only_where_they_hold(tiny_model):
    spec = RunSpec(model=str(tiny_model), batch_size=2, sequence_length=64, rank=4)
    both = memory_calculator.both(spec)
    reports = tuple(exact(resolve(s)) for s in both)
    value = memory_figures.bars_value(reports, tuple(map(memory_calculator.closed, both)), (2, 64, 4))
    whole = [run["exact"] for run in value["runs"]]
    assert [sum(parts.values()) for parts in whole] == [r.process for r in reports]
    assert units.size(reports[1].allocated) in value["exact"] and re.search("The .*closed form.* had", value["exact"])
    case = {"value": value, "points": [(2, 64, 4), (2, 64, 5), (3, 64, 4), (2, 64, 4)]}
    (answers,) = in_node(BARS, memory_calculator.DRAW, [case])
    shown = [answer["parts"] for answer in answers]
    assert shown[0] == shown[3] == whole and shown[1][1] != whole[1] and shown[2][0] != whole[0]
    assert answers[0]["sentence"].replace(' class=""', "") == memory_figures.memory_sentence(*reports)


DECODERS = [key for key, entry in MODELS.items() if entry.config is not None and entry.is_causal]
WIDGET = """
const stub = (listeners) => {
  const near = {}, found = (name) => near[name] ??= stub({});
  return {
    style: {getPropertyValue: nothing, setProperty: nothing}, classList: {toggle: nothing}, clientWidth: 600,
    childNodes: Array.from({length: 99}, () => ({data: ''})),
    getAttribute: nothing, setAttribute: nothing, addEventListener: (name, f) => { listeners[name] = f; },
    closest() { return this; }, querySelector: (name) => name.includes(':active') ? null : found(name), querySelectorAll: () => [],
    get firstChild() { return found('first'); }, get lastChild() { return found('last'); },
    get previousSibling() { return found('previous'); }, get previousElementSibling() { return found('previous'); },
  };
};
const of = ({value, points}) => {
  const listeners = {}, stage = stub(listeners), props = {value}, window = {addEventListener: (name, f) => { listeners[name] = f; }};
  let changed, reported, state;
  const peftlab = {get: () => ({state}), heard: (_, __, atRest, patch) => { reported = atRest && patch; }};
  const page = new Function(
    'props', 'element', 'watch', 'peftlab', 'window', 'document', 'ResizeObserver', 'requestAnimationFrame',
    script + '; return () => ({settings, preset: presetNow(), ...count(data, settings), alpha: alphaOf(data, {...settings, alpha: null}),' +
      'targets: targetsText(data, settings.targets), layers: layersText(settings.layers, data.n_layers)});')(
    props, stage, (_, f) => { changed = f; }, peftlab, window, document, ResizeObserver, (f) => { f(); });
  return points.map((at) => {
    props.value = {...value, at};
    state = {method: at.asked ?? at.method};
    reported = null;
    changed();
    if (at.untick) listeners.input({target: {dataset: {knob: 'target'}, value: at.untick}});
    if (at.writes) listeners['peftlab-written']({detail: at.writes});
    for (const [knob, typed] of Object.entries(at.then ?? {})) listeners.input({target: {dataset: {knob}, type: 'number', value: typed}});
    listeners.change({target: {dataset: {knob: 'rank'}}});
    const here = (name) => stage.querySelector(`.here[data-of="${name}"]`).written, sentence = stage.querySelector('.main .sentence').written;
    return {...page(), refused: here('') || here('rank') || here('alpha'), rank: here('rank'), reported, sentence};
  });
};
"""
"""Each point is settings that the server sends, and perhaps what the reader does: to `untick` a module, what another
control `writes`, and `then` by knob; `asked` is the method of the address."""
STORE = store.blocks(lora_visualizer.Lora()).store
SPEC = RunSpec(model="smollm2-135m", method="lora")
HERE = shapes.value(SPEC)["at"]


def page(cases):
    """The page's answers, a list for each (spec, points)."""
    cases = [{"value": shapes.value(spec), "points": points} for spec, points in cases]
    return in_node(WIDGET, lora_visualizer.SCRIPT, cases)


def answers(spec, *points):
    """The page's answers at these points of one model."""
    return page([(spec, points)])[0]


def point(spec):
    """A spec's settings as the page has them; the modules in any order."""
    return shapes.value(spec)["at"]


def written(spec, patch):
    """The settings once the page has written `patch` to those of `spec`."""
    state = address.link(spec)
    for name in (cleared for written in patch for cleared in store.CLEARS.get(written, ())):
        state.pop(name, None)
    return STORE.read(state | {n: v for n, v in patch.items() if v is not None}).spec.but(
        **{n: None for n, v in patch.items() if v is None}
    )


def sentence(report):
    """What the page is to say of a report."""
    rank, name = report.spec.rank, report.method_name
    return shapes.WORDS["sentence"].format(
        what=f"Rank {rank}" if name == "LoRA" else f"{name}, rank {rank},",
        where=where(report.spec),
        trained=marks.bold(f"{report.trainable_parameters:,}", "trained"),
        total=marks.bold(f"{report.total_parameters:,}", "frozen"),
        percent=marks.bold(units.percent(report.trainable_percent / 100), "trained"),
        size=units.size(report.adapter_bytes),
    )


def some(draw, members):
    return draw.sample(members, draw.randint(1, len(members)))


def drawn(draw, model):
    """Settings of any method of the family, with a rank that may be too large."""
    shape = architecture.of(model)
    limits = [m.full_rank for m in shape.adaptable(True)]
    layers = draw.choice([list(range(shape.n_layers)), some(draw, range(shape.n_layers))])
    return {
        "method": draw.choice(shapes.FAMILY),
        "rank": draw.choice([draw.randint(1, 16), draw.randint(1, 300), min(limits), max(limits), max(limits) + 1]),
        "alpha": draw.choice([None, 16, 0.5]),
        "targets": draw.choice([shape.target_names(True), some(draw, shape.target_names(True))]),
        "layers": layers,
        "layers_said": None if len(layers) == shape.n_layers else ",".join(map(str, layers)),
    }


def wanted(spec, at):
    """The spec that settings mean."""
    shape = architecture.of(spec.model)
    every, names = len(at["layers"]) == shape.n_layers, [n for n in shape.target_names(True) if n in at["targets"]]
    return spec.but(
        method=at["method"],
        rank=None if at["rank"] == resolve(RunSpec(method=at["method"])).rank else at["rank"],
        alpha=at["alpha"] if "alpha" in METHODS[at["method"]].settings else None,
        target_modules=None if set(names) == set(shape.target_names(True)) else ",".join(names),
        layers=None if every else ",".join(map(str, sorted(at["layers"]))),
    )


def test_the_page_counts_says_and_reports_what_python_does():
    """At some 250 random settings of every decoder of the catalogue and every method that has a rank."""
    draw, cases = random.Random(0), []
    for model in DECODERS:
        spec = RunSpec(model=model, method="lora", adapter_precision=draw.choice([None, None, "bf16"]))
        cases.append((spec, [drawn(draw, model) for _ in range(8)]))
    counted = refused = 0
    for (spec, points), answers in zip(cases, page(cases), strict=True):
        for at, answer in zip(points, answers, strict=True):
            asked = wanted(spec, at)
            try:
                report = count(resolve(asked))
            except SpecError as error:
                refused += 1
                assert answer["refused"], asked
                if str(error).startswith("rank="):
                    assert answer["refused"] == str(error)
                continue
            counted += 1
            shape, layers = architecture.of(spec.model), answer["layers"] or "all"
            assert not answer["refused"], asked
            automatic = resolve(asked.but(alpha=None))
            assert answer["alpha"] == (None if "alpha" in automatic.unread else automatic.alpha)
            assert answer["trained"] == report.trainable_parameters
            assert answer["saved"] * BYTES[report.spec.adapter_precision] == report.adapter_bytes
            said = asked.but(target_modules=answer["targets"])
            assert answer["sentence"] == sentence(count(resolve(said)))
            assert parse_layers(layers, shape.n_layers) == tuple(sorted(at["layers"]))
            assert shape.targets(answer["targets"], True) == shape.targets(asked.target_modules or "all-linear", True)
            settled = written(spec.but(method=at["method"]), answer["reported"])
            assert settled == asked.but(layers=settled.layers) and count(resolve(settled)).names == report.names
    assert counted >= 200 and refused >= 10


TYPED = [
    ({"rank": "0"}, "rank=0: a rank is a whole number from 1 to 65,536; try 8"),
    ({"rank": "2.5"}, "rank=2.5: a rank is a whole number"),
    ({"rank": ""}, "rank=nothing: a rank is a whole number"),
    ({"rank": "1000000000"}, "rank=1000000000: no adapted matrix has a rank above 576, so a larger update is wasted; try 8, or 576"),
    ({"method": "vera", "rank": "100000"}, "rank=100000: a rank is a whole number from 1 to 65,536"),
    ({"alpha": "0"}, "alpha=0: ΔW is multiplied by alpha"),
    ({"alpha": "-1"}, "it must be above 0 and at most 1,000,000; try 16"),
    ({"alpha": "1e7"}, "at most 1,000,000"),
]  # fmt: skip


def test_a_refused_number_is_written_as_typed_and_drawn_nowhere():
    """So that the box, the link and the refusal say one number; an empty box is the middle of one."""
    points = [HERE | {"then": typed | cure} for typed, _ in TYPED for cure in ({}, {"rank": "9", "alpha": "3"})]
    before, *after = answers(SPEC, HERE, *points)
    for (typed, says), answer, cured in zip(TYPED, after[::2], after[1::2], strict=True):
        assert says in answer["refused"] and "null" not in answer["refused"]
        name, text = list(typed.items())[-1]
        assert answer["reported"][name] == (text or None)
        assert answer["settings"][name] == (256 if "method" in typed else before["settings"][name])
        assert bool(answer["rank"]) == (name == "rank")  # beside its control
        assert cured["refused"] == "" and (cured["reported"]["rank"], cured["reported"]["alpha"]) == (9, 3)


def test_a_refused_number_of_a_link_stands_beside_its_control_and_goes_on_being_refused():
    for text in ("0", "abc", "1000000000"):
        at = shapes.value(SPEC, {"rank": text, "model": "100B"})["at"]
        assert at["refused"] == {"rank": text} and at["rank"] == 8
        answer, touched = answers(SPEC, at, at | {"then": {"alpha": "3"}})
        assert answer["rank"].startswith(f"rank={text}: ") and answer["sentence"] == sentence(count(resolve(SPEC)))
        assert (touched["reported"]["rank"], touched["reported"]["alpha"]) == (text, 3)


def test_nothing_to_train_is_refused_and_not_written():
    no_target, cured, no_layer = answers(SPEC, HERE | {"targets": []}, HERE, HERE | {"layers": []})
    assert "no target module is ticked: nothing would be trained; tick at least one" in no_target["refused"]
    assert "no layer is chosen: nothing would be trained; choose at least one" in no_layer["refused"]
    assert no_target["reported"] is no_layer["reported"] is None and cured["refused"] == "" and cured["reported"]


def test_a_preset_writes_its_settings_and_shows_while_they_are_set():
    asked = [(spec, key) for key in lora_visualizer.ALPHA for spec in (SPEC, SPEC.but(rank=32))]
    after = [with_preset(spec, PRESETS[key]) for spec, key in asked]
    chosen = page([(spec, [point(spec) | {"then": {"preset": key}}]) for spec, key in asked])
    left = page([(then, [point(then) | {"then": {"preset": ""}}]) for then in after])
    for (spec, key), then, (answer,), (gone,) in zip(asked, after, chosen, left, strict=True):
        assert written(spec, answer["reported"]) == then and answer["preset"] == key
        assert gone["reported"]["alpha"] is None and gone["preset"] == ""


def test_modules_of_a_model_that_is_gone_are_not_written():
    spec = SPEC.but(target_modules="q_proj", layers="0-2")
    (answer,) = answers(spec, point(spec) | {"writes": {"model": "gpt2"}, "then": {"rank": "9"}})
    assert answer["reported"] == {"rank": 9, "alpha": None, "target_modules": None, "layers": None}


def test_what_was_not_written_does_not_outlive_what_another_control_writes():
    """Reset after the last module was unticked: the settings are as they were, so that no answer redraws them."""
    spec = SPEC.but(target_modules="q_proj")
    at = point(spec) | {"untick": "q_proj"}
    alone, reset = answers(spec, at, at | {"writes": {"rank": ""}})
    assert "no target module" in alone["refused"] and alone["reported"] is None
    assert reset["refused"] == "" and reset["reported"]["target_modules"] == "q_proj"


def test_where_another_method_is_asked_for_a_change_is_loras():
    """The tab shows LoRA in place of a method that has no rank."""
    (answer,) = answers(SPEC, HERE | {"asked": "houlsby", "then": {"rank": "9"}})
    assert answer["reported"]["method"] == "lora"


def test_a_limit_is_that_of_the_modules_in_the_chosen_layers():
    """OPT-350m's projections stand outside its layers, and are narrower."""
    spec = RunSpec(model="opt-350m", method="pissa", rank=600, layers="0-3")
    with pytest.raises(SpecError, match="the smallest adapted matrix has rank 512"):
        count(resolve(spec.but(layers=None)))
    whole, some_layers = answers(spec, point(spec) | {"layers": list(range(24))}, point(spec))
    assert "the smallest adapted matrix has rank 512" in whole["refused"]
    assert some_layers["trained"] == count(resolve(spec)).trainable_parameters and not some_layers["refused"]


def test_a_named_head_is_adapted_too_and_is_not_every_linear_layer():
    spec = SPEC.but(target_modules="q_proj,lm_head")
    at, names = point(spec), architecture.of(SPEC.model).target_names(True)
    assert at["targets"] == ["q_proj", "lm_head"]
    points = [at, at | {"targets": [*names, "lm_head"]}, at | {"targets": names}]
    for at, answer in zip(points, answers(spec, *points), strict=True):
        asked = spec.but(target_modules=",".join(at["targets"]))
        assert answer["trained"] == count(resolve(asked)).trainable_parameters
        assert count(resolve(written(spec, answer["reported"]))).names == count(resolve(asked)).names
    assert answer["targets"] == "all-linear"


def test_another_method_starts_at_its_own_on_the_same_modules_and_layers():
    spec = SPEC.but(rank=16, alpha=64, target_modules="q_proj", layers="0-2", adapter_precision="bf16", dropout=0.1)
    others = shapes.FAMILY[1:]
    before, *after = answers(spec, point(spec), *(point(spec) | {"then": {"method": method}} for method in others))
    assert before["sentence"] == sentence(count(resolve(spec)))
    for method, answer in zip(others, after, strict=True):
        settled = written(spec, answer["reported"])
        assert settled == SPEC.but(method=method, target_modules="q_proj", layers="0-2")
        assert answer["sentence"] == sentence(count(resolve(settled)))


def test_layers_are_reported_in_the_words_they_came_in():
    specs = [SPEC.but(layers=layers) for layers in (None, "all", "first:4", "last:4", "0-3", "0-3,7")]
    cases = [(spec, [point(spec) | {"rank": 3}, point(spec)]) for spec in specs]
    for spec, (same, fewer) in zip(specs, page(cases), strict=True):
        assert same["reported"]["layers"] == spec.layers
        assert written(spec, same["reported"]) == spec.but(rank=3)
        assert fewer["reported"]["rank"] is None


def test_every_module_has_a_name_that_only_it_answers_to_and_another_label():
    for model in (key for key, entry in MODELS.items() if entry.config is not None):
        shape = architecture.of(model)
        modules = shapes.value(RunSpec(model=model, method="lora"))["modules"]
        assert [shape.targets(m["name"], True) for m in modules] == [[m] for m in shape.adaptable(True)]
        assert len({m["label"] for m in modules}) == len(modules)
        if len({m.short_name for m in shape.adaptable(True)}) == len(modules):
            assert [m["name"] for m in modules] == [m["label"] for m in modules] == shape.target_names(True)
    assert [m["label"] for m in shapes.value(RunSpec(model="bert-base", method="lora"))["modules"]][3:6] == [
        "attention.<wbr>output.<wbr>dense", "intermediate.<wbr>dense", "encoder.<wbr>output.<wbr>dense"
    ]  # fmt: skip


def test_the_page_gets_what_it_draws():
    value = shapes.value(RunSpec(model="gpt2", method="houlsby"))
    assert value["at"]["method"] == "lora" and [m["swapped"] for m in value["modules"]] == [True] * 4
    value = shapes.value(SPEC)
    shape = architecture.of(SPEC.model)
    linear = sum(m["parameters"] * len(m["layers"]) for m in value["modules"])
    assert linear + sum(r["parameters"] for r in value["rest"]) == value["total"] == shape.total_parameters
    with pytest.raises(SpecError, match="it has q_proj, k_proj"):
        shapes.value(SPEC.but(target_modules="nosuch"))
    with pytest.raises(SpecError, match="bare count"):
        shapes.value(RunSpec(model="7B"))
