"""The command line, which is also the contract."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from peftlab import adapters, cli, units
from peftlab.base.models import MODELS
from peftlab.catalog import PRESETS
from peftlab.catalog.gpus import GPUS
from peftlab.cli._shared import check_writable
from peftlab.compare import study
from peftlab.data.tasks import TASKS
from peftlab.methods import METHODS
from peftlab.spec import SETTINGS


@pytest.fixture
def document(run):
    """The one JSON document that a command prints."""

    def call(*argv):
        status, out, _ = run(*argv, "--json")
        assert status == 0 and out.count("\n") == 1
        return json.loads(out)

    return call


@pytest.fixture
def refused(run):
    """The line on stderr by which a command says why it ends with a status; nothing else is printed."""

    def call(*argv, status=2):
        found, out, err = run(*argv)
        assert (found, out, err.count("\n")) == (status, "", 1)
        return err

    return call


def test_catalogues(run, document):
    registries = {"models": MODELS, "methods": METHODS, "gpus": GPUS, "tasks": TASKS, "presets": PRESETS}
    for command, registry in registries.items():
        assert [entry["key"] for entry in document(command)] == list(registry)
        status, out, err = run(command)
        assert status == 0 and err == "" and len(out.splitlines()) == len(registry)
        assert all(key in out for key in registry)


def test_what_each_method_does_with_a_model(document, run):
    entries = {entry["key"]: entry for entry in document("methods", "--model", "llama-2-7b")}
    assert (
        entries["lora"]["trainable_parameters"] == document("params", "--model", "llama-2-7b")["trainable_parameters"]
    )
    assert entries["bitfit"]["trainable_parameters"] is None and "has no bias" in entries["bitfit"]["why_not"]
    said = run("methods", "--model", "llama-2-7b")[1].splitlines()
    assert len(said) == len(METHODS) and sum("trained" in line for line in said) >= len(METHODS) - 1
    for model, reason in (("nosuch/config.json", "no such file"), ("7B", "a bare count has no layers")):
        status, out, err = run("methods", "--model", model)
        assert status == 2 and out == "" and reason in err and len(err.splitlines()) == 1


def test_params(document, run):
    asked = ("params", "--model", "llama-2-7b", "--target-modules", "q_proj,v_proj")
    data = document(*asked)
    assert {"total_parameters", "trainable_parameters", "trainable_percent", "adapter_bytes", "modules"} <= set(data)
    assert data["trainable_parameters"] == 4_194_304 and len(data["modules"]) == 64
    assert data["modules"][0] == {"name": "model.layers.0.self_attn.q_proj", "shape": [4096, 4096], "trainable": 65_536}
    assert "4,194,304 of 6,738,415,616" in run(*asked)[1]


def test_flags_win_over_a_preset_and_over_a_file(document, tmp_path):
    spec = document("params", "--preset", "qlora-7b", "--model", "llama-2-7b", "--dropout", 0.2)["spec"]
    assert (spec["method"], spec["quantization"], spec["rank"], spec["alpha"]) == ("qlora", "nf4", 64, 16)
    assert (spec["dropout"], spec["batch_size"], spec["learning_rate"]) == (0.2, 16, 2e-4)
    assert document("params", "--preset", "alpha-r", "--rank", 32)["spec"]["alpha"] == 32
    file = tmp_path / "spec.json"
    saved = {"model": "llama-2-7b", "rank": 64, "target_modules": "q_proj,v_proj", "gradient_checkpointing": True}
    file.write_text(json.dumps(saved))
    assert document("params", "--spec", file)["trainable_parameters"] == 33_554_432
    data = document("params", "--spec", file, "--rank", 8, "--no-gradient-checkpointing")
    assert data["trainable_parameters"] == 4_194_304 and data["spec"]["gradient_checkpointing"] is False


KEYS = {"peak_allocated_bytes", "peak_reserved_bytes", "process_bytes", "components", "timeline", "source"}
KINDS = {"frozen_weights", "trainable_weights", "gradients", "optimizer", "activations", "logits", "workspace"}


def test_memory(document, run):
    asked = ("memory", "--model", "gemma-3-270m", "--method", "full", "--precision", "bf16", "--gpu", "h100-80gb")
    data = document(*asked)
    assert set(data) >= KEYS and data["source"] == "closed-form" and set(data["components"]) >= KINDS
    assert sum(data["components"][kind] for kind in KINDS) == data["peak_allocated_bytes"]
    assert data["peak_allocated_bytes"] == max(moment["bytes"] for moment in data["timeline"])
    assert data["peak_allocated_bytes"] < data["peak_reserved_bytes"] < data["process_bytes"]
    said = run(*asked)[1]
    assert f"{units.size(data['peak_allocated_bytes'])} allocated, {units.size(data['process_bytes'])} in all" in said
    assert "--exact traces it" in said and "smallest GPU that holds it" in said
    assert "Full fine-tuning on Gemma 3 270M" in said and "NVIDIA H100 SXM5 80 GB, 85.5 GB: holds it, " in said
    assert "NVIDIA T4, 16.1 GB: does not hold these " in run("memory", "--model", "llama-3.1-8b", "--gpu", "t4")[1]


def test_memory_by_a_convention(document, run):
    asked = ("memory", "--model", "7B", "--method", "full", "--convention", "12n")
    data = document(*asked, "--tasks", 50)
    assert set(data) >= KEYS and data["source"] == "closed-form" and data["states_bytes"] == 84_000_000_000
    assert {"weights", "gradients", "optimizer", "activations", "logits"} <= set(data["components"])
    assert {data[name] for name in KEYS if name.endswith("_bytes")} == {data["timeline"]} == {None}
    assert data["storage"]["full"] == 50 * 14 * 10**9
    said = run(*asked)[1]
    assert "84 GB" in said and "activations are not included" in said
    bare = document("memory", "--model", "100B", "--trainable-parameters", "500M", "--convention", "8n")
    assert bare["trainable_parameters"] == 500_000_000


@pytest.mark.parametrize(
    "argv, said",
    [
        (["params", "--rank", "0"], "rank=0"),
        (["params", "--rank"], "rank"),
        (["params", "--rank", ""], "rank is empty"),
        (["params", "--ran", "8"], "--ran"),
        (["params", "--preset", "qlora-7"], "did you mean qlora-7b"),
        (["params", "--spec", "/nowhere.json"], "spec=/nowhere.json"),
        (["params", "--spec", sys.executable], "spec="),
        (["params", "--spec", str(ROOT / "assets" / "measured" / "page-cpu.json")], "page-cpu.json: "),
        (["memory", "--tasks", "0"], "tasks"),
        (["memory", "--trainable-parameters", "1M"], "trainable-parameters=1000000"),
        (["app", "--host", "nosuch.invalid"], "host=nosuch.invalid: no such address"),
        (["app", "--port", "0"], "1 to 65535"),
        (["app", "--port", "65536"], "1 to 65535"),
        (["app", "--port", "http"], "1 to 65535"),
        (["bench", "page", "--out", str(ROOT / "README.md" / "x.json")], "cannot be written"),
        (["bench", "page", "--out", str(ROOT / "assets")], "cannot be written"),
        (["train", "--method", "qlora", "--quantization", "none"], "quantization=none"),
        (["compare", "--adapter", "x", "--prompt", "a", "--task", "ticket"], "give one of them"),
        (["fetch", "7B"], "no weights to fetch"),
        (["frobnicate"], "choose from"),
        ([], "command"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(refused, argv, said):
    assert said in refused(*argv)


def test_a_failure_while_running_is_status_1(refused, run, tmp_path):
    assert "no adapter there" in refused("compare", "--prompt", "x", "--adapter", tmp_path, status=1)
    assert "no adapter there" in refused("study", "--out", tmp_path / "x.json", "--adapter", tmp_path, status=1)
    status, _, err = run("fetch", "smollm2-360m")
    assert status == 1 and "HF_HUB_OFFLINE" in err.splitlines()[-1] and "Traceback" not in err


def test_fetch_of_what_is_there(document, tiny_model):
    data = document("fetch", tiny_model)
    assert data["folder"] == str(tiny_model) and data["bytes"] == (tiny_model / "model.safetensors").stat().st_size


def test_train_prints_an_event_a_line(run, tiny_model, toy_file, tmp_path):
    asked = ("--model", tiny_model, "--task", toy_file, "--steps", 3, "--out", tmp_path / "run")
    status, out, err = run("train", *asked, "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and "step 3/3" in err
    assert sum(e["type"] == "step" for e in events) == 3 and events[-1]["type"] == "done"
    assert {"steps", "seconds", "tokens_per_second", "train_loss", "eval", "forgetting"} <= set(events[-1])
    assert {"predicted_peak_bytes", "measured_peak_bytes"} <= set(events[-1]) and events[-1]["adapter"] == str(
        tmp_path / "run" / "adapter"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained_by(run, tiny_model, toy_file, folder):
    """Names adapters of short runs, one by each method, which all tests share. Without --json, stdout stays empty."""

    def call(*methods):
        for method in methods:
            asked = ("--task", toy_file, "--method", method, "--steps", 2, "--learning-rate", 0.01)
            if not (folder / method).exists():
                status, out, err = run("train", "--model", tiny_model, *asked, "--out", folder / method)
                assert status == 0 and out == "" and "adapter in" in err
        return [arg for method in methods for arg in ("--adapter", folder / method / "adapter")]

    return call


def test_compare_merged(trained_by, document):
    """Folded into the base's weights it says the same, adapter by adapter."""
    asked = ("compare", *trained_by("lora", "dora", "ln"), "--prompt", "the cat", "--max-new-tokens", 4)
    apart, merged = (document(*asked, *more) for more in ([], ["--merged"]))
    replies = apart["exchanges"][0]["replies"]
    assert [r["model"] for r in replies] == ["base", "lora", "dora", "ln"] and apart["scores"] == []
    assert all(isinstance(r["text"], str) and r["seconds"] > 0 and r["score"] is None for r in replies)
    assert [r["text"] for r in merged["exchanges"][0]["replies"]] == [r["text"] for r in replies]


def test_compare_by_a_task(trained_by, document, run, toy_file):
    """The adapters' own, whatever their methods, or another one."""
    asked = ("compare", *trained_by("full", "prefix", "compacter"))
    data = document(*asked)
    assert data["metric"] == "exact_match" and len(data["exchanges"]) == 3
    assert [s["model"] for s in data["scores"]] == ["base", "full", "prefix", "compacter"]
    assert all(0 <= s["low"] <= s["mean"] <= s["high"] <= 1 and s["items"] == 3 for s in data["scores"])
    assert "95% interval" in run(*asked, "--task", toy_file)[1]


@pytest.mark.parametrize("method, question", [("houlsby", ["--prompt", "the cat"]), ("prompt", [])])
def test_what_cannot_be_merged_is_refused(method, question, trained_by, refused):
    err = refused("compare", *trained_by(method), "--merged", *question)
    assert err.startswith(f"peftlab: method={method}: it cannot be merged. ")


def test_study_writes_what_an_adapter_did_to_each_matrix(trained_by, document, run, tmp_path):
    _, folder = trained_by("lora")
    file = folder / study.FILE
    data = document("study", "--adapter", folder, "--targets", "query,v_proj", "--keep", 2, "--out", file)
    assert json.loads(file.read_text()) == data and len(file.read_text().splitlines()) == 2 + 6
    assert {m["role"] for m in data["matrices"]} == {"query", "value"}
    assert all(m["directions"]["count"] == 2 for m in data["matrices"])
    assert (data["adapter"], data["method"]) == ("lora", "lora")
    assert study.recorded(adapters.read(folder)).to_dict() == data
    status, out, err = run("study", "--adapter", folder, "--out", tmp_path / "new" / "all.json")
    assert status == 0 and "study of 21 matrices in" in err
    assert len(out.splitlines()) == 1 + 21 and "rank for 90%" in out and "model.layers.2.mlp.down_proj" in out
    assert json.loads((tmp_path / "new" / "all.json").read_text())["matrices"][0]["directions"] is None


@pytest.mark.parametrize(
    "method, more, said",
    [
        ("prompt", [], "method=prompt: it cannot be merged"),
        ("ln", [], "it changes no linear map that is studied by default; name in --targets"),
        ("lora", ["--targets", "lm_head"], "it changes none of lm_head; name in --targets"),
        ("lora", ["--out", "/"], "out=/: that is a folder"),
        ("lora", ["--out", "/dev/null/study.json"], "out=/dev/null/study.json: cannot be written"),
    ],
)
def test_what_cannot_be_studied_is_refused(method, more, said, trained_by, refused, tmp_path):
    file = tmp_path / "study.json"
    assert said in refused("study", *trained_by(method), "--out", file, *more) and not file.exists()


def test_bench_records_with_its_provenance(run, tiny_model, toy_file, tmp_path):
    file = tmp_path / "m" / "run.json"
    asked = ("--model", tiny_model, "--task", toy_file, "--steps", 2, "--out", file)
    status, out, _ = run("bench", "record", *asked, "--json")
    data = json.loads(file.read_text())
    assert status == 0 and json.loads(out) == data
    assert {"command", "hardware", "device", "versions", "date", "kind", "spec", "events", "comparison"} <= set(data)
    assert data["events"][-1]["type"] == "done" and len(data["comparison"]) == 2


def test_a_verb_is_one_file(run, tmp_path, monkeypatch):
    (tmp_path / "hello.py").write_text(
        "from ._shared import verb\n\ndef add(commands):\n    verb(commands, 'hello', lambda args: 3, 'greets')\n"
    )
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    assert run("hello")[0] == 3 and "hello" in cli.parser().format_help()


def as_a_process(*argv, stdout=subprocess.PIPE, **environment):
    command, env = (
        [sys.executable, "-m", "peftlab", *map(str, argv)],
        os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
    )
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env)


def test_no_empty_file_is_left_where_one_is_to_be_written(tmp_path):
    check_writable(tmp_path / "new" / "x.json")
    assert (tmp_path / "new").is_dir() and not (tmp_path / "new" / "x.json").exists()
    (tmp_path / "kept").write_text("as it is")
    check_writable(tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "as it is"


@pytest.mark.parametrize("gone, said", [(False, "cannot be written"), (True, "")], ids=["full", "gone"])
def test_an_output_that_cannot_be_written_is_one_line_and_status_1(gone, said):
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads the pipe
    with Path("/dev/full").open("w") as full:
        done = as_a_process("models", stdout=writer if gone else full)
    os.close(writer)
    assert (done.returncode, done.stderr.count("\n")) == (1, bool(said)) and said in done.stderr


def test_a_process_tells_its_status_and_a_terminal_without_a_letter_gets_another():
    done = as_a_process("params", "--rank", "-1")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    done = as_a_process("params", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and "576?1536" in done.stdout


def test_every_line_of_a_process_is_its_own(tiny_model, toy_file, tmp_path):
    """Advice about missing packages and what will be removed is for those who write libraries."""
    own = r"loading |tiny-llama from |held out, |step \d+/\d+ |adapter in |answering \d|peftlab: |$"
    spec = ("--model", tiny_model, "--quantization", "nf4", "--gradient-checkpointing")
    run = tmp_path / "run"
    for argv in (
        ("memory", "--exact", *spec, "--batch-size", 1, "--sequence-length", 32),
        ("train", *spec, "--task", toy_file, "--steps", 2, "--out", run),
        ("compare", "--adapter", run / "adapter", "--prompt", "what colour", "--max-new-tokens", 3),
    ):
        done = as_a_process(*argv)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if not re.match(own, line)] == []


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert [n for n in SETTINGS if "--" + n.replace("_", "-") not in out] == []
