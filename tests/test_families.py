"""Every family that transformers knows: tiny models of it, the survey of all of them, and its committed table."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import transformers

from peftlab import SpecError, hardware, measured
from peftlab.base import configs
from peftlab.bench import families, survey

TABLE = measured.MEASURED / "families-cpu.json"


def rows_of(file):
    return json.loads(file.read_text())["rows"]


FEW = ("full", "lora", "ia3", "prompt", "houlsby")
SURVEYED = {"gpt2": "causal", "mixtral": "causal", "t5": "seq2seq", "bert": "classification"}


@pytest.mark.parametrize("kind, task", SURVEYED.items())
def test_a_family_is_surveyed_to_the_end(kind, task, monkeypatch):
    monkeypatch.setattr(survey, "_closed_form_error", lambda kind, task, folder: 0.01)
    monkeypatch.setattr(survey, "METHODS", {name: survey.METHODS[name] for name in FEW})
    row = list(survey.look(kind, task))[-1]
    assert set(row) - {"family", "task", "methods"} == set(survey.STAGES if task == "causal" else survey.STAGES[:1])
    assert {row[stage] for stage in survey.STAGES[:-1] if stage in row} == {"ok"}, row
    assert not [said for said in row["methods"].values() if said.startswith("wrong")], row


def test_the_closed_form_is_held_against_the_trace_at_the_familys_own_size(tmp_path):
    error = survey._closed_form_error("gpt2", "causal", tmp_path)
    assert abs(error) < survey.WITHIN


def test_where_a_familys_defaults_make_no_model_those_that_say_more_do(tmp_path, monkeypatch):
    """Of hunyuan, no width of a head is told; of nemotron, no number of key-value heads."""
    for kind, task in (("hunyuan_v1_dense", "causal"), ("nemotron", "causal"), ("gpt2", "causal")):
        first, second = families.usual(kind, task)
        with pytest.raises(SpecError) if kind != "gpt2" else nullcontext():
            configs.build_meta(first)
        assert configs.stack(configs.build_meta(second).config).hidden_size == configs.parsed(first)[0].hidden_size
    monkeypatch.setattr(families, "usual", lambda kind, task: iter([{"model_type": kind}]))
    assert survey._closed_form_error("gpt2", "causal", tmp_path) == survey.SIZELESS


def test_a_survey_is_about_the_processor(tmp_path, monkeypatch):
    """Also where there is a GPU, which the families' processes do not see; afterwards it is there again."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA H200, 143771\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hardware.here.cache_clear()
    assert hardware.here().device == "cuda"
    seen = []
    monkeypatch.setattr(
        survey,
        "apart",
        lambda *key: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or {"family": key[0], "task": key[1]},
    )
    document = survey.record_families(tmp_path / "families.json", lambda said: None, ["t5"])
    assert document["device"] == "cpu" and set(seen) == {""}
    assert hardware.here().device == "cuda" and "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.undo()
    hardware.here.cache_clear()


def test_what_the_processes_share_sets_no_cuda_up():
    """peft imports bitsandbytes, which does."""
    script = "import sys; [__import__(name) for name in %r]; print([n for n in sys.modules if n in ('peft', 'bitsandbytes')])"
    ran = subprocess.run([sys.executable, "-c", script % survey.PRELOADED], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "deepseek_v3", "mamba2", "t5gemma", "jamba", "zamba2"])
def test_a_tiny_model_is_small_and_has_every_kind_of_layer(kind):
    config, cls = configs.parsed(families.tiny(kind))
    assert cls.__name__ == families.tiny(kind)["architectures"][0] or kind == "gemma3"
    assert sum(p.numel() for p in configs.build_meta(families.tiny(kind)).parameters()) < 10**6
    usual = configs.stack(type(config)())
    for name in ("layer_types", "layers_block_type"):
        assert set(getattr(configs.stack(config), name, None) or ()) == set(getattr(usual, name, None) or ())


def test_a_tiny_model_is_the_same_each_time(tmp_path):
    first, second = (families.save("mixtral", tmp_path / name) / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_survey_goes_on_where_it_was_stopped_and_repeats_what_is_asked(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        survey, "apart", lambda *key: made.append(key) or dict(zip(("family", "task"), key, strict=True))
    )
    out = tmp_path / "families.json"
    for only, again, new in ((["gpt2"], False, 2), (["gpt2", "t5"], False, 2), (["gpt2"], True, 2), (["t5"], False, 0)):
        survey.record_families(out, lambda said: None, only, again=again)
        assert len(made) == new
        made.clear()
    assert [(row["family"], row["task"]) for row in rows_of(out)] == [
        ("gpt2", "causal"), ("gpt2", "classification"), ("t5", "classification"), ("t5", "seq2seq"),
    ]  # fmt: skip
    document = json.loads(out.read_text())
    assert document["totals"]["causal"]["families"] == 1
    out.write_text(json.dumps(document | {"versions": {}}))
    survey.record_families(out, lambda said: None, ["gpt2"])
    assert len(made) == len(rows_of(out)) == 2  # of other versions, nothing is kept
    with pytest.raises(SpecError, match="family=nosuch: .*; name one"):
        survey.record_families(out, lambda said: None, ["nosuch"])


def test_what_gets_worse_is_named():
    row = {
        "family": "a",
        "task": "causal",
        "traced": "ok",
        "closed_form": 0.01,
        "methods": {"lora": "ok", "ia3": "refused: x"},
    }
    assert survey.worse([row], [row]) == survey.worse([row], []) == []
    new = row | {"traced": "refused: y", "closed_form": 0.2, "methods": {"lora": "wrong: 1 are counted", "ia3": "ok"}}
    assert survey.worse([row], [new]) == [
        "a/causal traced: refused: y", "a/causal lora: wrong: 1 are counted", "a/causal closed form: 20.0% from the trace",
    ]  # fmt: skip
    assert survey.worse([new], [row | {"methods": {"lora": "ok", "ia3": "ok"}}]) == []


def test_the_table_is_of_all_families_and_meets_its_goals():
    """Nine of ten families that write text are counted, traced and trained, and nothing anywhere is wrong."""
    document = json.loads(TABLE.read_text())
    rows, found = document["rows"], document["totals"]
    assert found == survey.totals(rows)
    assert [said for row in rows for said in survey._verdicts(row) if said.startswith("wrong")] == []
    assert found["causal"]["supported"] >= 0.9 * found["causal"]["families"]
    assert all(found["causal"]["refused"][method] <= 20 for method in ("ia3", "prefix", "houlsby"))
    assert found["closed_form"]["beyond"] == 0
    if document["versions"]["transformers"] == transformers.__version__:
        every = {(kind, task) for task in families.TASKS for kind in families.kinds(task)}
        assert {(row["family"], row["task"]) for row in rows} == every


@pytest.mark.survey
def test_nothing_is_worse_than_in_the_table(tmp_path):
    new = survey.record_families(tmp_path / "families.json", print, jobs=2)
    assert survey.worse(rows_of(TABLE), new["rows"]) == []
