"""The LoRA tab's script: what the page counts, says and reports is what the backend would."""

import json
import random
import shutil
import subprocess

import pytest

pytest.importorskip("gradio")

from demos import lora_widget
from peftlab import RunSpec, SpecError, architecture, count, resolve, words
from peftlab.catalog.models import MODELS
from peftlab.count import BYTES
from peftlab.methods import METHODS
from peftlab.spec import parse_layers

DECODERS = [key for key, entry in MODELS.items() if entry.config is not None and entry.is_causal]
NODE = shutil.which("node")
HARNESS = """
const {script, cases} = JSON.parse(require('fs').readFileSync(0));
const nothing = () => {};
const stub = (listeners) => {
  const near = {}, found = (name) => near[name] ??= stub({});
  return {
    style: {getPropertyValue: nothing, setProperty: nothing}, classList: {toggle: nothing}, clientWidth: 600,
    childNodes: Array.from({length: 99}, () => ({data: ''})),
    getAttribute: nothing, setAttribute: nothing, addEventListener: (name, f) => { listeners[name] = f; },
    closest() { return this; }, querySelector: found, querySelectorAll: () => [],
    get firstChild() { return found('first'); }, get lastChild() { return found('last'); },
    get previousSibling() { return found('previous'); },
  };
};
class ResizeObserver { observe() {} }
const said = cases.map(({value, points}) => {
  const listeners = {}, stage = stub(listeners), props = {value};
  let changed, paused, reported;
  const page = new Function(
    'props', 'element', 'watch', 'trigger', 'document', 'ResizeObserver', 'setTimeout', 'clearTimeout', 'requestAnimationFrame',
    script + '; return () => ({settings, ...count(data, settings), alpha: alphaOf(data, {...settings, alpha: null}),' +
      'targets: targetsText(data, settings.targets), layers: layersText(settings.layers, data.n_layers)});')(
    props, stage, (_, f) => { changed = f; }, (_, told) => { reported = told; }, {addEventListener: nothing}, ResizeObserver,
    (f) => { paused = f; return 1; }, nothing, (f) => { f(); });
  return points.map((at) => {
    props.value = {...value, at};
    reported = null;
    changed();
    if (at.then) listeners.input({target: {dataset: {knob: 'method'}, value: at.then}});
    const refused = stage.querySelector('.main .problem.here').written;
    listeners.change({target: {dataset: {knob: 'rank'}}});
    paused();
    return {...page(), refused, reported, sentence: stage.querySelector('.main .sentence').written};
  });
});
console.log(JSON.stringify(said));
"""
"""The page's own script with stand-ins for what the browser gives it. Each point is settings that the server sends,
and perhaps a method that the reader chooses `then`."""
SPEC = RunSpec(model="smollm2-135m", method="lora")
HERE = lora_widget.value(SPEC)["at"]
needs_node = pytest.mark.skipif(not NODE, reason="no node")


def page(cases):
    """The page's answers, a list for each (spec, points)."""
    cases = [{"value": lora_widget.value(spec), "points": points} for spec, points in cases]
    sent = json.dumps({"script": lora_widget.SCRIPT, "cases": cases})
    done = subprocess.run([NODE, "-e", HARNESS], input=sent, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def point(spec):
    """A spec's settings as the page has them; the modules in any order."""
    return lora_widget.value(spec)["at"]


def some(draw, members):
    return draw.sample(members, draw.randint(1, len(members)))


def drawn(draw, model):
    """Settings of any method of the family, with a rank that may be too large."""
    shape = architecture.of(model)
    limits = [min(m.d_in, m.d_out) for m in shape.linear()]
    layers = draw.choice([list(range(shape.n_layers)), some(draw, range(shape.n_layers))])
    return {
        "method": draw.choice(lora_widget.FAMILY),
        "rank": draw.choice([draw.randint(1, 16), draw.randint(1, 300), min(limits), max(limits), max(limits) + 1]),
        "alpha": draw.choice([None, 16, 0.5]),
        "targets": draw.choice([shape.target_names(), some(draw, shape.target_names())]),
        "layers": layers,
        "layers_said": None if len(layers) == shape.n_layers else ",".join(map(str, layers)),
    }


def wanted(spec, at):
    """The spec that settings mean."""
    shape = architecture.of(spec.model)
    every, names = len(at["layers"]) == shape.n_layers, [n for n in shape.target_names() if n in at["targets"]]
    return spec.but(
        method=at["method"],
        rank=None if at["rank"] == resolve(RunSpec(method=at["method"])).rank else at["rank"],
        alpha=at["alpha"] if "alpha" in METHODS[at["method"]].settings else None,
        target_modules=None if set(names) == set(shape.target_names()) else ",".join(names),
        layers=None if every else ",".join(map(str, sorted(at["layers"]))),
    )


@needs_node
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
                report = count(asked)
            except SpecError as error:
                refused += 1
                assert answer["refused"] and answer["reported"] is None, asked
                if str(error).startswith("rank="):
                    assert answer["refused"] == str(error)
                continue
            counted += 1
            shape, layers = architecture.of(spec.model), answer["layers"] or "all"
            assert not answer["refused"], asked
            assert answer["trained"] == report.trainable_parameters
            assert answer["saved"] * BYTES[report.spec.adapter_precision] == report.adapter_bytes
            said = asked.but(target_modules=answer["targets"])
            assert answer["sentence"] == words.lora_sentence(count(said))
            assert parse_layers(layers, shape.n_layers) == tuple(sorted(at["layers"]))
            assert shape.targets(answer["targets"]) == shape.targets(asked.target_modules or "all-linear")
            assert answer["reported"]["model"] == spec.model
            settled = lora_widget.settled(spec, answer["reported"]["settings"])
            own = asked if asked.method == "lora" else asked.but(adapter_precision=None)  # a new method has its own
            assert settled == own.but(layers=settled.layers) and count(settled).names == report.names
    assert counted >= 200 and refused >= 10


@needs_node
def test_automatic_alpha_is_each_methods_own():
    ranks = (1, 2, 3, 8, 64)
    points = [HERE | {"method": method, "rank": rank} for method in lora_widget.FAMILY for rank in ranks]
    for at, answer in zip(points, page([(SPEC, points)])[0], strict=True):
        assert answer["alpha"] == resolve(SPEC.but(method=at["method"], rank=at["rank"])).alpha


@needs_node
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"targets": []}, "no target module is ticked: nothing would be trained; tick at least one"),
        ({"layers": []}, "no layer is chosen: nothing would be trained; choose at least one"),
        ({"rank": 0}, "rank=0: a rank is a whole number from 1 to 65,536; try 8"),
        ({"rank": 2.5}, "rank=2.5: a rank is a whole number"),
        (
            {"rank": 100_000},
            "rank=100000: no adapted matrix has a rank above 576, so a larger update is wasted; try 8, or 576",
        ),
        ({"rank": 100_000, "method": "vera"}, "rank=100000: a rank is a whole number from 1 to 65,536"),
        ({"alpha": 0}, "alpha=0: ΔW is multiplied by alpha"),
        ({"alpha": -1}, "it must be above 0 and at most 1,000,000; try 16"),
        ({"alpha": 1e7}, "at most 1,000,000"),
    ],
)
def test_what_cannot_be_is_refused_in_words_and_not_reported(changes, says):
    answer, cured = page([(SPEC, [HERE | changes, HERE])])[0]
    assert says in answer["refused"] and answer["reported"] is None
    assert cured["refused"] == "" and cured["reported"]


@needs_node
def test_a_limit_is_that_of_the_modules_in_the_chosen_layers():
    """OPT-350m's projections stand outside its layers, and are narrower."""
    spec = RunSpec(model="opt-350m", method="pissa", rank=600, layers="0-3")
    with pytest.raises(SpecError, match="the smallest adapted matrix has rank 512"):
        count(spec.but(layers=None))
    whole, some_layers = page([(spec, [point(spec) | {"layers": list(range(24))}, point(spec)])])[0]
    assert "the smallest adapted matrix has rank 512" in whole["refused"]
    assert some_layers["trained"] == count(spec).trainable_parameters and not some_layers["refused"]


@needs_node
def test_a_named_head_is_adapted_too_and_is_not_every_linear_layer():
    spec = SPEC.but(target_modules="q_proj,lm_head")
    at, names = point(spec), architecture.of(SPEC.model).target_names()
    assert at["targets"] == ["q_proj", "lm_head"]
    points = [at, at | {"targets": [*names, "lm_head"]}, at | {"targets": names}]
    for at, answer in zip(points, page([(spec, points)])[0], strict=True):
        asked = spec.but(target_modules=",".join(at["targets"]))
        assert answer["trained"] == count(asked).trainable_parameters
        assert count(lora_widget.settled(spec, answer["reported"]["settings"])).names == count(asked).names
    assert answer["targets"] == "all-linear"


@needs_node
def test_another_method_starts_at_its_own_on_the_same_modules_and_layers():
    spec = SPEC.but(rank=16, alpha=64, target_modules="q_proj", layers="0-2", adapter_precision="bf16", dropout=0.1)
    others = lora_widget.FAMILY[1:]
    before, *after = page([(spec, [point(spec), *(point(spec) | {"then": method} for method in others)])])[0]
    assert before["sentence"] == words.lora_sentence(count(spec))
    for method, answer in zip(others, after, strict=True):
        settled = lora_widget.settled(spec, answer["reported"]["settings"])
        assert settled == SPEC.but(method=method, target_modules="q_proj", layers="0-2")
        assert answer["sentence"] == words.lora_sentence(count(settled))


@needs_node
@pytest.mark.parametrize("layers", [None, "all", "first:4", "last:4", "0-3", "0-3,7"])
def test_layers_are_reported_in_the_words_they_came_in(layers):
    spec = SPEC.but(layers=layers)
    at = point(spec)
    same, fewer = page([(spec, [at | {"rank": 3}, at])])[0]
    assert same["reported"]["settings"]["layers"] == layers
    assert lora_widget.settled(spec, same["reported"]["settings"]) == spec.but(rank=3)
    assert fewer["reported"]["settings"]["rank"] is None


def test_every_module_has_a_name_that_only_it_answers_to_and_another_label():
    for model in (key for key, entry in MODELS.items() if entry.config is not None):
        shape = architecture.of(model)
        modules = lora_widget.value(RunSpec(model=model, method="lora"))["modules"]
        assert [shape.targets(m["name"]) for m in modules] == [[m] for m in shape.linear()]
        assert len({m["label"] for m in modules}) == len(modules)
        if len({m.short_name for m in shape.linear()}) == len(modules):
            assert [m["name"] for m in modules] == [m["label"] for m in modules] == shape.target_names()
    assert [m["label"] for m in lora_widget.value(RunSpec(model="bert-base", method="lora"))["modules"]][3:6] == [
        "attention.<wbr>output.<wbr>dense", "intermediate.<wbr>dense", "encoder.<wbr>output.<wbr>dense"
    ]  # fmt: skip


def test_the_page_gets_what_it_draws():
    value = lora_widget.value(RunSpec(model="gpt2", method="houlsby"))
    assert value["at"]["method"] == "lora" and [m["swapped"] for m in value["modules"]] == [True] * 4
    value = lora_widget.value(SPEC)
    shape = architecture.of(SPEC.model)
    every = sum(m["parameters"] * len(m["layers"]) for m in value["modules"]) + sum(
        r["parameters"] for r in value["rest"]
    )
    assert every == value["total"] == shape.total_parameters
    with pytest.raises(SpecError, match="it has q_proj, k_proj"):
        lora_widget.value(SPEC.but(target_modules="nosuch"))
    with pytest.raises(SpecError, match="bare count"):
        lora_widget.value(RunSpec(model="7B"))
