"""Counts against FACTS.md, against peft, and against the parameters that really require gradients."""

import pytest
from tiny import CONFIGS, attached, fresh

from peftlab import RunSpec, SpecError, count


@pytest.mark.parametrize(
    "settings, trainable",
    [
        ({"rank": 8, "target_modules": "q_proj,v_proj"}, 5_376),
        ({"rank": 8}, 26_880),
        ({"method": "last-block"}, 43_136),
        ({"method": "full"}, 195_008),
    ],
)
def test_tiny_llama(tiny_model, settings, trainable):
    report = count(RunSpec(model=str(tiny_model), **settings))
    assert report.trainable_parameters == trainable and report.total_parameters == 195_008
    assert report.trainable_percent == pytest.approx(100 * trainable / 195_008)


@pytest.mark.parametrize(
    "model, rank, targets, trainable",
    [
        ("llama-2-7b", 8, "q_proj,v_proj", 4_194_304),
        ("llama-2-7b", 64, "q_proj,v_proj", 33_554_432),
        ("llama-2-70b", 64, "q_proj,v_proj", 131_072_000),
        ("gemma-3-270m", 8, "q_proj,v_proj", 368_640),
        ("gemma-3-270m", 16, "query,value", 737_280),
        ("gemma-3-270m", 64, "q_proj,v_proj", 2_949_120),
        ("gemma-3-270m", 8, "all-linear", 1_898_496),
        ("gemma-3-270m", 64, "all-linear", 15_187_968),
        ("llama-3.2-3b", 32, "q_proj,v_proj", 9_175_040),
    ],
)
def test_published_models(model, rank, targets, trainable):
    assert count(RunSpec(model=model, rank=rank, target_modules=targets)).trainable_parameters == trainable


LORA = [
    {"rank": 1}, {"rank": 8}, {"rank": 13}, {"rank": 4, "target_modules": "query,value"}, {"rank": 4, "target_modules": "down"},
    {"rank": 4, "layers": "last:1"}, {"rank": 4, "layers": "0,2", "target_modules": "up,down"},
]  # fmt: skip


@pytest.mark.parametrize("settings", LORA, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_lora_equals_peft(name, settings, config_files):
    spec = RunSpec(model=config_files[name], **settings)
    adapted = attached(name, spec)
    trainable = adapted.get_nb_trainable_parameters()[0]
    assert count(spec).trainable_parameters == trainable
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("method", ["full", "last-block", "bitfit"])
@pytest.mark.parametrize("name", CONFIGS)
def test_in_place_methods_equal_the_model(name, method, config_files):
    spec = RunSpec(model=config_files[name], method=method)
    if method == "bitfit" and name in ("llama", "llama-tied", "gemma3"):
        with pytest.raises(SpecError, match="no bias"):
            count(spec)
        return
    adapted = attached(name, spec)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert count(spec).trainable_parameters == trained > 0


def test_bitfit_is_the_sum_of_the_biases(config_files):
    biases = sum(p.numel() for n, p in fresh("gpt2").named_parameters() if n.endswith("bias"))
    assert count(RunSpec(model=config_files["gpt2"], method="bitfit")).trainable_parameters == biases


def test_full_counts_everything_once(config_files):
    for file in config_files.values():
        report = count(RunSpec(model=file, method="full"))
        assert report.trainable_parameters == report.total_parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_the_modules_add_up(name, config_files):
    report = count(RunSpec(model=config_files[name], rank=2, layers="first:2"))
    assert sum(m.trainable for m in report.modules) == report.trainable_parameters
    assert sum(trainable for _, trainable in report.names) == report.trainable_parameters
    assert sum(m.parameters for m in report.modules) == report.total_parameters
    assert all(".2." not in name for name, _ in report.names)


def test_module_names_are_the_models(config_files):
    for name, file in config_files.items():
        known = dict(fresh(name).named_modules())
        for entry in count(RunSpec(model=file, rank=2)).to_dict()["modules"]:
            assert tuple(known[entry["name"]].weight.shape) == tuple(entry["shape"]), entry


def test_adapter_bytes_follow_the_precision(tiny_model):
    assert count(RunSpec(model=str(tiny_model))).adapter_bytes == 4 * 26_880
    assert count(RunSpec(model=str(tiny_model), adapter_precision="bf16")).adapter_bytes == 2 * 26_880
    assert count(RunSpec(model=str(tiny_model), method="full", precision="bf16")).adapter_bytes == 2 * 195_008


def test_a_bare_count_cannot_be_counted():
    with pytest.raises(SpecError, match="7B.*no layers"):
        count(RunSpec(model="7B"))
