import json
import re

import pytest

from peftlab import RunSpec, count, figures, predict, words
from peftlab.bench import recorded_runs
from peftlab.compare import BASE, ComparisonReport, Exchange, Reply, score_of

THEMES = pytest.mark.parametrize("theme", figures.THEMES)
EVENTS = [
    {"type": "start", "spec": {"steps": 4}},
    {"type": "eval", "step": 0, "metrics": {"exact_match": 0.1}},
    {"type": "step", "step": 1, "loss": 4.0},
    {"type": "step", "step": 2, "loss": 1.0},
    {"type": "eval", "step": 4, "metrics": {"exact_match": 0.9}},
]


def drawn(figure):
    """As the browser gets it."""
    return json.loads(figure.to_json())


@THEMES
def test_memory_bars_are_the_reports_to_one_scale(theme):
    spec = RunSpec(model="llama-3.1-8b", rank=16)
    full, chosen = predict(spec.but(method="full"), "12n"), predict(spec, "12n")
    figure = figures.memory_bars(full, chosen, theme)
    assert [bar.name for bar in figure.data] == ["frozen weights", "trained weights", "gradients", "optimizer states"]
    for i, report in enumerate((chosen, full)):
        assert sum(bar.x[i] for bar in figure.data) == pytest.approx(report.states / 1e9)
    assert figure.layout.barmode == "stack" and figure.layout.xaxis.range[0] == 0
    assert [bar.marker.color for bar in figure.data] == [
        figures.PALETTE[theme][k] for k in ("frozen", "trained", "gradients", "optimizer")
    ]
    labels = " ".join(a.text for a in figure.layout.annotations)
    assert words.size(full.states) in labels and words.size(chosen.states) in labels


def test_full_fine_tuning_is_one_bar():
    full = predict(RunSpec(model="llama-3.1-8b", method="full"), "12n")
    assert len(figures.memory_bars(full, full, "light").data[0].y) == 1


def test_a_bar_that_is_not_known_is_not_drawn_as_a_sum():
    report = predict(RunSpec(model="llama-3.1-8b", optimizer="adafactor"))
    assert drawn(figures.memory_bars(report, report, "light"))


@THEMES
def test_the_rank_curve_has_the_matrix_and_the_break_even(theme):
    module = next(m for m in count(RunSpec(model="llama-2-7b")).modules if m.name.endswith("down_proj"))
    figure = figures.rank_curve(module, 64, theme)
    line, point = figure.data
    assert (point.x[0], point.y[0]) == (64, 64 * (module.d_in + module.d_out))
    assert line.y[1] / line.x[1] == pytest.approx(module.d_in + module.d_out)
    even = module.d_in * module.d_out / (module.d_in + module.d_out)
    texts = [a.text for a in figure.layout.annotations]
    assert any(f"{module.d_in * module.d_out:,}" in t for t in texts) and any(f"{even:.0f}" in t for t in texts)


@THEMES
def test_curves_have_a_point_an_event(theme):
    loss, metric = figures.loss_curve(EVENTS, 4, theme), figures.metric_curve(EVENTS, 4, "Exact records", theme)
    assert (list(loss.data[0].x), list(loss.data[0].y)) == ([1, 2], [4.0, 1.0])
    assert (list(metric.data[0].x), list(metric.data[0].y)) == ([0, 4], [10, 90])
    assert loss.layout.yaxis.range[0] == 0 and metric.layout.yaxis.range[0] == 0
    assert loss.layout.uirevision and metric.layout.uirevision


def test_curves_without_events_are_empty_not_wrong():
    assert drawn(figures.loss_curve([], 4, "light"))["data"][0]["x"] == []
    assert drawn(figures.metric_curve([], 4, "Score", "dark"))["data"][0]["x"] == []


@THEMES
def test_score_bars_have_their_intervals(theme):
    exchanges = tuple(Exchange("p", "r", (Reply(BASE, "", 0, 0.0),)) for _ in range(10))
    report = ComparisonReport(
        "t", "m", exchanges, (score_of(BASE, [0.0] * 10), score_of("<mine>", [1.0] * 5 + [0.0] * 5))
    )
    (bars,) = figures.score_bars(report, "Exact", theme).data
    assert list(bars.x) == [50, 0] and list(bars.y) == ["&lt;mine&gt;", "base model"]
    assert bars.error_x.array[0] == pytest.approx(26.34, abs=0.01) and bars.error_x.arrayminus[1] == 0


def test_every_figure_comes_in_both_templates():
    pictures = figures.themed(figures.loss_curve, EVENTS, 4)
    assert set(pictures) == {"light", "dark"}
    for theme, picture in pictures.items():
        colours = picture["layout"]["template"]["layout"]
        assert colours["font"]["color"] == figures.PALETTE[theme]["text"]


def test_matrices_are_to_scale_and_in_words():
    module = next(m for m in count(RunSpec(model="gemma-3-270m")).modules if m.name.endswith("q_proj"))
    page = figures.matrices(module, 16)
    boxes = [tuple(map(float, b)) for b in re.findall(r"--h:([\d.]+);--w:([\d.]+)", page)]
    d_in, d_out = module.d_in, module.d_out
    unit = max(d_in, d_out)
    want = [(d_out, d_in), (d_out, 16), (16, d_in)]
    assert boxes == [(pytest.approx(h / unit, abs=1e-5), pytest.approx(w / unit, abs=1e-5)) for h, w in want]
    assert f"B is {d_out} by 16 and A is 16 by {d_in}" in page and f"{16 * (d_in + d_out):,} numbers" in page


def test_recorded_runs_say_where_they_come_from_and_can_be_drawn():
    assert recorded_runs()
    for run in recorded_runs():
        assert (
            run["hardware"]
            and run["date"]
            and run["command"]
            and {"torch", "transformers", "peft"} <= set(run["versions"])
        )
        assert run["events"][-1]["type"] == "done"
        assert drawn(figures.loss_curve(run["events"], run["spec"]["steps"], "light"))["data"][0]["x"]
