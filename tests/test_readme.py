"""The README tells the truth: its commands, its tree and its numbers."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peftlab import units
from peftlab.bench.chart import chart
from peftlab.bench.peers import YARDSTICK
from peftlab.data.tasks import TASKS
from peftlab.lectures.lessons import LESSONS
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


def test_its_numbers_are_those_of_the_recordings():
    """`.ci/readme` writes every table and sentence with numbers again; here it only looks."""
    done = subprocess.run([sys.executable, ".ci/readme", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), "run .ci/readme"


@pytest.mark.parametrize("precision", ["bf16", "fp32", "amp"])
def test_the_reason_for_amp_is_measured(precision):
    done = recording(f"precision-full-{precision}-h100")["events"][-1]
    source = (ROOT / "peftlab/resolve.py").read_text(encoding="utf-8")
    assert f"{units.score(done['eval']['after']['exact_match'])} in {precision}" in source


def recording(name):
    return json.loads((ROOT / f"assets/measured/{name}.json").read_text())


def runs(name, trainer):
    return next(row["runs"] for row in recording(f"speed-{name}")["rows"] if row["name"] == trainer)


def step(name, trainer):
    return statistics.median(run["step_seconds"] for run in runs(name, trainer))


@pytest.mark.parametrize("name, faster", [("h100", 15), ("1.7b-h100", 2.5), ("8b-nf4-h100", 1)])
def test_the_recorded_speed_is_what_it_is_built_for(name, faster):
    peer = "TRL SFTTrainer" if "8b" in name else YARDSTICK
    assert step(name, peer) >= faster * step(name, "peftlab")


@pytest.mark.parametrize("task", TASKS)
def test_on_a_cpu_it_is_faster_too(task):
    ours, theirs = (runs(f"{task}-cpu", name)[0]["tokens_per_second"] for name in ("peftlab", YARDSTICK))
    assert recording(f"speed-{task}-cpu")["spec"]["task"] == task and ours >= 1.2 * theirs


def test_a_click_on_a_gpu_is_an_adapter_within_seconds():
    clicks = [run["click_to_saved_seconds"] for run in runs("h100", "peftlab")]
    assert len(clicks) == len(runs("h100", YARDSTICK)) == 5 and max(clicks) <= 5
    assert (ROOT / "assets/measured/speed-h100.svg").read_text() == chart(recording("speed-h100"), YARDSTICK)


def test_decoding_is_faster_and_says_the_same():
    document = recording("generation-h100")
    first = document["rows"][0]
    assert document["same_text_in_fp32"] and first["peftlab"] >= max(450, 15 * first["transformers"])


def test_the_gears_are_those_of_every_method():
    rows = recording("gears-h100")["methods"]
    assert [row["method"] for row in rows] == list(METHODS)
    others = {row["method"]: row.get("why_eager") or row["error"] for row in rows if row.get("gear") != "graph"}
    assert others.keys() == {"adalora", "bitfit"} and all(others.values())


def test_the_races_it_tells_of_have_three_seeds_on_a_gpu():
    assert "Recorded on one NVIDIA H100, SmolLM2-135M-Instruct on tickets, 40 steps of 4, 3 seeds" in README
    for race in (lesson.recordings()[0] for lesson in LESSONS.values()):
        assert race.hardware.startswith("NVIDIA H100")
        assert all(len(line.scores) == 3 or "diverged" in line.error for line in race.lines)
