"""The arithmetic of the comparison on made-up calculators, and the real ones, where installed, against sums by hand."""

import json

import pytest

from peftlab import RunSpec, resolve
from peftlab.bench import calculators
from peftlab.bench.calculators import Calculator, NotCovered, compare, markdown

MIB = 2**20
PARAMETERS = 134_515_008  # of SmolLM2-135M


def row(method="lora", measured=1000, model="smollm2-135m", **settings):
    spec = resolve(RunSpec(model=model, method=method, gpu="h100-80gb", **{"precision": "bf16", **settings}))
    bytes_ = {"peak_allocated_bytes": measured, "peak_reserved_bytes": 2 * measured, "process_bytes": None}
    predicted = {"peak_allocated_bytes": 900, "peak_reserved_bytes": 1800}
    return {"spec": spec.to_dict(), "measured": bytes_ | {"after_bytes": measured}, "predicted": predicted}


def fake(ask, *quantities, module="json"):
    return Calculator("fake", module, "pytest", quantities, ask)


def lines(comparison):
    return {(line["quantity"], line["group"]): line for line in comparison["table"]}


def test_a_table_by_hand():
    def ask(row):
        if row["spec"]["method"] == "ia3":
            raise NotCovered("it has never heard of IA³")
        return {"peak allocated": 1100, "peak reserved": 1100, "process": 5}

    rows = [row("full", 1000), row("lora", 2200), row("vera", 1000), row("ia3"), row("qlora"), row(quantization="int8")]
    failed = {"spec": rows[0]["spec"], "error": "out of memory"}
    document = {"hardware": "a GPU", "rows": [rows[0], failed, *rows[1:]]}
    found = compare(document, [fake(ask, "peak allocated", "peak reserved", "process")])
    table = lines(found)
    groups = [table["peak allocated", group] for group in calculators.GROUPS]
    assert [(group["covered"], group["rows"]) for group in groups] == [(1, 1), (2, 2), (2, 2), (0, 1), (5, 6)]
    lora, whole = table["peak allocated", "LoRA-like"], table["peak allocated", "all"]
    assert (lora["worst_error"], lora["mean_absolute_error"], lora["bias"]) == pytest.approx((-0.5, 0.3, -0.2))
    assert (whole["worst_error"], whole["mean_absolute_error"], whole["bias"]) == pytest.approx((-0.5, 0.18, -0.02))
    assert table["peak reserved", "full"]["bias"] == pytest.approx(1100 / 2000 - 1)
    answers = [kept["answers"]["fake"] for kept in found["rows"]]
    assert answers[3] == {"why_not": "it has never heard of IA³"}
    assert answers[1]["peak allocated"] == {"predicted_bytes": 1100, "measured_bytes": 2200, "error": -0.5}
    assert answers[1]["process"] == {"predicted_bytes": 5, "measured_bytes": None, "error": None}
    unmeasured = [table["process", "all"][name] for name in ("covered", "mean_absolute_error", "worst_error", "bias")]
    assert unmeasured == [0, None, None, None]
    assert json.loads(json.dumps(found)) == found and found["source"]["hardware"] == "a GPU"
    text = markdown(found)
    assert "| peak allocated | LoRA-like | 2 of 2 | 30.0% | -50.0% | -20.0% |" in text
    assert "other methods" not in text and pytest.__version__ in text


def test_a_calculator_that_is_not_installed_is_left_out():
    found = compare({"rows": [row()]}, [fake(lambda row: {}, module="no_such_calculator")])
    assert not found["table"] and found["rows"][0]["answers"] == {}
    assert "fake is left out: No module named 'no_such_calculator'." in markdown(found)


def test_our_own_line_and_model_states():
    """Full bf16: 2 bytes of weights and 4 of Adam's states stay, with the workspace; 2 of gradients are added."""
    ours = next(c for c in calculators.CALCULATORS if c.name == "peftlab")
    assert ours.ask(row()) == {"peak allocated": 900, "peak reserved": 1800}
    assert calculators.measured(row("full", 6 * PARAMETERS + 64 * MIB), "model states") == 8 * PARAMETERS


def test_formulas_of_mixed_precision_adam_cover_nothing_else():
    for settings in ({}, {"method": "full", "optimizer": "sgd"}, {"method": "full", "precision": "fp32"}):
        with pytest.raises(NotCovered, match="alone"):
            calculators._full_adam(row(**settings), "amp")


def test_accelerate():
    """4 × the fp32 weights, or 2 × them in 16 bits; the buffers of the rotary embedding are counted with the weights."""
    pytest.importorskip("accelerate")
    for precision, each in (("fp32", 16), ("amp", 8)):
        found = calculators._accelerate(row("full", precision=precision))
        assert found["model states"] == found["peak allocated"] == pytest.approx(each * PARAMETERS, rel=1e-5)


def test_deepspeed():
    pytest.importorskip("deepspeed")
    amp = row("full", precision="amp")
    assert calculators._zero2(amp) == {"model states": 20 * PARAMETERS}
    assert calculators._zero3(amp) == {"model states": 18 * PARAMETERS + 4 * 49152 * 576}


def test_fitcheck():
    """Its SPEC's formulas for SmolLM2-135M, 4 × 512 tokens, rank 8 on every linear map."""
    pytest.importorskip("fitcheck")
    weights, trained = 2 * PARAMETERS, 8 * 30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    layer = 2 * 2048 * (12 * 576 + 3 * 576 + 192 + 3 * 1536)
    activations = 30 * layer + 3.5 * 4 * 2048 * 49152
    found = calculators._fitcheck(row(batch_size=4, sequence_length=512, rank=8))
    tensors = weights + (4 + 4 + 8) * trained + activations
    assert found["peak allocated"] == pytest.approx(tensors, abs=4)
    assert found["peak reserved"] == pytest.approx(tensors + 0.05 * (weights + activations), abs=4)
    assert found["process"] - found["peak reserved"] == 500 * MIB
    # weights, gradients, two states, and the fp32 master copy that it always adds
    for precision, each in (("bf16", 2 + 2 + 4 + 4), ("amp", 2 + 2 + 8 + 4)):
        full = calculators._fitcheck(row("full", batch_size=4, sequence_length=512, precision=precision))
        assert full["peak allocated"] == pytest.approx(each * PARAMETERS + activations, abs=4)


@pytest.mark.parametrize(
    "settings, why_not",
    [
        ({"method": "dora"}, "method=dora"),
        ({"precision": "amp"}, "precision=amp"),
        ({"adapter_precision": "bf16"}, "adapters are fp32"),
        ({"layers": "first:4"}, "trained parameters"),
        ({"model": "gpt2"}, "hidden_size"),
        ({"model": "opt-350m"}, "disagreement"),
    ],
)
def test_what_fitcheck_does_not_cover(settings, why_not):
    pytest.importorskip("fitcheck")
    with pytest.raises(NotCovered, match=why_not):
        calculators._fitcheck(row(**settings))
