"""One entry in a registry is enough: it then shows in the command line, in the page, and in what runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from tiny import LLAMA, ROOT, TOY

from peftlab import RunSpec, predict, resolve
from peftlab.base import architecture, models
from peftlab.base.models import BaseModel
from peftlab.catalog import GPU, GPUS
from peftlab.cli import main
from peftlab.data import tasks
from peftlab.memory import fits

CHIP = GPU("toy-gpu", "Toy GPU", 1.0, 10**9, 100.0, None, "Toy", 2026, "here")
MODEL = BaseModel("toy-model", "Toy Model", 195_008, "nobody/toy", config=LLAMA)


@pytest.fixture
def entries(monkeypatch):
    monkeypatch.setitem(GPUS, "toy-gpu", CHIP)
    monkeypatch.setitem(models.MODELS, "toy-model", MODEL)
    monkeypatch.setitem(tasks.TASKS, "toy", TOY)


@pytest.mark.parametrize("command, key", [("models", "toy-model"), ("gpus", "toy-gpu"), ("tasks", "toy")])
def test_the_command_line_lists_it(entries, capsys, command, key):
    assert main([command, "--json"]) == 0
    assert key in [e["key"] for e in json.loads(capsys.readouterr().out)]


def test_a_model_is_counted_and_predicted(entries, capsys):
    assert main(["params", "--model", "toy-model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == 26_880
    assert predict(resolve(RunSpec(model="toy-model", method="full")), "12n").states == 12 * 195_008


def test_a_gpu_is_compared_with(entries):
    assert next(f for f in fits(2 * 10**9) if f.gpu.key == "toy-gpu").n_gpus == 2
    assert resolve(RunSpec(gpu="toy-gpu")).gpu == "toy-gpu"


def test_a_task_is_the_runs_own(entries):
    spec = resolve(RunSpec(task="toy"))
    assert (spec.steps, spec.batch_size, spec.sequence_length) == (4, 2, 96)


def choices(tab):
    """Every choice of every component that a tab builds, as the browser gets them."""
    store = pytest.importorskip("demos.page.store")
    found = set()
    for component in store.blocks(tab).get_config_file()["components"]:
        for choice in component.get("props", {}).get("choices") or []:
            found.add(choice[1] if isinstance(choice, (list, tuple)) else choice)
    return found


@pytest.mark.parametrize(
    "module, tab, offered",
    [
        ("memory_calculator", "Memory", {"toy-model", "toy-gpu"}),
        ("live_finetune", "Live", {"toy-model", "toy"}),
        ("lora_visualizer", "Lora", {"toy-model"}),
    ],
)
def test_the_tabs_offer_them(entries, module, tab, offered):
    assert offered <= choices(getattr(pytest.importorskip(f"demos.{module}"), tab)())


def test_a_model_too_large_or_no_writer_is_not_offered_live(entries, monkeypatch):
    live_finetune = pytest.importorskip("demos.live_finetune")

    monkeypatch.setitem(models.MODELS, "toy-large", replace(MODEL, key="toy-large", total_parameters=10**11))
    offered = {key for _, key in live_finetune.runnable()}
    assert "toy-model" in offered and not {"toy-large", "bert-base", "gpt3-175b"} & offered


BOFT = '''
"""BOFT: rotations of small blocks, shuffled and rotated again."""

from . import Drawing, Method, Term, linear_targets, register, through_peft

register(
    Method(
        "boft",
        terms=(Term(("d_in",), 4), Term(("d_out",))),
        select=linear_targets,
        attach=lambda model, targets, spec: through_peft.attach(
            model, spec, "BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=1, target_modules=through_peft.names(targets)
        ),
        merge=through_peft.merge,
        drawing=Drawing(("*rotations", "W", "*× s")),
        settings=("target_modules", "layers", "adapter_precision"),
        defaults={"learning_rate": 2e-3},
    )
)
'''
WORDS = {
    "name": "Butterfly OFT",
    "family": "additive",
    "reparameterized": True,
    "hypothesis": "Several sparse rotations in a row make a dense one.",
    "trains": "Rotations of blocks of 4, and a scale for each output.",
    "inference": "Nothing once merged.",
    "merging": "Yes.",
    "when": "Few parameters.",
    "when_not": "Speed.",
    "mistakes": ["One.", "Two."],
    "papers": ["oft"],
}
TABS = """
import json
from demos.live_finetune import Live
from demos.memory_calculator import Memory
from demos.method_map import Methods
from demos.method_race import Race
from demos.page.store import blocks
from peftlab import RunSpec, predict, resolve
print(predict(resolve(RunSpec(model="llama-2-7b", method="boft"))).gradients)
for tab in (Live(), Memory(), Methods(), Race()):
    page = blocks(tab)
    answer = page.store.answer({"number": 1, "tab": tab.key, "state": {}, "open": list(tab.folds)})
    print(json.dumps([page.get_config_file(), answer], default=str, ensure_ascii=False))
"""


@pytest.fixture
def copy(tmp_path, toy_file):
    """The whole app in another place, with a task that a tiny model can read."""
    root = tmp_path / "copy"
    for name in ("peftlab", "demos", "assets"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    shutil.copy(ROOT / "app.py", root)
    shutil.copy(toy_file, root / "assets" / "tasks")
    return root


def add_boft(root):
    """One file and one entry."""
    (root / "peftlab" / "methods" / "boft.py").write_text(BOFT)
    file = root / "peftlab" / "catalog" / "methods.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boft": WORDS}))


def python(root, *argv):
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_method_is_one_file_and_one_entry(copy, tiny_model):
    """BOFT, which peft has and this app leaves out, appears wherever methods are shown, counted or run."""
    add_boft(copy)
    (listed,) = python(copy, "-m", "peftlab", "methods", "--json")
    assert next(m for m in json.loads(listed) if m["key"] == "boft")["name"] == "Butterfly OFT"

    spec = ("--method", "boft", "--model", tiny_model, "--target-modules", "q_proj,v_proj", "--json")
    (counted,) = python(copy, "-m", "peftlab", "params", *spec)
    assert json.loads(counted)["trainable_parameters"] == 1_824  # FACTS.md, section 4

    events = python(copy, "-m", "peftlab", "train", *spec, "--task", "toy", "--steps", 2, "--out", "run")
    events = [
        line for line in events if line.startswith("{")
    ]  # on a GPU, peft's BOFT tells how its kernels are compiled
    start, done = (next(e for e in map(json.loads, events) if e["type"] == kind) for kind in ("start", "done"))
    assert start["trainable_parameters"] == 1_824 and done["steps"] == 2

    pytest.importorskip("gradio")
    gradients, *tabs = python(copy, "-c", TABS)
    linear = architecture.of("llama-2-7b").linear()
    assert int(gradients) == 4 * sum(m.count * (4 * m.d_in + m.d_out) for m in linear)
    assert len(tabs) == 4
    for tab in tabs:
        assert "Butterfly OFT" in tab and re.search(r"\bboft\b", tab)


@pytest.mark.parametrize("half, missing", [("file", "catalog/methods.json"), ("entry", "peftlab/methods")])
def test_half_a_method_says_what_it_lacks(half, missing, copy):
    add_boft(copy)
    if half == "file":
        shutil.copy(ROOT / "peftlab" / "catalog" / "methods.json", copy / "peftlab" / "catalog")
    else:
        (copy / "peftlab" / "methods" / "boft.py").unlink()
    done = subprocess.run([sys.executable, "-c", "import peftlab.methods"], cwd=copy, capture_output=True, text=True)
    assert done.returncode and "boft needs both an entry" in done.stderr and missing in done.stderr
