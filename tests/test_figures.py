import json

import plotly.graph_objects as go
import pytest

from peftlab import RunSpec, SpecError, count, predict, resolve, units
from peftlab.base.models import MODELS
from peftlab.compare import BASE, ComparisonReport, Exchange, Reply, score_of
from peftlab.count import why_not
from peftlab.measured import runs as recorded_runs
from peftlab.show import figures
from peftlab.show.comparisons import score_bars
from peftlab.show.lora import percent_by_size
from peftlab.show.memory_figures import COMPONENTS, memory_timeline
from peftlab.show.runs import loss_curve, metric_curve

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


def timeline(report, theme):
    figure = go.Figure(memory_timeline(report, theme))  # plotly refuses what is no chart
    return figure, {line.name: list(line.y) for line in figure.data}


@THEMES
def test_the_timeline_is_the_reports_moments(theme):
    report = predict(resolve(RunSpec(model="llama-3.1-8b", rank=16, precision="bf16")))
    figure, lines = timeline(report, theme)
    names = {kind: name for kind, _, name in COMPONENTS}
    colours = {name: figures.PALETTE[theme][colour] for _, colour, name in COMPONENTS}
    kinds = {kind for moment in report.moments for kind, n in moment.bytes.items() if n}
    assert set(lines) == {names[kind] for kind in kinds} and "communication" not in kinds
    moments = [*report.moments, report.moments[-1]]  # the optimizer's is drawn twice, to be seen
    for kind in kinds:
        assert lines[names[kind]] == [moment.bytes[kind] / 1e9 for moment in moments]
    assert all(line.stackgroup == "memory" and line.fillcolor == colours[line.name] for line in figure.data)
    assert [sum(column) for column in zip(*lines.values(), strict=True)] == pytest.approx(
        [moment.total / 1e9 for moment in moments]
    )
    assert figure.layout.yaxis.range[0] == 0 and figure.layout.yaxis.range[1] > report.allocated / 1e9
    assert drawn(figure)


@THEMES
def test_the_timelines_peak_is_marked(theme):
    report = predict(resolve(RunSpec(model="gemma-3-270m", batch_size=4, sequence_length=512)))
    figure, _ = timeline(report, theme)
    (mark,) = figure.layout.annotations
    assert (mark.x, mark.y) == (report.moments.index(report.peak), report.allocated / 1e9)
    assert units.size(report.allocated) in mark.text and report.peak.phase in mark.text
    assert list(figure.layout.xaxis.ticktext) == ["forward", "backward", "optimizer"]


def test_the_timeline_of_a_trace_names_its_layers(tiny_model):
    from peftlab.memory import exact

    report = exact(resolve(RunSpec(model=str(tiny_model), method="full", batch_size=2, sequence_length=32)))
    figure, _ = timeline(report, "light")
    places = list(figure.data[0].text)
    assert places[:2] == ["forward, embedding", "forward, layer 1"] and places[-1] == "optimizer"
    assert {"backward, layer 3", "forward, head and loss", "backward, embedding"} <= set(places)
    assert len(places) == len(report.moments) + 1


def test_the_timeline_has_the_buffers_between_gpus():
    report = predict(resolve(RunSpec(model="llama-3.1-8b", method="full", n_gpus=8, sharding="fsdp")))
    assert "buffers between GPUs" in timeline(report, "light")[1]


def scatter(figure):
    """(parameters, percent) of every model drawn, the marked one last."""
    points = [line for line in figure.data if line.mode == "markers+text"]
    return [point for line in points for point in zip(line.x, line.y, strict=True)], points


def counted(model, rank, targets):
    report = count(resolve(RunSpec(model=model, rank=rank, target_modules=targets)))
    return report.total_parameters, report.trainable_percent


@THEMES
def test_percents_by_size_are_counts(theme):
    figure = percent_by_size(16, "all-linear", "gemma-3-270m", theme)
    points, (others, mine) = scatter(figure)
    shapes = [key for key, entry in MODELS.items() if not entry.shape_of and not why_not("lora", key)]
    assert sorted(points) == sorted(counted(key, 16, "all-linear") for key in shapes)
    assert points[-1] == counted("gemma-3-270m", 16, "all-linear")
    assert (mine.marker.color, others.marker.color) == tuple(figures.PALETTE[theme][k] for k in ("trained", "frozen"))
    assert mine.customdata[0] == (
        "<b>Gemma 3 270M</b><br>16 × 237,312 inputs and outputs<br>= 3,796,992 trained,<br>1.42% of 268,098,176"
    )
    assert "log scales" in figure.layout.title.text and figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert list(figure.layout.xaxis.ticktext) == ["100M", "1B", "10B", "100B"] and drawn(figure)


def test_percents_by_size_follow_roles_into_other_families():
    points, _ = scatter(percent_by_size(8, "q_proj,v_proj", "llama-2-7b", "light"))
    for model in ("gpt2", "bert-base", "t5-base", "phi-3-mini", "gemma-3-270m"):
        assert counted(model, 8, "query,value") in points


def test_a_copy_of_a_shape_is_drawn_once():
    points, (_, mine) = scatter(percent_by_size(8, "all-linear", "smollm2-135m-instruct", "light"))
    assert len(points) == len(set(points)) and "SmolLM2 135M Instruct" in mine.customdata[0]


@pytest.mark.parametrize(("rank", "percent"), [(8, 0.06), (16, 0.12), (64, 0.48)])
def test_the_lectures_percent_is_a_line_at_its_own_ranks_and_modules(rank, percent):
    def lines(rank, targets):
        figure = percent_by_size(rank, targets, "llama-2-70b", "light")
        return [list(line.y) for line in figure.data if line.line.dash == "dot"]

    assert lines(rank, "q_proj,v_proj") == lines(rank, "v_proj,q_proj") == [[percent] * 2]
    assert not lines(rank, "all-linear") and not lines(rank + 1, "q_proj,v_proj")


def test_models_too_narrow_for_the_rank_and_a_bare_count_are_not_drawn():
    assert scatter(percent_by_size(256, "all-linear", "llama-2-7b", "light"))[0]
    with pytest.raises(SpecError, match="bare count"):
        percent_by_size(8, "all-linear", "7B", "light")


@THEMES
def test_curves_have_a_point_an_event(theme):
    loss, metric = loss_curve(EVENTS, 4, theme), metric_curve(EVENTS, 4, "Exact records", theme)
    assert (list(loss.data[0].x), list(loss.data[0].y)) == ([1, 2], [4.0, 1.0])
    assert (list(metric.data[0].x), list(metric.data[0].y)) == ([0, 4], [10, 90])
    assert loss.layout.yaxis.range[0] == 0 and metric.layout.yaxis.range[0] == 0
    assert loss.layout.uirevision and metric.layout.uirevision


def test_curves_without_events_are_empty_not_wrong():
    assert drawn(loss_curve([], 4, "light"))["data"][0]["x"] == []
    assert drawn(metric_curve([], 4, "Score", "dark"))["data"][0]["x"] == []


@THEMES
def test_score_bars_have_their_intervals(theme):
    exchanges = tuple(Exchange("p", "r", (Reply(BASE, "", 0, 0.0),)) for _ in range(10))
    report = ComparisonReport(
        "t", "m", exchanges, (score_of(BASE, [0.0] * 10), score_of("<mine>", [1.0] * 5 + [0.0] * 5))
    )
    (bars,) = score_bars(report, "Exact", theme).data
    assert list(bars.x) == [50, 0] and list(bars.y) == ["&lt;mine&gt;", "base model"]
    assert bars.error_x.array[0] == pytest.approx(26.34, abs=0.01) and bars.error_x.arrayminus[1] == 0


def test_every_figure_comes_in_both_templates():
    pictures = figures.themed(loss_curve, EVENTS, 4)
    assert set(pictures) == {"light", "dark"}
    for theme, picture in pictures.items():
        colours = picture["layout"]["template"]["layout"]
        assert colours["font"]["color"] == figures.PALETTE[theme]["text"]


def test_recorded_runs_say_where_they_come_from_and_can_be_drawn():
    assert recorded_runs()
    for run in recorded_runs():
        assert all(run[key] for key in ("hardware", "date", "command"))
        assert {"torch", "transformers", "peft"} <= set(run["versions"])
        assert run["events"][-1]["type"] == "done"
        assert drawn(loss_curve(run["events"], run["spec"]["steps"], "light"))["data"][0]["x"]
