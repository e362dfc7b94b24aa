"""The exact trace against steps that a GPU has really taken, and against common sense."""

import json
from pathlib import Path

import pytest

from peftlab import RunSpec, SpecError, resolve
from peftlab.__main__ import main
from peftlab.memory import exact, predict
from peftlab.memory.trace import KINDS, trace

ROWS = json.loads((Path(__file__).parent.parent / "assets/measured/memory-h100.json").read_text())["rows"]
MIB = 2**20
FACTS = [
    ("smollm2-135m", "lora", "fp32", 4, 512, False, 5_615_127_040, False),
    ("gemma-3-270m", "lora", "bf16", 2, 2048, True, 13_580_785_152, False),
    ("smollm2-1.7b", "qlora", "bf16", 1, 2048, True, 2_676_422_656, False),
    ("llama-3.1-8b", "lora", "bf16", 1, 1024, False, 27_826_374_656, False),
    ("qwen3-0.6b", "full", "bf16", 4, 512, False, 11_517_722_624, True),
    ("qwen3-0.6b", "dora", "bf16", 4, 512, False, 14_674_014_208, True),
]
"""Peaks measured on an H100 before this project, `out` not held; the last column says whether cuBLAS had its workspace."""


@pytest.mark.parametrize("model, method, precision, batch, length, checkpointing, measured, fresh", FACTS)
def test_peaks_measured_elsewhere(model, method, precision, batch, length, checkpointing, measured, fresh):
    rank = {} if method == "full" else {"rank": 16}
    spec = RunSpec(model=model, method=method, precision=precision, batch_size=batch, sequence_length=length,
                   gradient_checkpointing=checkpointing, gpu="h100-80gb", **rank)  # fmt: skip
    peak = dict(exact(spec).peak)
    workspace = peak.pop("workspace")
    assert sum(peak.values()) + fresh * workspace == pytest.approx(measured, rel=0.01)


CHOSEN = ("head", "ln", "vera", "prefix", "houlsby", "compacter", "qlora")


@pytest.mark.parametrize("method", CHOSEN)
def test_peaks_of_our_own_bench(method):
    row = next((r for r in ROWS if r["spec"]["method"] == method and "measured" in r), None)
    if row is None:
        pytest.skip(f"{method} has no measured row yet")
    report = exact(RunSpec.from_dict(row["spec"]))
    assert sum(report.peak.values()) == pytest.approx(row["measured"]["peak_allocated_bytes"], rel=0.01)


def peak(model, **settings):
    defaults = {"batch_size": 2, "sequence_length": 64, "rank": 4}
    phases = trace(resolve(RunSpec(model=model, **defaults | settings)))
    assert all(n >= 0 for kinds in phases.values() for n in kinds.values())
    assert all(set(kinds) == set(KINDS) for kinds in phases.values())
    return max(sum(kinds.values()) for kinds in phases.values())


def test_more_of_anything_takes_more(tiny_model):
    model = str(tiny_model)
    base = peak(model)
    assert peak(model, batch_size=4) > base and peak(model, sequence_length=128) > base and peak(model, rank=32) > base
    assert peak(model, gradient_checkpointing=True, sequence_length=128) < peak(model, sequence_length=128)
    assert peak(model, optimizer="sgd", method="full") < peak(model, optimizer="adamw", method="full")


def test_what_is_steady_is_what_the_closed_form_says(tiny_model):
    """After a step, weights and states: 512-byte blocks and rotary tables apart."""
    spec = resolve(RunSpec(model=str(tiny_model), method="full", batch_size=2, sequence_length=64))
    after, report = trace(spec)["after"], predict(spec)
    assert after["trainable_weights"] == pytest.approx(report.trainable_weights, rel=0.01)
    assert after["optimizer"] == pytest.approx(report.optimizer, rel=0.02)
    assert after["gradients"] == 0


@pytest.mark.parametrize("method", ["lora", "ia3", "prefix", "p-tuning", "parallel", "bitfit", "oft"])
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "opt", "qwen2"])
def test_any_method_of_any_family(family, method, config_files):
    if (family, method) in (("gemma3", "bitfit"), ("gpt2", "oft")):
        return
    assert peak(config_files[family], method=method, rank=None if method in ("prefix", "ia3") else 4) > 0


def test_the_command_line_prints_the_peak(tiny_model, capsys):
    command = [
        "memory",
        "--exact",
        "--model",
        str(tiny_model),
        "--batch-size",
        "2",
        "--sequence-length",
        "64",
        "--json",
    ]
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["source"] == "trace" and document["peak_allocated_bytes"] == max(document["timeline"].values())
    parts = ("frozen_weights", "trainable_weights", "gradients", "optimizer", "activations", "logits", "workspace")
    assert sum(document["components"][p] for p in parts) == document["peak_allocated_bytes"]


@pytest.mark.parametrize(
    "settings, said", [({"model": "100B"}, "no layers"), ({"optimizer": "lion"}, "optimizer=lion: the trace knows")]
)
def test_what_cannot_be_traced_says_so(tiny_model, settings, said):
    with pytest.raises(SpecError, match=said):
        exact(RunSpec(**{"model": str(tiny_model)} | settings))


def test_a_convention_is_not_traced(capsys):
    assert main(["memory", "--exact", "--convention", "8n"]) == 2
    assert "leave the convention out" in capsys.readouterr().err
