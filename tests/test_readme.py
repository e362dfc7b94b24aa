"""The README tells the truth: its commands, its tree and its numbers."""

import json
import re
import statistics
import subprocess
import sys

import yaml
from tiny import ROOT

from peftlab.bench.chart import chart
from peftlab.bench.peers import YARDSTICK
from peftlab.data.tasks import TASKS
from peftlab.lectures.lessons import LESSONS
from peftlab.methods import METHODS

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_front_matter_is_a_gradio_space():
    front = yaml.safe_load(README.split("---")[1])
    assert front["sdk"] == "gradio" and (ROOT / front["app_file"]).exists() and front["license"] == "apache-2.0"
    required = re.search(r"gradio>=([\d.]+)", (ROOT / "requirements.txt").read_text())[1]
    assert front["sdk_version"].startswith(required)
    assert len(front["short_description"]) <= 60  # the Hub's limit


def test_every_path_of_the_tree_and_every_picture_exists():
    paths, folder = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README), ""
    for line in README.split("## The tree")[1].split("```")[1].strip().splitlines():
        folder = folder if line.startswith(" ") else line.split()[0]
        paths.append(folder + line.split()[0] if line.startswith(" ") else folder)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_its_numbers_are_those_of_the_recordings():
    """`.ci/readme` writes every table and sentence with numbers again; here it only looks."""
    done = subprocess.run([sys.executable, ".ci/readme", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), "run .ci/readme"


def recording(name):
    return json.loads((ROOT / f"assets/measured/{name}.json").read_text())


def test_the_reason_for_amp_is_measured():
    """Weights that are trained in bf16 lose small updates to rounding."""
    ends = (recording(f"precision-full-{precision}-h100")["events"][-1] for precision in ("bf16", "fp32", "amp"))
    bf16, fp32, amp = (done["eval"]["after"]["exact_match"] for done in ends)
    assert bf16 < min(fp32, amp) / 2


def runs(name, trainer, key):
    found = next(row["runs"] for row in recording(f"speed-{name}")["rows"] if row["name"] == trainer)
    return [run[key] for run in found]


def test_the_recorded_speed_is_what_it_is_built_for():
    peers = (("h100", YARDSTICK, 15), ("1.7b-h100", YARDSTICK, 2.5), ("8b-nf4-h100", "TRL SFTTrainer", 1))
    for name, peer, faster in peers:
        ours, theirs = (statistics.median(runs(name, trainer, "step_seconds")) for trainer in ("peftlab", peer))
        assert theirs >= faster * ours, name
    for task in TASKS:
        ours, theirs = (runs(f"{task}-cpu", trainer, "tokens_per_second")[0] for trainer in ("peftlab", YARDSTICK))
        assert recording(f"speed-{task}-cpu")["spec"]["task"] == task and ours >= 1.2 * theirs
    clicks = runs("h100", "peftlab", "click_to_saved_seconds")
    assert len(clicks) == len(runs("h100", YARDSTICK, "seed")) == 5 and max(clicks) <= 5
    assert (ROOT / "assets/measured/speed-h100.svg").read_text() == chart(recording("speed-h100"), YARDSTICK)
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
