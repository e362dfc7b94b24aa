"""The published benchmark: what its file says, its front, and the chart in both themes."""

import json

import pytest

from peftlab import RunSpec, SpecError, count, resolve
from peftlab.lectures import published
from peftlab.lectures.published import METRICS
from peftlab.methods import METHODS
from peftlab.show import figures, guide

PAIRS = [(x, y) for x in METRICS for y in METRICS if x != y]


def test_the_files_runs_have_names_of_their_own_and_those_that_are_named_are_the_files():
    runs = published.runs()
    assert len(runs) == len({r.experiment for r in runs}) == len({r.label for r in runs}) == 63
    assert all(0 <= r.accuracy <= 1 and r.peak_bytes > 2e10 and r.file_bytes and r.seconds for r in runs)
    plain, full = published.plain(), published.full()
    assert (plain.label, plain.trainable_parameters, plain.peak_bytes) == ("LoRA rank 32", 9_175_040, 22_292_725_760)
    assert (full.kind, full.accuracy) == ("FULL", 0.4715693707354056)
    best = published.best(published.runs())
    assert (best.kind, round(best.accuracy, 4)) == ("LILY", 0.5262)
    assert [run for _, run in published.notable()][:3] == [best, full, plain]
    memory = (
        "Prompt tuning trains 614,400 numbers and peaks at 24.4 GB, more than LoRA rank 32 with 9,175,040 at 22.3 GB."
    )
    assert published.not_memory() == f"Parameters are not memory: {memory}"


@pytest.mark.parametrize(
    ("method", "rest"),
    [("vera", {}), ("ia3", {}), ("ln", {}), ("p-tuning", {}), ("prefix", {"virtual_tokens": 200}), ("dora", {"rank": 32}),
     ("lora", {"rank": 32}), ("full", {})],
)  # fmt: skip
def test_our_counts_are_the_published_ones(method, rest):
    targets = {"target_modules": "query,value"} if "target_modules" in METHODS[method].settings else {}
    ours = count(resolve(RunSpec(model="llama-3.2-3b", method=method, **rest, **targets)))
    assert ours.trainable_parameters in [run.trainable_parameters for run in published.of_method(method)]


def test_runs_are_matched_to_the_registry_by_name_a_new_method_too(monkeypatch):
    found = {r.experiment.split("/")[0]: r.method for r in published.runs()}
    assert found["prompt_tuning"] == "prompt" and found["ln_tuning"] == "ln" and found["ptuning"] == "p-tuning"
    assert found["full-finetuning"] == "full" and found["boft"] is None and found["randlora"] is None
    variants = {r.variant: r.method for r in published.runs() if r.kind == "LORA"}
    assert variants["rank32-dora"] == "dora" and variants["rank64-rslora"] == "rslora" and variants["rank32"] == "lora"
    monkeypatch.setitem(METHODS, "boft", METHODS["oft"])
    assert published.of_method("boft")[0].kind == "BOFT"


@pytest.mark.parametrize(("x", "y"), PAIRS)
def test_nothing_beats_the_front_and_something_beats_the_rest(x, y):
    a, b = METRICS[x], METRICS[y]

    def beats(p, q):
        gains = [(m.of(p) - m.of(q)) * (1 if m.high_is_good else -1) for m in (a, b)]
        return min(gains) >= 0 < max(gains)

    line = published.front(a, b)
    assert line == sorted(line, key=a.of)
    for run in published.runs():
        assert any(beats(other, run) for other in published.runs()) == (run not in line)
    said = published.front_said(a, b)
    assert all(f"{r.label} ({a.told(r)}; {b.told(r)})" in said for r in line)


@pytest.mark.parametrize(("x", "y"), PAIRS)
def test_the_chart_has_a_point_a_run(x, y):
    theme = "light" if x < y else "dark"
    chart = guide.benchmark_chart(x, y, theme)
    front, *marks = chart.data
    points = [point for line in marks for point in zip(line.x, line.y, strict=True)]
    a, b = METRICS[x], METRICS[y]
    assert sorted(points) == sorted((a.of(r) / a.scale, b.of(r) / b.scale) for r in published.runs())
    assert len(front.x) == len(published.front(a, b))
    c = figures.PALETTE[theme]
    colours = {line.name: line.marker.color for line in marks}
    assert colours == {"other": c["overhead"], **dict.fromkeys(guide.MARKS, c["trained"])}
    assert len({line.marker.symbol for line in marks if line.name != "other"}) == len(guide.MARKS)
    for axis, m in ((chart.layout.xaxis, a), (chart.layout.yaxis, b)):
        assert (axis.type == "log") == m.log
    assert ("log scale" in chart.layout.title.text) == (a.log or b.log)
    assert len(chart.layout.annotations) == len(published.notable()) and json.loads(chart.to_json())
    told = [text for line in marks for text in line.customdata if text.startswith("<b>LoRA rank 32</b>")]
    assert all(m.told(published.plain()) in told[0] for m in METRICS.values())


def test_an_unknown_metric_is_refused_in_words():
    with pytest.raises(SpecError, match="metric=speed: no such metric"):
        guide.benchmark_chart("speed", "accuracy", "light")
