import json
import random
from urllib.parse import parse_qsl

import pytest
from tiny import ROOT

from peftlab import RunSpec, SpecError, hardware, resolve, seam
from peftlab.base import configs
from peftlab.catalog import PRESETS
from peftlab.catalog.gpus import GPUS
from peftlab.data.tasks import TASKS
from peftlab.hardware import Machine
from peftlab.methods import METHODS
from peftlab.resolve import METHOD_SETTINGS, cannot_run, resolve_here, set_aside, with_preset
from peftlab.show.settings import aside_said
from peftlab.spec import SETTINGS, parse_layers

CPU = Machine("cpu", "a CPU", None, 2, None)
GPU = Machine("cuda", "NVIDIA H100", "h100-80gb", 16, None)
NAMES = {"model": ["llama-3.1-8b", "100B", "a/b c&d=e"], "method": list(METHODS), "target_modules": ["all-linear", "q_proj,v_proj"],
         "layers": ["all", "first:2", "last:4", "0-3,7"], "task": ["ticket"], "gpu": list(GPUS)}  # fmt: skip


def draw(rng: random.Random) -> RunSpec:
    values = {}
    for name, about in SETTINGS.items():
        if rng.random() < 0.4:
            continue
        low = about.low if about.low is not None else (about.above or 0) + 1e-6
        if about.type is bool:
            values[name] = rng.random() < 0.5
        elif about.type is str:
            values[name] = rng.choice(about.choices or NAMES[name])
        elif about.type is int:
            values[name] = rng.randint(int(low), int(about.high))
        else:
            values[name] = rng.choice([rng.uniform(low, about.high), low, float(about.high)])
    return RunSpec(**values)


def test_json_and_link_round_trip():
    rng, seen = random.Random(0), set()
    for _ in range(200):
        spec = draw(rng)
        seen |= set(spec.to_dict())
        assert RunSpec.from_json(json.dumps(spec.to_dict())) == spec
        assert RunSpec.from_dict(dict(parse_qsl(spec.to_query()))) == spec
    assert seen == set(SETTINGS), "the draws leave a field out"


@pytest.mark.parametrize(
    "values, said",
    [
        ({"rank": 0}, ["rank=0", "at least 1", "try 8"]),
        ({"rank": "x"}, ["rank=x", "whole number", "try 8"]),
        ({"rank": 2.5}, ["rank=2.5", "whole number"]),
        ({"rank": True}, ["rank=True", "whole number"]),
        ({"rank": float("nan")}, ["rank=nan", "whole number"]),
        ({"rank": float("inf")}, ["rank=inf", "whole number"]),
        ({"alpha": -1}, ["alpha=-1", "more than 0", "try 16"]),
        ({"dropout": 2}, ["dropout=2", "at most 0.9", "try 0.05"]),
        ({"learning_rate": 0}, ["learning-rate=0", "more than 0", "try 0.002"]),
        ({"batch_size": 0}, ["batch-size=0", "at least 1", "try 4"]),
        ({"precision": "bf17"}, ["precision=bf17", "did you mean bf16"]),
        ({"quantization": "zzz"}, ["quantization=zzz", "none, nf4, int8"]),
        ({"gradient_checkpointing": "maybe"}, ["gradient-checkpointing=maybe", "yes or no", "true or false"]),
        ({"layers": "frist:2"}, ["layers=frist:2", "first:4"]),
        ({"layers": "first:0"}, ["layers=first:0", "first:4"]),
        ({"layers": "5-2"}, ["layers=5-2", "first:4"]),
        ({"layers": "0-99999999999"}, ["layers=0-99999999999"]),
        ({"rnak": 8}, ["rnak", "did you mean rank"]),
        ({"model": 5}, ["model=5", "name"]),
        ({"method": " "}, ["method= ", "name"]),
    ],
)
def test_a_refusal_says_value_limit_and_fix(values, said):
    with pytest.raises(SpecError) as refused:
        RunSpec.from_dict(values)
    message = str(refused.value)
    assert "\n" not in message
    for part in said:
        assert part in message, message


NO_JSON = {
    "rank: 8": "not JSON",
    "[1]": "not a list",
    "null": "JSON object",
    "[" * 100_000: "",
    '{"rank": 1' + "0" * 5000 + "}": "",
}


@pytest.mark.parametrize("text, said", NO_JSON.items(), ids=range(len(NO_JSON)))
def test_what_is_no_json_object_is_refused(text, said):
    with pytest.raises(SpecError, match=said):
        RunSpec.from_json(text)


@pytest.mark.parametrize("name", ["model", "method", "task", "gpu"])
def test_a_misspelt_registry_name_gets_a_suggestion(name):
    near = {"model": "lama-3.1-8b", "method": "lorra", "task": "tickets", "gpu": "h100-80g"}[name]
    with pytest.raises(SpecError, match=f"{name}={near}.*did you mean") as refused:
        resolve(RunSpec(**{name: near}))
    assert {"model": "llama-3.1-8b", "method": "lora", "task": "ticket", "gpu": "h100-80gb"}[name] in str(refused.value)


def test_strings_become_the_fields_type():
    spec = RunSpec.from_dict({"rank": "16", "alpha": "32", "gradient_checkpointing": "yes", "model": " gpt2 "})
    assert (spec.rank, spec.alpha, spec.gradient_checkpointing, spec.model) == (16, 32.0, True, "gpt2")
    assert isinstance(spec.rank, int) and isinstance(spec.alpha, float)


@pytest.mark.parametrize(
    "text, n, layers",
    [
        ("all", 3, (0, 1, 2)),
        ("first:2", 4, (0, 1)),
        ("last:2", 4, (2, 3)),
        ("0-2,5,1", 6, (0, 1, 2, 5)),
    ],
)
def test_layers(text, n, layers):
    assert parse_layers(text, n) == layers


@pytest.mark.parametrize("text", ["first:5", "last:0", "4", "0-4", "2-1", "-1", "", "1.5"])
def test_layers_the_model_lacks_are_refused(text):
    with pytest.raises(SpecError, match="layers="):
        parse_layers(text, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_resolve_fills_what_is_read_and_empties_the_rest(method, machine):
    spec = resolve(RunSpec(method=method), machine)
    read = METHODS[method].settings
    for name in SETTINGS:
        value = getattr(spec, name)
        if name in METHOD_SETTINGS:
            assert (name not in spec.unread) == (name in read) and (name in read or not value), name
        elif name == "double_quantization":
            assert value == (spec.quantization == "nf4")
        elif name == "training_rows":
            assert not value  # all that the task has
        elif name == "gpu":
            assert value == (machine.gpu or "")
        else:
            assert value is not None, name
    assert resolve(spec, machine) == spec


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_a_gpu_trains_on_more_rows_unless_it_is_told_how_many(machine, monkeypatch):
    monkeypatch.setattr(hardware, "here", lambda: machine)
    task = TASKS["ticket"]
    usual, own = resolve_here(RunSpec(gpu="a100-80gb")), resolve_here(RunSpec(batch_size=2))
    assert (usual.steps, usual.batch_size) == (task.on_gpu if machine is GPU else (task.steps, task.batch_size))
    assert (own.steps, own.batch_size) == (task.steps, 2)
    calculated = resolve(RunSpec(gpu="a100-80gb"))  # a link shows the same memory everywhere
    assert (calculated.steps, calculated.batch_size) == (task.steps, task.batch_size)


def test_resolve_keeps_what_was_asked():
    spec = resolve(RunSpec(rank=64, learning_rate=1e-5, steps=3, precision="fp16", quantization="nf4"), CPU)
    assert (spec.rank, spec.alpha, spec.learning_rate, spec.steps, spec.precision) == (64, 128.0, 1e-5, 3, "fp16")
    assert spec.double_quantization is True


def test_defaults_are_the_designs():
    spec = resolve(RunSpec(), CPU).to_dict()
    want = {"model": "smollm2-135m-instruct", "method": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.0, "layers": "all",
            "quantization": "none", "optimizer": "adamw", "accumulation": 1, "gradient_checkpointing": False,
            "attention": "sdpa", "hold_outputs": False, "task": "ticket", "seed": 0, "n_gpus": 1, "sharding": "none",
            "offload": "none"}  # fmt: skip
    assert {k: spec[k] for k in want} == want
    assert RunSpec(**spec).to_dict() == spec


@pytest.mark.parametrize(
    "settings, able, gpu",
    [({}, "bf16", "bf16"), ({"method": "full"}, "fp32", "amp"), ({"method": "qlora"}, "fp32", "bf16"),
     ({"quantization": "int8"}, "fp32", "bf16")],
)  # fmt: skip
def test_automatic_precision(settings, able, gpu):
    """On a CPU, on one that multiplies bf16, on a GPU, and for one that is elsewhere."""
    spec = RunSpec(**settings)
    found = [resolve(spec, m).precision for m in (CPU, Machine("cpu", "a CPU", None, 2, None, True), GPU)]
    assert found == ["fp32", able, gpu] and resolve(spec.but(gpu="h100-80gb"), CPU).precision == gpu


def test_a_mark_that_windows_puts_before_a_file_is_no_matter():
    assert RunSpec.from_json('\ufeff{"rank": 4}') == RunSpec(rank=4)


@pytest.mark.parametrize(
    "settings, steps",
    [({"training_rows": 21}, 4), ({"training_rows": 21, "batch_size": 4}, 4), ({"task": "intent"}, 38)],
)
def test_a_presets_epochs_become_steps(settings, steps):
    """Three epochs at the preset's own batch of 16."""
    assert with_preset(RunSpec(**settings), PRESETS["qlora-7b"]).steps == steps


def test_what_a_run_here_cannot_have_is_set_aside_with_a_reason(monkeypatch):
    monkeypatch.setattr(hardware, "here", lambda: CPU)
    asked = RunSpec(model="llama-3.1-8b", rank=4, n_gpus=4, sharding="zero3", offload="parameters", precision="amp")
    fit, reasons = set_aside(asked, ["gpt2"])
    assert fit == RunSpec(rank=4) and list(reasons) == ["sharding", "offload", "n_gpus", "precision", "model"]
    assert not cannot_run(resolve(fit)) and set_aside(fit) == (fit, {})
    assert aside_said(fit, {}) == "" and "<b>N GPUs 4</b> (training runs with 1 only)" in aside_said(asked, reasons)
    assert "<b>Llama 3.1 8B</b>" in aside_said(asked, reasons)


def test_attention_is_what_the_family_has(config_files):
    """Gemma 2 has no SDPA in transformers: automatic is eager there, and a run that asks for sdpa sets it aside."""
    file = ROOT / "tests/cases/tiny-gemma2.json"
    if seam.has_sdpa(configs.build_meta(json.loads(file.read_text()))):
        pytest.skip("an older transformers has it")
    gemma2 = RunSpec(model=str(file))
    assert resolve(gemma2).attention == "eager" and resolve(RunSpec(model="7B")).attention == "sdpa"
    assert not cannot_run(resolve(RunSpec(model=config_files["llama"], attention="sdpa")))
    fit, reasons = set_aside(gemma2.but(attention="sdpa"))
    assert fit == gemma2 and reasons == {
        "attention": "this model's family has no sdpa in transformers; set it to eager"
    }
