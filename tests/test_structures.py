"""The closed form of models that are not plain transformers: near the trace, or said to be unknown."""

import json

import pytest

from peftlab import RunSpec, predict, resolve
from peftlab.base.models import from_config
from peftlab.cli import main
from peftlab.memory import closed_form, exact, gpu_grid
from peftlab.memory.asked import formulas_hold
from peftlab.memory.case import Case
from peftlab.show import costs, memory_figures

SIZES = {"hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000}
FEED_FORWARD = {"intermediate_size": 4096, "num_key_value_heads": 2}
DECODER = {"architectures": ["BartForCausalLM"], "d_model": 1024, "decoder_layers": 4, "decoder_attention_heads": 8}
HYBRID = {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 64}


def model(kind, **sizes):
    return from_config(json.dumps({"model_type": kind, **SIZES, **sizes})).key


def spec_of(kind, sizes, **settings):
    usual = {"method": "lora", "rank": 8, "precision": "bf16", "batch_size": 2, "sequence_length": 512}
    return resolve(RunSpec(model=model(kind, **sizes), gpu="h100-80gb", **usual | settings))


@pytest.mark.parametrize(
    "kind, sizes, plain, settings",
    [
        ("llama", FEED_FORWARD, True, {}),
        ("gpt_neox", {"intermediate_size": 4096}, False, {}),  # parallel, a part of each head rotated
        ("gpt_neox", {"intermediate_size": 4096}, False, {"method": "full", "precision": "amp"}),
        ("bloom", {}, True, {}),  # alibi, eager, an activation in Python: the formulas come near
        ("gptj", {"rotary_dim": 32}, False, {}),
        ("gemma2", FEED_FORWARD | {"head_dim": 128}, False, {}),  # soft caps
        ("lfm2", FEED_FORWARD | {"layer_types": ["conv", "full_attention"] * 2}, False, {}),
        ("mixtral", FEED_FORWARD | {"num_local_experts": 4, "intermediate_size": 1024}, True, {}),
        ("bart", DECODER, False, {}),  # its attention to an encoder never runs, and keeps and trains nothing
        ("bart", DECODER, False, {"method": "full"}),
    ],
)  # fmt: skip
def test_near_the_trace(kind, sizes, plain, settings):
    spec = spec_of(kind, sizes, **settings)
    assert predict(spec).allocated == pytest.approx(exact(spec).allocated, rel=0.05)
    assert formulas_hold(Case.of(spec)) == plain


def test_each_layer_of_its_own_kind_has_lines_of_its_own():
    form = closed_form(spec_of("lfm2", FEED_FORWARD | {"layer_types": ["conv"] * 3 + ["full_attention"]}))
    lines = {line.name: line for line in form.lines()}
    assert lines["conv"].numbers.startswith("3 × B × S") or "3 × B × S" in lines["conv"].numbers
    assert "attention" in lines and form.allocated(4, 512, 8) > form.allocated(2, 512, 8)


def test_an_unknown_step_has_states_alone(capsys):
    """Nothing is drawn or said of a step that is not known, and the command traces it."""
    spec = spec_of("granitemoehybrid", FEED_FORWARD | HYBRID | {"num_local_experts": 0})
    form, report = closed_form(spec), predict(spec)
    assert "does not know" in report.unknown and "mamba" in report.unknown and report.source == "closed-form"
    assert form.moments == {} and form.lines() == () and report.peak is report.process is None
    assert report.states > 0 and form.report().states == report.states
    assert "does not know" in costs.gpus(report, report) and "fits" not in costs.gpus(report, report)
    drawn = memory_figures.bars_value((report, report), (None, None), (2, 512, 8))
    assert "does not know" in drawn["closed"] and all(run["form"] is None for run in drawn["runs"])
    traced = exact(spec)
    assert {fit.n_gpus for fit in gpu_grid(traced)} <= {0, 1} and all(fit.alone for fit in gpu_grid(traced))
    settings = (
        "--rank",
        "8",
        "--precision",
        "bf16",
        "--batch-size",
        "2",
        "--sequence-length",
        "512",
        "--gpu",
        "h100-80gb",
    )
    assert main(["memory", "--model", spec.model, "--method", "lora", "--json", *settings]) in (0, None)
    said = json.loads(capsys.readouterr().out)
    assert said["source"] == "trace" and said["peak_allocated_bytes"] == traced.allocated and said["unknown"]
