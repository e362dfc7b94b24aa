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
from peftlab.catalog.gpus import GPU, GPUS
from peftlab.data import tasks
from peftlab.memory import fits

CHIP = GPU("toy-gpu", "Toy GPU", 1.0, 10**9, 100.0, None, 1.0, "Toy", 2026, "here")
MODEL = BaseModel("toy-model", "Toy Model", 195_008, "nobody/toy", config=LLAMA)


@pytest.fixture
def entries(monkeypatch):
    monkeypatch.setitem(GPUS, "toy-gpu", CHIP)
    monkeypatch.setitem(models.MODELS, "toy-model", MODEL)
    monkeypatch.setitem(tasks.TASKS, "toy", TOY)


def test_the_command_line_lists_counts_and_predicts_it(entries, run):
    for command, key in (("models", "toy-model"), ("gpus", "toy-gpu"), ("tasks", "toy")):
        assert key in [e["key"] for e in json.loads(run(command, "--json")[1])]
    assert json.loads(run("params", "--model", "toy-model", "--json")[1])["trainable_parameters"] == 26_880
    assert predict(resolve(RunSpec(model="toy-model", method="full")), "12n").states == 12 * 195_008
    assert next(f for f in fits(2 * 10**9) if f.gpu.key == "toy-gpu").n_gpus == 2
    spec = resolve(RunSpec(task="toy", gpu="toy-gpu"))
    assert (spec.steps, spec.batch_size, spec.sequence_length, spec.gpu) == (4, 2, 96, "toy-gpu")


@pytest.mark.parametrize(
    "module, tab, offered",
    [
        ("memory_calculator", "Memory", {"toy-model", "toy-gpu"}),
        ("live_finetune", "Live", {"toy-model", "toy"}),
        ("lora_visualizer", "Lora", {"toy-model"}),
    ],
)
def test_the_tabs_offer_them(entries, module, tab, offered):
    blocks = pytest.importorskip("demos.page.store").blocks
    config = blocks(getattr(pytest.importorskip(f"demos.{module}"), tab)()).get_config_file()
    choices = [c for part in config["components"] for c in part.get("props", {}).get("choices") or []]
    assert offered <= {choice[1] if isinstance(choice, (list, tuple)) else choice for choice in choices}


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
            model, spec, "BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=1, target_modules=through_peft.names(model, targets)
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
for tab in (Live(), Memory(), Methods(), Race()):
    page = blocks(tab)
    answer = page.store.answer({"number": 1, "tab": tab.key, "state": {}, "open": list(tab.folds)})
    print(json.dumps([page.get_config_file(), answer], default=str, ensure_ascii=False))
"""


def test_a_method_is_one_file_and_one_entry(tmp_path, toy_file, tiny_model):
    """BOFT, which peft has and this app leaves out, appears in a copy of the app wherever methods are shown, counted or run."""
    for name in ("peftlab", "demos", "assets"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    shutil.copy(ROOT / "app.py", tmp_path)
    shutil.copy(toy_file, tmp_path / "assets" / "tasks")
    entry = tmp_path / "peftlab" / "catalog" / "methods.json"

    def python(*argv, fails=False):
        env = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=tmp_path, capture_output=True, text=True, env=env)
        assert bool(done.returncode) == fails, done.stderr
        return done.stderr if fails else done.stdout.splitlines()

    (tmp_path / "peftlab" / "methods" / "boft.py").write_text(BOFT)
    assert "boft needs both an entry" in python("-c", "import peftlab", fails=True)
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"boft": WORDS}))
    (listed,) = python("-m", "peftlab", "methods", "--json")
    assert next(m for m in json.loads(listed) if m["key"] == "boft")["name"] == "Butterfly OFT"
    spec = ("--method", "boft", "--model", tiny_model, "--target-modules", "q_proj,v_proj", "--json")
    events = python("-m", "peftlab", "train", *spec, "--task", "toy", "--steps", 2, "--out", "run")
    events = [json.loads(line) for line in events if line.startswith("{")]  # on a GPU, BOFT tells how it is compiled
    start, done = (next(e for e in events if e["type"] == kind) for kind in ("start", "done"))
    assert start["trainable_parameters"] == 1_824 and done["steps"] == 2  # known from an attached model
    (counted,) = python("-m", "peftlab", "params", "--method", "boft", "--model", "llama-2-7b", "--json")
    linear = architecture.of("llama-2-7b").linear()
    assert json.loads(counted)["trainable_parameters"] == sum(m.count * (4 * m.d_in + m.d_out) for m in linear)

    pytest.importorskip("gradio")
    tabs = python("-c", TABS)
    assert len(tabs) == 4 and all("Butterfly OFT" in tab and re.search(r"\bboft\b", tab) for tab in tabs)
    (tmp_path / "peftlab" / "methods" / "boft.py").unlink()
    assert "boft needs both an entry" in python("-c", "import peftlab", fails=True)
