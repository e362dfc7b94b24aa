"""The charts show their results' own numbers, in the palette's colours."""

import base64
import io

import plotly.graph_objects as go
import pytest
import torch
from PIL import Image
from tiny import rand

from peftlab import RunSpec, SpecError, count, predict, resolve, units
from peftlab.base.models import MODELS
from peftlab.compare import BASE, ComparisonReport, Exchange, Reply, lowrank, score_of
from peftlab.compare.lowrank import Spectrum
from peftlab.compare.study import MatrixStudy, Study
from peftlab.count import why_not
from peftlab.measured import runs as recorded_runs
from peftlab.memory import exact
from peftlab.show import figures, studies
from peftlab.show.comparisons import score_bars
from peftlab.show.lora import percent_by_size
from peftlab.show.memory_figures import COMPONENTS, memory_timeline
from peftlab.show.run_charts import loss_curve, metric_curve, small_line, smoothed, weight

EVENTS = [
    {"type": "eval", "step": 0, "metrics": {"exact_match": 0.1}},
    {"type": "step", "step": 1, "loss": 4.0},
    {"type": "step", "step": 2, "loss": 1.0},
    {"type": "eval", "step": 4, "metrics": {"exact_match": 0.9}},
]


@pytest.mark.parametrize(
    ("theme", "spec"),
    [("light", RunSpec(model="llama-3.1-8b", rank=16, precision="bf16")),
     ("dark", RunSpec(model="llama-3.1-8b", method="full", n_gpus=8, sharding="fsdp"))],
)  # fmt: skip
def test_the_timeline_is_the_reports_moments_with_the_peak_marked(theme, spec):
    report = predict(resolve(spec))
    figure = go.Figure(memory_timeline(report, theme))  # plotly refuses what is no chart
    named = {name: (kind, figures.PALETTE[theme][colour]) for kind, colour, name in COMPONENTS}
    kinds = {kind for moment in report.moments for kind, n in moment.bytes.items() if n}
    assert {named[line.name][0] for line in figure.data} == kinds and ("communication" in kinds) == (spec.n_gpus == 8)
    moments = [*report.moments, report.moments[-1]]  # the optimizer's is drawn twice, to be seen
    for line in figure.data:
        kind, colour = named[line.name]
        assert list(line.y) == [moment.bytes.get(kind, 0) / 1e9 for moment in moments]
        assert line.stackgroup == "memory" and line.fillcolor == colour
    assert figure.layout.yaxis.range[0] == 0 and figure.layout.yaxis.range[1] > report.allocated / 1e9
    (mark,) = figure.layout.annotations
    assert (mark.x, mark.y) == (report.moments.index(report.peak), report.allocated / 1e9)
    assert units.size(report.allocated) in mark.text and report.peak.phase in mark.text
    assert list(figure.layout.xaxis.ticktext) == ["forward", "backward", "optimizer"]


def test_the_timeline_of_a_trace_names_its_layers(tiny_model):
    report = exact(resolve(RunSpec(model=str(tiny_model), method="full", batch_size=2, sequence_length=32)))
    places = list(go.Figure(memory_timeline(report, "light")).data[0].text)
    assert places[:2] == ["forward, embedding", "forward, layer 1"] and places[-1] == "optimizer"
    assert {"backward, layer 3", "forward, head and loss", "backward, embedding"} <= set(places)
    assert len(places) == len(report.moments) + 1


def by_size(rank, targets, model, theme="light"):
    """(parameters, percent) of every model drawn, the marked one last; and the chart with its two lines of points."""
    figure = percent_by_size(rank, targets, model, theme)
    lines = [line for line in figure.data if line.mode == "markers+text"]
    return [point for line in lines for point in zip(line.x, line.y, strict=True)], figure, lines


def counted(model, rank, targets):
    report = count(resolve(RunSpec(model=model, rank=rank, target_modules=targets)))
    return report.total_parameters, report.trainable_percent


def test_percents_by_size_are_counts():
    points, figure, (others, mine) = by_size(16, "all-linear", "gemma-3-270m", "dark")
    shapes = [key for key, entry in MODELS.items() if not entry.shape_of and not why_not("lora", key)]
    assert sorted(points) == sorted(counted(key, 16, "all-linear") for key in shapes)
    assert points[-1] == counted("gemma-3-270m", 16, "all-linear")
    assert (mine.marker.color, others.marker.color) == tuple(figures.PALETTE["dark"][k] for k in ("trained", "frozen"))
    assert mine.customdata[0] == (
        "<b>Gemma 3 270M</b><br>16 × 237,312 inputs and outputs<br>= 3,796,992 trained,<br>1.42% of 268,098,176"
    )
    assert "log scales" in figure.layout.title.text and figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert list(figure.layout.xaxis.ticktext) == ["100M", "1B", "10B", "100B"]


def test_percents_by_size_follow_roles_into_other_families_and_draw_a_shape_once():
    points, _, _ = by_size(8, "q_proj,v_proj", "llama-2-7b")
    for model in ("gpt2", "bert-base", "t5-base", "phi-3-mini", "gemma-3-270m"):
        assert counted(model, 8, "query,value") in points
    points, _, (_, mine) = by_size(8, "all-linear", "smollm2-135m-instruct")  # a copy of another's shapes
    assert len(points) == len(set(points)) and "SmolLM2 135M Instruct" in mine.customdata[0]
    assert by_size(256, "all-linear", "llama-2-7b")[0]  # too large a rank for some
    with pytest.raises(SpecError, match="bare count"):
        percent_by_size(8, "all-linear", "7B", "light")


def test_the_lectures_percent_is_a_line_at_its_own_ranks_and_modules():
    def lines(rank, targets):
        _, figure, _ = by_size(rank, targets, "llama-2-70b")
        return [list(line.y) for line in figure.data if line.line.dash == "dot"]

    for rank, percent in ((8, 0.06), (16, 0.12), (64, 0.48)):
        assert lines(rank, "q_proj,v_proj") == [[percent] * 2]
    assert lines(8, "v_proj,q_proj") and not lines(8, "all-linear") and not lines(9, "q_proj,v_proj")


def test_curves_have_a_point_an_event_and_are_empty_without_any():
    loss, metric = loss_curve(EVENTS, 4, "light"), metric_curve(EVENTS, 4, "Exact records", "dark")
    assert (list(loss.data[0].x), list(loss.data[0].y)) == ([1, 2], [4.0, 1.0])
    assert list(loss.data[1].y) == smoothed([4.0, 1.0], 4) and loss.data[1].line.width > loss.data[0].line.width
    assert f"<b>{loss.data[1].y[-1]:.2f}</b>" in loss.layout.annotations[0].text
    assert (list(metric.data[0].x), list(metric.data[0].y)) == ([0, 4], [10, 90])
    assert loss.layout.yaxis.range[0] == 0 and metric.layout.yaxis.range[0] == 0
    assert loss.layout.uirevision and metric.layout.uirevision
    assert loss_curve([], 4, "light").data[0].x == metric_curve([], 4, "Score", "dark").data[0].x == ()


def test_a_score_of_fewer_items_says_so():
    scored = [EVENTS[0] | {"items": n} for n in (40, 10, 40)]
    metric = metric_curve(scored, 4, "Score", "light")
    assert [" of 10" in text for text in metric.data[0].text] == [False, True, False]


def test_the_smoothed_loss_is_a_moving_average_without_the_bias_of_its_start():
    losses, new = [4.0, 1.0, 3.0, 2.0], weight(40)
    assert new == weight(4) == 0.25 and weight(400) == 1 / 40
    for n in range(1, 5):  # each weighs (1 - new) as much as the one after it, and the weights add up to 1
        weights = [(1 - new) ** (n - 1 - i) for i in range(n)]
        wanted = sum(w * loss for w, loss in zip(weights, losses, strict=False)) / sum(weights)
        assert smoothed(losses, 40)[n - 1] == pytest.approx(wanted)
    assert smoothed([2.5] * 9, 400) == pytest.approx([2.5] * 9) and smoothed([], 40) == []
    longer = smoothed([*losses, 9.0], 40)
    assert longer[:4] == smoothed(losses, 40)  # a point that is drawn does not move


def test_a_small_line_spans_the_whole_run_and_has_few_points():
    assert 'points="50.0,1.0 100.0,10.0"' in small_line([2.0, 1.0], 2, "trained")
    assert 'points="1.0,1.0"' in small_line([5.0], 100, "trained") and 'points=""' in small_line([], 0, "trained")
    assert small_line([1.0] * 5000, 5000, "trained").count(",") < 130
    assert small_line([1.0] * 4999, 5000, "trained").count("100.0,1.0") == 1  # up to the newest


def test_score_bars_have_their_intervals():
    exchanges = tuple(Exchange("p", "r", (Reply(BASE, "", 0, 0.0),)) for _ in range(10))
    scores = score_of(BASE, [0.0] * 10), score_of("<mine>", [1.0] * 5 + [0.0] * 5)
    (bars,) = score_bars(ComparisonReport("t", "m", exchanges, scores), "Exact", "light").data
    assert list(bars.x) == [50, 0] and list(bars.y) == ["&lt;mine&gt;", "base model"]
    assert bars.error_x.array[0] == pytest.approx(26.34, abs=0.01) and bars.error_x.arrayminus[1] == 0


def test_recorded_runs_say_where_they_come_from_and_are_drawn_in_both_themes():
    assert recorded_runs()
    for run in recorded_runs():
        assert all(run[key] for key in ("hardware", "date", "command"))
        assert {"torch", "transformers", "peft"} <= set(run["versions"]) and run["events"][-1]["type"] == "done"
        drawn = figures.themed(loss_curve, run["events"], run["spec"]["steps"])
        for theme in figures.THEMES:
            assert drawn[theme]["data"][0]["x"]
            colour = drawn[theme]["layout"]["template"]["layout"]["font"]["color"]
            assert colour == figures.PALETTE[theme]["text"]


def studied(layer):
    w, d = rand(8, 6), 0.1 * (layer + 1) * torch.outer(rand(8, 1)[:, 0], rand(6, 1)[:, 0])
    return MatrixStudy(
        name=f"layers.{layer}.q", short_name="q", role="query", layer=layer, shape=(8, 6), weight=lowrank.spectrum(w),
        delta=lowrank.spectrum(d), amplification=lowrank.amplification(w, d, 1), intruders=lowrank.intruders(w, w + d),
    )  # fmt: skip


def test_energy_and_singular_values_are_those_of_the_spectra():
    w, deltas = Spectrum(tuple(float(40 - i) for i in range(40))), {"rank 2": Spectrum((3.0, 1.0))}
    kept, values = studies.energy(w, deltas, "light"), studies.singular_values(w, deltas, "light")
    for chart in (kept, values):
        weight, delta = chart.data
        assert weight.line.color == figures.PALETTE["light"]["frozen"] and delta.name == "rank 2"
        assert weight.x[0] == 1 and weight.x[-1] == 40 and tuple(delta.x) == (1, 2)
    assert tuple(kept.data[1].y) == pytest.approx((90, 100))
    assert list(kept.data[0].y) == [100 * w.energy(r) for r in kept.data[0].x]
    assert tuple(values.data[1].y) == pytest.approx((1, 1 / 3))


def test_sizes_are_of_the_asked_kind_by_layer():
    of = Study("a", "m", "lora", tuple(map(studied, range(3))))
    (line,) = studies.sizes({"mine": of}, "query", "light").data
    assert tuple(line.x) == (0, 1, 2)
    assert tuple(line.y) == pytest.approx(tuple(100 * m.relative_size for m in of.matrices))
    assert studies.sizes({"mine": of}, "value", "light").data[0].x == ()


def test_shared_shows_phi_beside_what_chance_gives():
    overlap = lowrank.overlap(*(lowrank.directions(rand(8, 6), 3) for _ in range(2)))
    (heat,) = studies.shared(overlap, "a", "b", "dark").data
    assert tuple(map(tuple, heat.z)) == overlap.grid
    assert heat.customdata[0][2] == overlap.random(1, 3) == 3 / 6


def test_a_picture_has_a_pixel_a_number():
    uri = studies.picture(torch.tensor([[0.0, -1.0, 0.5], [2.0, 0.1, 0.0]]), 1.0, "#0072B2")
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert image.size == (3, 2) and image.getpixel((1, 0)) == (0, 0x72, 0xB2, 255)
    assert [image.getpixel((x, y))[3] for y in range(2) for x in range(3)] == [0, 255, 127, 255, 25, 0]


def test_words_in_a_runs_charts_do_not_lie_on_each_other():
    """A run that was stopped soon after its middle has two scores side by side; words stand where the curve is not yet."""

    def sides(*at):
        told = [{"type": "eval", "step": step, "metrics": {"exact_match": 0.8}} for step in at]
        return list(go.Figure(metric_curve(told, 24, "Accuracy", "light")).data[0].textposition)

    assert sides(0, 12, 24) == ["top center"] * 3 and sides(0, 12, 15) == ["top center", "top left", "top right"]
    assert sides(0, 2) == ["top left", "top right"] and sides(0) == ["top center"]

    def anchor(steps):
        told = [{"type": "step", "step": n + 1, "loss": 2.0} for n in range(steps)]
        (words,) = go.Figure(loss_curve(told, 24, "light")).layout.annotations
        return words.xanchor

    assert anchor(3) == anchor(15) == "left" and anchor(16) == anchor(24) == "right"
