"""The LoRA tab's script: what the page counts, says and reports is what the backend would."""

import json
import random
import shutil
import subprocess

import pytest

from demos import lora_visualizer, lora_widget, methods
from peftlab import RunSpec, SpecError, architecture, count, resolve, words
from peftlab.catalog.models import MODELS
from peftlab.spec import parse_layers

DECODERS = [key for key, entry in MODELS.items() if entry.config is not None and entry.is_causal]
NODE = shutil.which("node")
HARNESS = """
const {script, cases} = JSON.parse(require('fs').readFileSync(0));
const nothing = () => {};
const stub = (listeners) => {
  const places = {};
  const one = {
    style: {setProperty: nothing}, classList: {toggle: nothing}, dataset: {}, clientWidth: 600, setAttribute: nothing,
    addEventListener: (name, f) => { listeners[name] = f; }, querySelectorAll: () => [],
    querySelector: (name) => places[name] ??= stub({}),
  };
  return Object.assign(one, {closest: () => one});
};
class ResizeObserver { observe() {} }
const said = cases.map(({value, points}) => {
  const listeners = {}, stage = stub(listeners), props = {value};
  let changed, paused, reported;
  const page = new Function(
    'props', 'element', 'watch', 'trigger', 'document', 'ResizeObserver', 'setTimeout', 'clearTimeout',
    script + '; return () => ({settings, ...count(data, settings), alpha: alphaOf(data, {...settings, alpha: null}),' +
      'targets: targetsText(data, settings.targets), layers: layersText(settings.layers, data.n_layers)});')(
    props, stage, (_, f) => { changed = f; }, (_, told) => { reported = told; }, {}, ResizeObserver,
    (f) => { paused = f; }, nothing);
  return points.map((at) => {
    props.value = {...value, at};
    reported = null;
    changed();
    const refused = stage.querySelector('.main .problem.here').textContent;
    listeners.change({target: {dataset: {knob: 'rank'}}});
    paused();
    return {...page(), refused, reported, sentence: stage.querySelector('.main .sentence').innerHTML};
  });
});
console.log(JSON.stringify(said));
"""
"""The page's own script with stand-ins for what the browser gives it. Each point is settings that the server sends."""
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
    return {
        "method": draw.choice(lora_widget.FAMILY),
        "rank": draw.choice([draw.randint(1, 16), draw.randint(1, 300), min(limits), max(limits), max(limits) + 1]),
        "alpha": draw.choice([None, 16, 0.5]),
        "targets": draw.choice([shape.target_names(), some(draw, shape.target_names())]),
        "layers": draw.choice([list(range(shape.n_layers)), some(draw, range(shape.n_layers))]),
    }


def wanted(spec, at):
    """The spec that settings mean."""
    shape = architecture.of(spec.model)
    every, names = len(at["layers"]) == shape.n_layers, [n for n in shape.target_names() if n in at["targets"]]
    return spec.but(
        method=at["method"],
        rank=None if at["rank"] == resolve(RunSpec(method=at["method"])).rank else at["rank"],
        alpha=at["alpha"] if "alpha" in lora_widget.METHODS[at["method"]].settings else None,
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
            assert answer["saved"] * count.__globals__["BYTES"][report.spec.adapter_precision] == report.adapter_bytes
            said = asked.but(layers=layers, target_modules=answer["targets"])
            assert answer["sentence"] == words.lora_sentence(count(said))
            assert parse_layers(layers, shape.n_layers) == tuple(sorted(at["layers"]))
            assert set(shape.targets(answer["targets"])) == set(shape.targets(asked.target_modules or "all-linear"))
            assert answer["reported"]["model"] == spec.model
            names = lora_visualizer.FIELDS
            edited, _ = methods.edit(spec, names, [answer["reported"]["settings"].get(n) for n in names])
            plain = asked if asked.method == "lora" else asked.but(adapter_precision=None)
            assert edited == plain.but(layers=edited.layers) and count(edited).names == report.names
    assert counted >= 200 and refused >= 10
