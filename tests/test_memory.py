"""The closed form's report: conventions, states against real tensors, and a whole step."""

import json
import statistics

import pytest
from tiny import attached

from peftlab import RunSpec, SpecError, hardware, optimizers, predict, resolve
from peftlab.measured import documents
from peftlab.memory import CONVENTIONS, closed_form
from peftlab.memory.closed_form import RESERVE
from peftlab.memory.report import KINDS
from peftlab.show import memory_figures

BILLION = 10**9


def test_conventions(tiny_model):
    """Bytes for each trained parameter; a frozen one takes two."""
    expected = {"8n": (2, 2, 4), "12n": (2, 2, 8), "16n-fp32": (4, 4, 8), "16n-mixed": (2, 2, 12), "18n": (2, 4, 12)}
    assert list(CONVENTIONS) == list(expected)
    for key, each in expected.items():
        report = predict(resolve(RunSpec(model="7B", method="full")), key)
        assert (report.weights, report.gradients, report.optimizer) == tuple(7 * BILLION * n for n in each)
    report = predict(resolve(RunSpec(model=str(tiny_model), rank=8)), "12n")
    assert (report.frozen_weights, report.trainable_weights) == (2 * 195_008, 2 * 26_880)
    assert report.states == 2 * 195_008 + 12 * 26_880
    with pytest.raises(SpecError, match="convention=12m.*12n"):
        predict(resolve(RunSpec()), "12m")


def after_a_step(family, spec):
    """The model, its trained parameters and their optimizer, once each has taken a step."""
    import torch

    model = attached(family, spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    used = optimizers.find(resolve(spec)).make(trained, 1e-4)
    ids = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=ids, labels=ids).loss.backward()
    used.step()
    return model, trained, used


def states_of(optimizer):
    """Bytes an optimizer keeps for its parameters; bitsandbytes' table of 8-bit values is shared by all of them."""
    import torch

    own = [(n, t) for s in optimizer.state.values() for n, t in s.items() if isinstance(t, torch.Tensor)]
    return sum(t.nbytes for n, t in own if n != "step" and not n.startswith("qmap"))


STATES = [
    ("llama", {"method": "lora", "adapter_precision": precision, "optimizer": name})
    for precision, name in (("bf16", "adamw"), ("fp32", "adamw-8bit"), ("bf16", "adafactor"))
]
STATES += [("llama", {"method": "full", "optimizer": name}) for name in optimizers.OPTIMIZERS]
STATES += [(family, {"method": "full", "optimizer": name}) for family in ("llama-tied", "gpt2", "opt", "gemma3")
           for name in ("adafactor", "adamw-8bit", "paged-adamw-8bit")]  # fmt: skip


@pytest.mark.parametrize("family, settings", STATES, ids=str)
def test_exact_is_what_the_tensors_take(config_files, family, settings):
    """Matrices and vectors, those that bitsandbytes keeps in 8 bits and those that are too small for it."""
    spec = RunSpec(model=config_files[family], precision="fp32", **settings)
    model, trained, used = after_a_step(family, spec)
    report = predict(resolve(spec))
    assert sum(p.nbytes for p in model.parameters()) == report.weights
    assert sum(p.nbytes for p in model.parameters() if not p.requires_grad) == report.frozen_weights
    assert sum(p.grad.nbytes for p in trained) == report.gradients
    scales = sum(-(-p.numel() // 256) * 256 - p.numel() for p in trained)  # the last block may be a part of one
    assert report.optimizer == pytest.approx(states_of(used), abs=2 * 4 * scales / 256 + 1)
    assert report.states == report.weights + report.gradients + report.optimizer


def test_adamw_may_keep_fp32_states(config_files):
    spec = RunSpec(
        model=config_files["llama"], precision="fp32", adapter_precision="bf16", optimizer_precision="fp32", rank=4
    )
    _, trained, used = after_a_step("llama", spec)
    assert predict(resolve(spec)).optimizer == states_of(used) == 8 * sum(p.numel() for p in trained)
    assert predict(resolve(spec.but(optimizer="lion"))).optimizer == 4 * sum(p.numel() for p in trained)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby", "prefix", "ln", "head", "vera", "compacter"])
def test_the_parameters_of_each_method(config_files, method):
    spec = RunSpec(model=config_files["llama"], method=method, precision="fp32", sequence_length=64)
    model, report = attached("llama", spec), predict(resolve(spec))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert (report.trainable_weights, report.gradients, report.optimizer) == (trained, trained, 2 * trained)
    assert sum(p.nbytes for p in model.parameters()) == report.weights


def test_nf4_quantizes_linear_maps_only(tiny_model):
    linear = 3 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 160)
    spec = RunSpec(model=str(tiny_model), precision="bf16", quantization="nf4", double_quantization=False)
    assert predict(resolve(spec)).frozen_weights == round(linear * 4.5 / 8) + 2 * (195_008 - linear)
    assert predict(resolve(spec.but(quantization="int8"))).frozen_weights == linear + 2 * (195_008 - linear)
    double = (4 + 8 / 64 + 32 / (64 * 256)) / 8
    packed = predict(resolve(spec.but(double_quantization=True))).frozen_weights
    assert packed == pytest.approx(linear * double + 2 * (195_008 - linear), abs=1)
    assert predict(resolve(spec), "8n").frozen_weights == 195_008 // 2


EXACT = [RunSpec(model="llama-3.1-8b", rank=16), RunSpec(model="gemma-3-270m", method="full", batch_size=4, sequence_length=512),
         RunSpec(model="mixtral-8x7b", method="ln"), RunSpec(model="gpt2", method="houlsby", gradient_checkpointing=True)]  # fmt: skip


@pytest.mark.parametrize("spec", EXACT, ids=lambda s: s.model)
def test_a_prediction_is_a_whole_step(spec):
    form = closed_form(resolve(spec.but(gpu="h100-80gb")))
    report = form.report()
    assert sum(form.value(line.size) for line in form.lines()) == pytest.approx(report.allocated, abs=64)
    assert report.moments[0].phase == "forward" and report.moments[-1].phase == "optimizer"
    for moment in report.moments:
        weights = moment.bytes["frozen_weights"] + moment.bytes["trainable_weights"]
        assert weights == pytest.approx(report.weights, rel=1e-6)
    assert report.states < report.allocated < report.reserved < report.process == report.reserved + report.context
    after = report.moments[-1]
    assert after.bytes["gradients"] == report.gradients and after.bytes["optimizer"] == report.optimizer
    assert after.bytes["logits"] == 0


def test_what_a_report_says_as_json():
    report = predict(resolve(EXACT[0]))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["peak_allocated_bytes"] == report.allocated and data["process_bytes"] == report.process
    assert data["components"]["weights"] == report.weights and data["source"] == "closed-form"
    assert {k: data["components"][k] for k in KINDS if k in report.peak.bytes} == dict(report.peak.bytes)
    assert [m["bytes"] for m in data["timeline"]] == [m.total for m in report.moments]
    assert all(sum(m[k] for k in KINDS if k in m) == m["bytes"] for m in data["timeline"])
    assert resolve(RunSpec.from_dict(data["spec"])) == report.spec


@pytest.mark.parametrize(
    "spec, convention",
    [(RunSpec(model="llama-3.1-8b"), "12n"), (RunSpec(model="7B", method="full"), "exact"), (RunSpec(model="t5-base"), "exact")],
    ids=lambda v: v if isinstance(v, str) else v.model,
)  # fmt: skip
def test_what_is_not_predicted_is_null(spec, convention):
    report = predict(resolve(spec), convention)
    assert report.moments == () and report.peak is report.allocated is report.reserved is report.process is None
    assert report.needed == report.states > 0
    data = report.to_dict()
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "process_bytes", "timeline"):
        assert data[name] is None
    assert data["components"]["activations"] is None and data["components"]["logits"] is None


def test_the_closed_form_refuses_what_has_no_step():
    for model in ("bert-base", "t5-base"):
        with pytest.raises(SpecError, match=f"model={model}: only models that write text"):
            closed_form(resolve(RunSpec(model=model, method="full")))
    with pytest.raises(SpecError, match="model=7B"):
        closed_form(resolve(RunSpec(model="7B")))


def test_a_bare_count_needs_its_trained_share():
    with pytest.raises(SpecError, match="model=7B.*--trainable-parameters"):
        predict(resolve(RunSpec(model="7B")))
    assert predict(resolve(RunSpec(model="7B")), "12n", 10**7).states == 2 * 7 * BILLION + 12 * 10**7
    with pytest.raises(SpecError, match="trainable-parameters=1000000: 1K parameters has 1000"):
        predict(resolve(RunSpec(model="1K", method="lora")), "exact", 10**6)
    with pytest.raises(SpecError, match="optimizer=adafactor.*choose adamw"):
        predict(resolve(RunSpec(model="7B", method="full", optimizer="adafactor")))


def test_only_large_states_are_paged():
    small = predict(resolve(RunSpec(model="smollm2-135m", rank=8, optimizer="paged-adamw-8bit")))
    assert small.outside == 0 and small.optimizer > 0
    full = predict(resolve(RunSpec(model="smollm2-135m", method="full", optimizer="paged-adamw-8bit")))
    assert 0.99 * 2 * 134_515_008 < full.outside <= 2 * 134_515_008


def test_what_is_added_to_allocated_is_measured(monkeypatch):
    rows = [row["measured"] for document in documents("memory") for row in document["rows"] if "measured" in row]
    reserve = statistics.median(row["peak_reserved_bytes"] / row["peak_allocated_bytes"] for row in rows)
    assert round(reserve, 2) == RESERVE
    monkeypatch.setattr(hardware, "here", lambda: hardware.Machine("cpu", "a CPU", None, 2, None))
    hopper, *others = (
        predict(resolve(RunSpec(model="gpt2", precision="fp32", gpu=g))) for g in ("h100-80gb", "t4", None)
    )
    alone = [row["process_bytes"] - row["peak_reserved_bytes"] for row in rows if row["process_bytes"]]
    assert statistics.median(alone) == pytest.approx(hopper.context, rel=0.01)
    for other in others:
        assert other.context == 500 * 2**20 and other.allocated < hopper.allocated  # cuBLAS keeps more on Hopper


def test_what_a_method_leaves_frozen_is_said():
    """Beside what the method trains: routers, experts, and maps that peft refuses."""
    assert "stays frozen" in memory_figures.left(predict(resolve(RunSpec(model="olmoe-1b-7b", method="lora"))))
    assert memory_figures.left(predict(resolve(RunSpec(model="smollm2-135m", method="lora")))) == ""
    assert memory_figures.left(predict(resolve(RunSpec(model="7B", method="full")))) == ""
