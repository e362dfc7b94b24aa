import json

import pytest
from tiny import CONFIGS, fresh

from peftlab import SpecError
from peftlab.base import architecture
from peftlab.base.models import MODELS

BUILT = [k for k, m in MODELS.items() if m.config is not None and not m.shape_of]


@pytest.mark.parametrize("key", BUILT)
def test_the_kept_shapes_equal_a_fresh_build(key):
    built = architecture.build(MODELS[key].config)
    assert (
        built == architecture.kept()[key] == architecture.from_data(json.loads(json.dumps(architecture.to_data(built))))
    )
    assert built.total_parameters == MODELS[key].total_parameters


def test_shapes_are_kept_once_each():
    assert list(architecture.kept()) == BUILT
    for model in MODELS.values():
        if model.shape_of:
            assert architecture.of(model.key) == architecture.of(model.shape_of)
            assert architecture.of(model.key).total_parameters == model.total_parameters


def test_tiny_shapes():
    a, tied, gpt2 = (architecture.build(CONFIGS[name]) for name in ("llama", "llama-tied", "gpt2"))
    assert a.total_parameters == 195_008 and (a.n_layers, a.hidden_size, a.context) == (3, 64, 256)
    wide = {m.short_name: m.d_out for m in a.modules}  # queries share keys and values
    assert (wide["q_proj"], wide["k_proj"], wide["v_proj"]) == (64, 32, 32)
    head = next(m for m in tied.modules if m.head)
    assert tied.total_parameters == 195_008 - 512 * 64 and head.tied and head.weight == 0 and head.d_out == 512
    fused = next(m for m in gpt2.modules if m.short_name == "c_attn")  # Conv1D stores its weight the other way round
    assert (fused.kind, fused.d_in, fused.d_out, fused.bias) == ("conv1d", 64, 192, 192)
    assert fused.role == "query+key+value"


@pytest.mark.parametrize(
    "name, wanted, found",
    [
        ("llama", "query,value", ["q_proj", "v_proj"]),
        ("llama", "down , up,gate,key", ["down_proj", "up_proj", "gate_proj", "k_proj"]),
        ("llama", "q_proj,query", ["q_proj"]),
        ("gpt2", "query", ["c_attn"]),
        ("gpt2", "c_proj", ["c_proj", "c_proj"]),
        ("gpt2", "mlp.c_proj", ["c_proj"]),
        ("opt", "attention output", ["out_proj"]),
        ("opt", "up,down", ["fc1", "fc2"]),
    ],
)
def test_targets_by_role_and_by_name(name, wanted, found):
    assert [m.short_name for m in architecture.build(CONFIGS[name]).targets(wanted)] == found


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_maps_are_pefts_all_linear_and_have_a_role_and_a_name_of_their_own(name):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    adapted, a = get_peft_model(fresh(name), config), architecture.build(CONFIGS[name])
    pefts = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert {n for m in a.linear() for _, n in m.names()} == pefts
    assert [m.name for m in a.linear() if not m.role and "project" not in m.name] == []
    assert [a.targets(wanted) for wanted in a.target_names()] == [[module] for module in a.linear()]


def test_a_refusal_says_what_there_is():
    llama = architecture.build(CONFIGS["llama"])
    with pytest.raises(SpecError, match="target-modules=qproj.*q_proj, k_proj, v_proj, o_proj"):
        llama.targets("qproj")
    with pytest.raises(SpecError, match="nothing would be trained"):
        llama.targets(",")
    with pytest.raises(SpecError, match="model=7B.*no layers"):
        architecture.of("7B")
    for name in ("x" * 5000, "~nobody-of-that-name/model", "0B", "a\0b", ""):
        with pytest.raises(SpecError, match="model="):
            architecture.of(name)
