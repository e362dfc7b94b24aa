"""The README tells the truth: its commands, its tree and its numbers."""

import json
import re
import statistics
from pathlib import Path

import pytest
import yaml

from peftlab import units
from peftlab.bench.chart import chart, table
from peftlab.bench.training import YARDSTICK
from peftlab.data.tasks import TASKS
from peftlab.lectures.lessons import LESSONS
from peftlab.measured import runs as recorded_runs
from peftlab.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_front_matter_is_a_gradio_space():
    front = yaml.safe_load(README.split("---")[1])
    assert front["sdk"] == "gradio" and front["app_file"] == "app.py"
    assert (ROOT / front["app_file"]).exists()
    required = re.search(r"gradio>=([\d.]+)", (ROOT / "requirements.txt").read_text())[1]
    assert front["sdk_version"].startswith(required)
    assert len(front["short_description"]) <= 60  # the Hub's limit
    assert front["license"] == "apache-2.0"


def test_every_path_of_the_tree_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = ROOT / name if name.endswith("/") else ROOT
            path = ROOT / name
        else:
            path = folder / name
        assert path.exists(), line


def test_pictures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists()


@pytest.mark.parametrize("run", recorded_runs(), ids=lambda r: r["file"])
def test_measured_numbers_are_those_of_the_recordings(run):
    done = run["events"][-1]
    row = next(line for line in README.splitlines() if run["file"] in line)
    for value in (
        units.score(next(iter(done["eval"]["before"].values()))),
        units.score(next(iter(done["eval"]["after"].values()))),
        units.seconds(done["seconds"]),
        units.seconds(done["training_seconds"]),
    ):
        assert value in row, (value, row)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "amp"])
def test_the_reason_for_amp_is_measured(precision):
    done = json.loads((ROOT / f"assets/measured/precision-full-{precision}-h100.json").read_text())["events"][-1]
    source = (ROOT / "peftlab/resolve.py").read_text(encoding="utf-8")
    assert f"{units.score(done['eval']['after']['exact_match'])} in {precision}" in source


def test_how_exact_the_memory_is_comes_from_the_recording():
    found = [row for row in memory_rows() if "error" not in row]
    for quantity in ("peak_allocated_bytes", "peak_reserved_bytes"):
        errors = [row["predicted"][quantity] / row["measured"][quantity] - 1 for row in found]
        said = f"{sum(map(abs, errors)) / len(errors):.2%}", f"{max(errors, key=abs):+.2%}"
        assert all(text in README for text in said), (quantity, said)
    assert f"{len(found)} steps of {len({r['spec']['model'] for r in found})} models" in README


def memory_rows():
    return json.loads((ROOT / "assets/measured/memory-h100.json").read_text())["rows"]


def test_other_calculators_are_quoted_from_the_recording():
    comparison = json.loads((ROOT / "assets/measured/calculators.json").read_text())["comparisons"][0]
    for line in comparison["table"]:
        if line["group"] == "all" and line["covered"] and line["quantity"] != "process":
            version = "" if line["version"] == "this tree" else " " + line["version"]
            errors = f"{line['mean_absolute_error']:.1%} | {line['worst_error']:+.1%}"
            row = f"| {line['tool']}{version} | {line['quantity']} | {line['covered']} of {line['rows']} | {errors} |"
            assert row in README


@pytest.mark.parametrize("task", TASKS)
def test_the_speeds_on_a_cpu_are_those_of_the_recordings(task):
    document = json.loads((ROOT / f"assets/measured/speed-{task}-cpu.json").read_text())
    assert document["spec"]["task"] == task and document["device"] == "cpu"
    runs = {row["name"]: row["runs"] for row in document["rows"]}
    ours, theirs = runs["peftlab"], runs[YARDSTICK]
    ratio = mean(ours, "tokens_per_second") / mean(theirs, "tokens_per_second")
    scores = " | ".join(units.score(mean(of, "score")) for of in (ours, theirs))
    assert f"| `speed-{task}-cpu.json` | {ratio:.2f}× | {scores} |" in README
    assert ratio >= 1.2


def speed(name):
    return json.loads((ROOT / f"assets/measured/speed-{name}h100.json").read_text())


def steps(document):
    """Trainer → its usual step in seconds."""
    return {row["name"]: statistics.median(run["step_seconds"] for run in row["runs"]) for row in document["rows"]}


def test_the_speed_on_a_gpu_is_that_of_the_recording():
    document = speed("")
    assert document["hardware"] in README and table(document, YARDSTICK) in README
    assert (ROOT / "assets/measured/speed-h100.svg").read_text() == chart(document, YARDSTICK)
    found = steps(document)
    assert found[YARDSTICK] / found["peftlab"] >= 15
    runs = {row["name"]: row["runs"] for row in document["rows"]}
    assert [len(runs[name]) for name in ("peftlab", YARDSTICK)] == [5, 5]
    clicks = [run["click_to_saved_seconds"] for run in runs["peftlab"]]
    assert f"that is {min(clicks):.1f} to {max(clicks):.1f} s" in README and max(clicks) <= 5


def test_the_larger_model_is_that_of_the_recording():
    document = speed("1.7b-")
    found = {name: 1e3 * seconds for name, seconds in steps(document).items()}
    ours, theirs = found["peftlab"], found[YARDSTICK]
    assert f"takes {ours:.1f} ms a step against Trainer's {theirs:.1f}, {theirs / ours:.1f}× faster" in README
    assert document["random_weights"] and theirs / ours >= 2.5


def test_a_quantized_base_of_8b_is_that_of_the_recording():
    document = speed("8b-nf4-")
    found = {name: 1e3 * seconds for name, seconds in steps(document).items()}
    (ours,), (theirs,) = (row["runs"] for row in document["rows"])
    times = f"takes {found['peftlab']:.1f} ms against TRL's {found['TRL SFTTrainer']:.1f}"
    gigabytes = [x / 1e9 for x in (ours["peak_bytes"], theirs["peak_bytes"], ours["predicted_peak_bytes"])]
    plain = " ".join(README.split())
    assert times + ", and {:.1f} GB against {:.1f}, of which {:.1f} were predicted".format(*gigabytes) in plain
    assert found["peftlab"] <= found["TRL SFTTrainer"] and ours["peak_bytes"] <= theirs["peak_bytes"]


def test_decoding_is_that_of_the_recording():
    document = json.loads((ROOT / "assets/measured/generation-h100.json").read_text())
    said = [f"{row['peftlab']:,.0f} against {row['transformers']:.0f}" for row in document["rows"]]
    plain = " ".join(README.replace(" tokens/s", "").split())
    assert all(text in plain for text in said), said
    assert document["same_text_in_fp32"]
    first = document["rows"][0]
    assert first["peftlab"] >= max(450, 15 * first["transformers"])


def test_the_gears_are_those_of_the_recording():
    rows = json.loads((ROOT / "assets/measured/gears-h100.json").read_text())["methods"]
    assert [row["method"] for row in rows] == list(METHODS)
    graph = [row for row in rows if row.get("gear") == "graph"]
    assert f"Of the {len(rows)} methods {len(graph)} train in the graph on this model" in README
    others = {row["method"]: row.get("why_eager") or row["error"] for row in rows if row not in graph}
    assert others.keys() == {"adalora", "bitfit"} and all(others.values())


def mean(runs, name):
    return sum(run[name] for run in runs) / len(runs)


@pytest.mark.parametrize("lesson", LESSONS.values(), ids=LESSONS)
def test_every_claim_is_there_with_its_figure_and_verdict(lesson):
    for claim, found in lesson.findings(lesson.recordings()[0].lines):
        verdict = "holds" if found.holds else "does not hold"
        assert f"| {claim.says} ({claim.source}) | {found.text} | {verdict} |" in README


def test_the_races_it_tells_of_have_three_seeds_on_a_gpu():
    assert "Recorded on one NVIDIA H100, SmolLM2-135M-Instruct on tickets, 40 steps of 4, 3 seeds" in README
    for race in (lesson.recordings()[0] for lesson in LESSONS.values()):
        assert race.hardware.startswith("NVIDIA H100")
        assert all(len(line.scores) == 3 or "diverged" in line.error for line in race.lines)


def test_it_says_how_far_measured_peaks_of_races_are_from_predicted_ones():
    off = [
        line.measured_peak_bytes / line.predicted_peak_bytes - 1
        for lesson in LESSONS.values()
        for line in lesson.recordings()[0].lines
        if line.measured_peak_bytes
    ]
    assert sum(abs(share) <= 0.05 for share in off) > len(off) / 2
    assert f"most are within 5% of the predicted ones, the farthest {max(off, key=abs):.0%} above." in README
