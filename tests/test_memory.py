import pytest
from tiny import attached

from peftlab import RunSpec, SpecError, predict
from peftlab.catalog.gpus import GPUS
from peftlab.memory import CONVENTIONS, fits, storage
from peftlab.memory.conventions import NF4_BITS

BILLION = 10**9


@pytest.mark.parametrize(
    "key, weights, gradients, optimizer",
    [("8n", 2, 2, 4), ("12n", 2, 2, 8), ("16n-fp32", 4, 4, 8), ("16n-mixed", 2, 2, 12), ("18n", 2, 4, 12)],
)
def test_each_convention(key, weights, gradients, optimizer):
    report = predict(RunSpec(model="7B", method="full"), key)
    n = 7 * BILLION
    assert (report.weights, report.gradients, report.optimizer) == (weights * n, gradients * n, optimizer * n)
    assert report.states == (weights + gradients + optimizer) * n


def test_there_are_no_other_conventions():
    assert list(CONVENTIONS) == ["8n", "12n", "16n-fp32", "16n-mixed", "18n"]
    with pytest.raises(SpecError, match="convention=12m.*12n"):
        predict(RunSpec(), "12m")


@pytest.mark.parametrize(
    "model, key, states", [("100B", "8n", 800e9), ("270M", "12n", 3.24e9), ("7B", "12n", 84e9), ("70B", "12n", 840e9)]
)
def test_the_lectures_totals(model, key, states):
    assert predict(RunSpec(model=model, method="full"), key).states == states


def test_with_peft_a_frozen_parameter_takes_two_bytes(tiny_model):
    spec = RunSpec(model=str(tiny_model), rank=8)
    report = predict(spec, "12n")
    assert (report.frozen_weights, report.trainable_weights) == (2 * 195_008, 2 * 26_880)
    assert report.states == 2 * 195_008 + 12 * 26_880


@pytest.mark.parametrize("adapter_precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sgd-momentum"])
def test_exact_is_what_the_tensors_take(config_files, adapter_precision, optimizer):
    import torch

    spec = RunSpec(
        model=config_files["llama"], precision="fp32", adapter_precision=adapter_precision, optimizer=optimizer
    )
    model = attached("llama", spec)
    report = predict(spec)
    assert sum(p.nbytes for p in model.parameters()) == report.weights
    assert sum(p.nbytes for p in model.parameters() if not p.requires_grad) == report.frozen_weights
    trained = [p for p in model.parameters() if p.requires_grad]
    used = (
        torch.optim.AdamW(trained)
        if optimizer == "adamw"
        else torch.optim.SGD(trained, momentum=0.9 * (optimizer != "sgd"))
    )
    ids = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=ids, labels=ids).loss.backward()
    used.step()
    assert sum(p.grad.nbytes for p in trained) == report.gradients
    kept = sum(t.nbytes for state in used.state.values() for n, t in state.items() if n != "step" and t is not None)
    assert kept == report.optimizer
    assert report.states == report.weights + report.gradients + kept


def test_exact_full_fine_tuning_in_fp32_is_16n(tiny_model):
    report = predict(RunSpec(model=str(tiny_model), method="full", precision="fp32"))
    assert report.states == 16 * 195_008 and report.frozen_weights == 0


def test_nf4_has_scales():
    assert NF4_BITS[False] == 4.5
    assert NF4_BITS[True] == pytest.approx(4.127, abs=5e-4)


def test_nf4_quantizes_linear_maps_only(tiny_model):
    linear = 3 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 160)
    spec = RunSpec(model=str(tiny_model), precision="bf16", quantization="nf4", double_quantization=False)
    assert predict(spec).frozen_weights == round(linear * 4.5 / 8) + 2 * (195_008 - linear)
    assert predict(spec.but(quantization="int8")).frozen_weights == linear + 2 * (195_008 - linear)
    assert predict(spec, "8n").frozen_weights == 195_008 // 2


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw-8bit", "paged-adamw-8bit"])
def test_an_optimizer_that_is_not_known_is_none_never_zero(optimizer):
    report = predict(RunSpec(model="llama-3.1-8b", optimizer=optimizer))
    assert report.optimizer is None and report.states is None
    assert report.to_dict()["components"]["optimizer"] is None and report.to_dict()["states_bytes"] is None


def test_what_is_not_predicted_is_null():
    data = predict(RunSpec(model="llama-3.1-8b")).to_dict()
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "process_bytes", "timeline"):
        assert data[name] is None
    assert data["components"]["activations"] is None and data["components"]["logits"] is None
    assert data["source"] == "closed-form"


def test_a_bare_count_needs_its_trained_share():
    with pytest.raises(SpecError, match="model=7B.*--trainable-parameters"):
        predict(RunSpec(model="7B"))
    assert predict(RunSpec(model="7B"), "12n", 10**7).states == 2 * 7 * BILLION + 12 * 10**7


def test_fits():
    found = fits(30 * BILLION)
    assert [f.gpu.key for f in found] == list(GPUS)
    for fit in found:
        assert (fit.n_gpus == 1) == (fit.gpu.memory_bytes >= 30 * BILLION)
        assert (fit.n_gpus - 1) * fit.gpu.memory_bytes < 30 * BILLION <= fit.n_gpus * fit.gpu.memory_bytes
    sizes = [f.gpu.memory_bytes for f in found]
    assert sizes == sorted(sizes)


def test_the_designs_gpus_are_there():
    assert {
        "t4",
        "l4",
        "a10g",
        "rtx-4090",
        "l40s",
        "rtx-pro-6000",
        "a100-40gb",
        "a100-80gb",
        "h100-80gb",
        "h200",
        "b200",
    } <= set(GPUS)


def test_storage_is_16_bit():
    disk = storage(predict(RunSpec(model="100B"), "8n", 500_000_000), 50)
    assert (disk.full, disk.adapters, disk.base) == (10 * 10**12, 50 * BILLION, 200 * BILLION)
