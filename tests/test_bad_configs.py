"""A config.json that makes no model is refused in words, fast, whatever stands in it."""

import json
import re
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pasting import packed, pasted, refused
from tiny import CONFIGS, GPT2, LLAMA

from peftlab import SpecError
from peftlab.base import architecture, configs, models
from peftlab.bench import families


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The families' code is imported, so that what is timed is the work itself."""
    for config in CONFIGS.values():
        architecture.build(config)


NO_CONFIG = {
    "not JSON": ["", "{", "[" * 60_000, '{"hidden_size": ' + "9" * 5000 + "}"],
    "an object, not a": ["[1]", "null"],
    "model_type is missing": ["{}", '{"model_type": 5}', '{"model_type": ""}'],
    "at most 64 kB": [" " * 70_000],
    "no language model of it": ['{"model_type": "vit"}', '{"model_type": "musicgen"}'],
    "vocab_size is missing": ['{"model_type": "esm", "hidden_size": 64, "num_hidden_layers": 2}'],
    "hidden_size is missing": [
        '{"model_type": "mamba"}',
        '{"model_type": "gpt2", "n_layer": 2}',
        '{"model_type": "encoder-decoder"}',
        '{"model_type": "blt"}',
    ],
}


@pytest.mark.parametrize("said", NO_CONFIG)
def test_a_text_that_is_no_config(said):
    for text in NO_CONFIG[said]:
        assert said in refused(models.from_config, text)


MOST = {
    "num_attention_heads": 10**5, "num_hidden_layers": 10**3, "vocab_size": 10**7, "num_labels": 10**5, "hidden_size": 10**8,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "lama"}, "model_type=lama: .* llama"),
        ({"model_type": "x\ny\ud800" * 50}, "model_type=x y"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}, "never runs"),
        ({"model_type": "vit"}, "no language model of it"),
        ({"model_type": "gemma3", "text_config": 5}, "text_config is missing"),
        ({"model_type": "llava", "text_config": {"hidden_size": 64}}, "model_type=missing"),
        ({"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 64}}, "text model of qwen2_5_vl"),
        ({"num_attention_heads": 5}, "multiple of the number of attention heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: .*try 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"num_key_value_heads": [2, 2, 2]}, "num_key_value_heads"),
        *[({n: v}, re.escape(f"{n}={v!r}: ")) for n in configs.NEEDED for v in (0, -1, "64", True, None, 2.5, [64], {"a": 1})],
        ({"num_key_value_heads": "2"}, "expected int"),
        ({"intermediate_size": -1}, "intermediate_size=-1: at least 0"),
        ({"intermediate_size": 1.5}, "intermediate_size"),
        *[({n: most + 1}, f"{n}={most + 1}: .*at most {most:,} ") for n, most in MOST.items()],
        ({"num_hidden_layers": 10**30}, "num_hidden_layers=10*: "),
        ({"hidden_size": 2**20, "intermediate_size": 10**8, "num_attention_heads": 4}, "953,615,085,731,840 parameters"),
        ({"model_type": "mixtral", "num_local_experts": 100_001}, "num_local_experts=100001: .*at most 100,000"),
        ({"hidden_act": "nosuch"}, "KeyError"),
        ({"rope_scaling": {"rope_type": "nosuch", "factor": 2.0}}, "nosuch"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers"),
        ({"deep": [[[[[[[[[[1]]]]]]]]]]}, "nested"),
        ({"get_text_config\n": 10**12}, "get_text_config=1000000000000"),
        ({"model_type": "nllb-moe", "num_experts": 9999, "encoder_layers": 999, "encoder_sparse_step": 1}, "5 s|much memory"),
        ({f"note_{i}": zlib.crc32(b"%d" % i) % 10**8 for i in range(1500)}, "a link holds 8,192"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_model(changes, said, monkeypatch):
    monkeypatch.setattr(configs, "BUILD_SECONDS", 1.0)
    message = refused(pasted, LLAMA, **changes)
    assert re.search(said, message), message


def test_a_familys_own_names_are_checked_too():
    assert "sliding_window=" in refused(pasted, GPT2, sliding_window=[None])
    for name in ("n_embd", "n_layer", "n_head", "hidden_size"):
        assert f"{name}=0: " in refused(pasted, GPT2, **{name: 0})
    assert "head_dim='0': " in refused(pasted, GPT2, head_dim="0") and pasted(GPT2, head_dim=None) == pasted(GPT2)


def test_how_wide_a_head_is_the_family_says():
    """GLM-4.5 has 96 heads of 5,120, and GPT-2 refuses what does not divide."""
    glm = families.tiny("glm4_moe")
    assert pasted(glm, num_attention_heads=6).config["num_attention_heads"] == 6
    assert "must be divisible by num_heads" in refused(pasted, GPT2, n_head=7)


def test_nothing_is_built_before_the_numbers_are_checked(monkeypatch):
    monkeypatch.setattr(configs, "_bounded", lambda: pytest.fail("a model is being built"))
    for changes in ({"n_layer": 10**6}, {"n_head": 0}, {"vocab_size": 0}, {"n_embd": "64"}, {"model_type": "vit"}):
        refused(architecture.build, {**GPT2, **changes})


def test_a_bare_count_has_limits():
    for count in ("1000000T", "101T", "9" * 400 + "B", "0B", "0.0001K"):
        assert "100T" in refused(models.find, count)
    assert models.find("100T").total_parameters == configs.MOST_PARAMETERS
    assert models.find("0.001K").total_parameters == 1


def test_a_key_that_is_damaged_or_hostile():
    bomb = packed(" " * 6_000_000)
    assert len(bomb) < models.KEY_LENGTH
    damaged = [
        "config:",
        "config:!",
        "config:é",
        "config:abcd",
        "config:" + "A" * 100_000,
        pasted(LLAMA).key[:-8],
        bomb,
    ]
    hostile = [[1], {}, {**LLAMA, "num_hidden_layers": 10**9}, {**LLAMA, "model_type": "mine"}]
    for key in (*damaged, *(packed(json.dumps(config)) for config in hostile)):
        assert len(refused(models.find, key)) < 300


def test_a_file_runs_through_the_same_checks_and_may_be_large_but_not_huge(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**LLAMA, "vocab_size": 0}))
    assert re.search("not a model's config.json .*vocab_size=0", refused(models.find, str(tmp_path)))
    file.write_text(json.dumps({**LLAMA, "id2label": {str(i): f"LABEL_{i}" for i in range(5000)}}))
    assert architecture.of(str(tmp_path)) == architecture.of(str(file)) == architecture.build(LLAMA)
    file.write_bytes(b" " * 2_000_000)
    assert "1 MB" in refused(models.find, str(tmp_path))


VALUES = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([101, 1001, 10**5, 10**7, 10**9, 2**63, 10**30]),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers(0, 4),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
)
FIELDS = sorted({name for config in CONFIGS.values() for name in config} | {
    "head_dim", "hidden_act", "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "text_config", "attention_bias",
    "sliding_window", "num_experts", "max_window_layers", "n_inner", "attention_dropout", "id2label", "per_layer_config",
    "_name_or_path", "attribute_map", "sub_configs", "__class__", "__dict__", "self", "name",
})  # fmt: skip


@settings(max_examples=200, deadline=2000, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(CONFIGS)), st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
def test_any_change_of_a_config_makes_a_model_or_is_refused(family, changes):
    try:
        entry = pasted(CONFIGS[family], **changes)
    except SpecError as refusal:
        assert "\n" not in str(refusal) and str(refusal).isprintable()
    else:
        assert architecture.of(entry.key).total_parameters > 0
        assert models.find(entry.key) == entry
