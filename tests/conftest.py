"""Fixtures that every test may use: tiny models on disk, a tiny task, and a cache of the test's own."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `pytest` alone does not put the repository on the path
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tiny import CONFIGS, GPT2, LLAMA, TIED, TOY, make_model, wait_for

from peftlab import RunSpec, hardware
from peftlab.data import tasks
from peftlab.data.tasks import Task
from peftlab.memory import here

hardware._multiplies_bf16 = lambda: False  # automatic settings are the same wherever the tests run
here._free = lambda: None  # and so is what fits


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist would put files of few tests last
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config, items):
    """Tests on real weights begin first, because they train for minutes. The survey is run where `-m` asks for it."""
    if "survey" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("survey")]
    items.sort(key=lambda item: not item.get_closest_marker("real"))


@pytest.fixture(autouse=True, scope="module")
def older_than_this_file():
    """What is there already is no garbage. A run that closes looks for its own, and would look through all of that too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_model(models_dir) -> Path:
    """Untied Llama with grouped-query attention and no chat template."""
    return make_model(models_dir / "tiny-llama", LLAMA)


@pytest.fixture
def begun(tiny_model):
    """Its tokenizer, made to begin every text with a token, as Gemma's and Llama's do."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    token = tokenizer.bos_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))]
    )
    return tokenizer


@pytest.fixture(scope="session")
def tied_model(models_dir) -> Path:
    """The same with a tied head and a chat template."""
    return make_model(models_dir / "tiny-tied", TIED, chat=True)


@pytest.fixture(scope="session")
def gpt2_model(models_dir) -> Path:
    """GPT-2: Conv1D, biases, a tied head."""
    return make_model(models_dir / "tiny-gpt2", GPT2)


@pytest.fixture(scope="session")
def families(models_dir) -> dict[str, str]:
    """Family → a model of it on disk."""
    return {name: str(make_model(models_dir / f"family-{name}", config)) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def config_files(models_dir) -> dict[str, str]:
    """Family → a config.json, which is enough to count by."""
    paths = {}
    for name, config in CONFIGS.items():
        folder = models_dir / f"config-{name}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        paths[name] = str(folder / "config.json")
    return paths


@pytest.fixture
def toy_task(monkeypatch) -> Task:
    monkeypatch.setitem(tasks.TASKS, "toy", TOY)
    return TOY


@pytest.fixture
def toy_file(tmp_path) -> Path:
    """The same task as a file."""
    keys = ("name", "teaches", "instruction", "metric", "steps", "batch_size", "sequence_length", "max_new_tokens")
    data = {k: getattr(TOY, k) for k in keys} | {
        split: [row.__dict__ for row in getattr(TOY, split)] for split in ("train", "heldout")
    }
    file = tmp_path / "toy.json"
    file.write_text(json.dumps(data))
    return file


@pytest.fixture
def toy_spec(tiny_model, toy_task) -> RunSpec:
    return RunSpec(model=str(tiny_model), task="toy", learning_rate=1e-2, precision="fp32")  # on a GPU too


@pytest.fixture
def run(capsys):
    """(exit status, what stdout says, what stderr says)"""

    from peftlab.cli import main

    def call(*argv):
        status = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def nothing_loaded(monkeypatch):
    """No base is in memory; those that others have loaded are back afterwards."""
    from peftlab.base import weights

    monkeypatch.setattr(weights, "_loaded", OrderedDict())
    monkeypatch.setattr(weights, "_alive", weakref.WeakValueDictionary())


@pytest.fixture
def room(monkeypatch, tmp_path_factory):
    """This server's room, with a data folder of the test's own."""
    from peftlab.room import host, rooms

    monkeypatch.setenv("PEFTLAB_DATA", str(tmp_path_factory.mktemp("data")))
    host.settings.cache_clear()
    rooms._here.cache_clear()
    yield rooms.here()
    rooms.here().close()
    host.settings.cache_clear()
    rooms._here.cache_clear()


@pytest.fixture
def trained_here(room, monkeypatch):
    """Gives an owner's finished run, whose adapter is a copy of a folder."""
    from peftlab.room import jobs

    def of(folder: Path, owner: str, *left_out: str):
        def trains(arguments, out, again):
            shutil.copytree(folder, out / "adapter", ignore=shutil.ignore_patterns(*left_out))
            yield {
                "type": "done",
                "steps": 1,
                "stopped": False,
                "measured_peak_bytes": None,
                "predicted_peak_bytes": None,
            }

        monkeypatch.setitem(jobs.WORK, "train", trains)
        job = room.start("train", {"spec": {}}, owner)
        wait_for(lambda: job.over)
        return job

    return of


@pytest.fixture(autouse=True)
def apart(request, monkeypatch, tmp_path_factory):
    """No Hub, and folders of the test's own; tests marked `real` or `browser` keep the machine's cache."""
    monkeypatch.setenv("PEFTLAB_DATA", str(tmp_path_factory.getbasetemp() / "data"))
    if request.node.get_closest_marker("real") or request.node.get_closest_marker("browser"):
        return
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PEFTLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
