import pytest
from tiny import CONFIGS, fresh

from peftlab import SpecError
from peftlab.base import architecture
from peftlab.base.models import MODELS


@pytest.mark.parametrize("key", [k for k, m in MODELS.items() if m.config is not None and not m.shape_of])
def test_the_kept_shapes_equal_a_fresh_build(key):
    built = architecture.build(MODELS[key].config)
    assert architecture.to_data(built) == architecture.to_data(architecture.kept()[key])
    assert built.total_parameters == MODELS[key].total_parameters


def test_entries_that_share_shapes_have_them():
    for model in MODELS.values():
        if model.shape_of:
            assert architecture.of(model.key) == architecture.of(model.shape_of)
            assert architecture.of(model.key).total_parameters == model.total_parameters


def test_nothing_is_kept_that_the_catalogue_lacks():
    assert set(architecture.kept()) == {k for k, m in MODELS.items() if m.config is not None and not m.shape_of}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_data_and_back(name):
    built = architecture.build(CONFIGS[name])
    assert architecture.from_data(architecture.to_data(built)) == built


@pytest.mark.parametrize("name", CONFIGS)
def test_the_total_is_the_models_own(name):
    assert architecture.build(CONFIGS[name]).total_parameters == sum(p.numel() for p in fresh(name).parameters())


def test_tiny_llama():
    a = architecture.build(CONFIGS["llama"])
    assert a.total_parameters == 195_008 and (a.n_layers, a.hidden_size, a.context) == (3, 64, 256)
    assert architecture.build(CONFIGS["llama-tied"]).total_parameters == 195_008 - 512 * 64


def test_a_tied_head_is_counted_once():
    head = next(m for m in architecture.build(CONFIGS["llama-tied"]).modules if m.head)
    assert head.tied and head.weight == 0 and head.d_out == 512


def test_conv1d_is_stored_the_other_way_round():
    fused = next(m for m in architecture.build(CONFIGS["gpt2"]).modules if m.short_name == "c_attn")
    assert (fused.kind, fused.d_in, fused.d_out, fused.bias) == ("conv1d", 64, 192, 192)
    assert fused.role == "query+key+value"


def test_grouped_query_attention_has_thin_keys_and_values():
    by_name = {m.short_name: m for m in architecture.build(CONFIGS["llama"]).modules}
    assert (by_name["q_proj"].d_out, by_name["k_proj"].d_out, by_name["v_proj"].d_out) == (64, 32, 32)


@pytest.mark.parametrize(
    "name, wanted, found",
    [
        ("llama", "q_proj,v_proj", ["q_proj", "v_proj"]),
        ("llama", "query,value", ["q_proj", "v_proj"]),
        ("llama", "mlp.down_proj", ["down_proj"]),
        ("llama", "down , up", ["down_proj", "up_proj"]),
        ("llama", "q_proj,query", ["q_proj"]),
        ("gpt2", "query", ["c_attn"]),
        ("gpt2", "c_proj", ["c_proj", "c_proj"]),
        ("gpt2", "mlp.c_proj", ["c_proj"]),
        ("opt", "attention output", ["out_proj"]),
        ("opt", "up,down", ["fc1", "fc2"]),
        ("gemma3", "gate", ["gate_proj"]),
        ("qwen2", "key", ["k_proj"]),
    ],
)
def test_targets_by_role_and_by_name(name, wanted, found):
    assert [m.short_name for m in architecture.build(CONFIGS[name]).targets(wanted)] == found


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_is_pefts_all_linear(name):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        fresh(name), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    )
    pefts = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    ours = {n for m in architecture.build(CONFIGS[name]).linear() for _, n in m.names()}
    assert ours == pefts


@pytest.mark.parametrize("name", CONFIGS)
def test_each_target_name_finds_its_module_alone(name):
    a = architecture.build(CONFIGS[name])
    for wanted, module in zip(a.target_names(), a.linear(), strict=True):
        assert a.targets(wanted) == [module]


def test_every_linear_layer_of_the_tiny_models_has_a_role():
    for name, config in CONFIGS.items():
        assert [m.name for m in architecture.build(config).linear() if not m.role and "project" not in m.name] == [], (
            name
        )


def test_an_unknown_module_lists_what_there_is():
    with pytest.raises(SpecError, match="target-modules=qproj.*q_proj, k_proj, v_proj, o_proj"):
        architecture.build(CONFIGS["llama"]).targets("qproj")
    with pytest.raises(SpecError, match="nothing would be trained"):
        architecture.build(CONFIGS["llama"]).targets(",")


def test_a_bare_count_has_no_layers():
    with pytest.raises(SpecError, match="model=7B.*no layers"):
        architecture.of("7B")


def test_a_config_nobody_knows_is_refused(tmp_path):
    with pytest.raises(SpecError, match="model_type=nonsense"):
        architecture.build({"model_type": "nonsense"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SpecError, match="not a model's config.json"):
        architecture.of(str(tmp_path))


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/model", "0B", "a\0b", ""])
def test_a_hopeless_model_name_is_refused_in_words(name):
    with pytest.raises(SpecError):
        architecture.of(name)


def test_a_folder_and_its_config_are_the_same_model(tiny_model):
    assert architecture.of(str(tiny_model)) == architecture.of(str(tiny_model / "config.json"))
