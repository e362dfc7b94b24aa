"""Counts that public configs, notebooks and peft itself give for kinds of models: one encoder's, two stacks', experts', …"""

import json

import pytest
from tiny import ROOT

from peftlab import RunSpec, SpecError, count, resolve
from peftlab.base import architecture

BLOOMZ_560M = {
    "architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_embed": 1024, "hidden_size": 1024, "n_layer": 24,
    "num_attention_heads": 16, "vocab_size": 250_880,
}  # fmt: skip
MT0_LARGE = {
    "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5", "d_model": 1024, "d_kv": 64, "d_ff": 2816,
    "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16, "vocab_size": 250_112, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip


def case(name):
    return str(ROOT / f"tests/cases/{name}.json")


def counted(model, method, **settings):
    return count(resolve(RunSpec(model=model, method=method, sequence_length=64, **settings)))


@pytest.mark.parametrize(
    "model, method, settings, trainable",
    [
        ("deepseek-v2-lite", "lora", {"rank": 8}, 179_058_176),
        ("flan-t5-large", "lora", {"rank": 16, "target_modules": "q,v"}, 4_718_592),
        ("flan-t5-large", "prompt", {"virtual_tokens": 20}, 40_960),
        ("bert-base-cased-cls", "lora", {"rank": 8, "target_modules": "query,key"}, 296_450),
        ("gemma-2-2b-cls", "lora", {"rank": 16, "target_modules": "q_proj,v_proj"}, 3_199_488),
        ("gemma-2-2b", "lora", {"rank": 2, "target_modules": "embed_tokens"}, 2 * (256_000 + 2304)),
    ],
)
def test_trained(model, method, settings, trainable):
    assert counted(case(model), method, **settings).trainable_parameters == trainable


@pytest.mark.parametrize(
    "config, method, settings, trainable",
    [(BLOOMZ_560M, "prefix", {"virtual_tokens": 20}, 983_040), (MT0_LARGE, "ia3", {}, 282_624)],
)
def test_published(config, method, settings, trainable, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert counted(str(tmp_path), method, **settings).trainable_parameters == trainable


def test_a_head_of_its_own_that_only_the_weights_would_show():
    """The class ties its head whatever the config says, and unties it as it loads weights that have one."""
    assert counted(case("flan-t5-large"), "lora").total_parameters == 783_150_080


def test_an_encoder_and_a_decoder_have_depths_of_their_own():
    model = case("t5-efficient-base-dl8")
    assert architecture.of(model).depths == {"encoder.block": 12, "decoder.block": 8}
    blocks = {name.partition(".layer.")[0] for name, _ in counted(model, "last-block").names}
    assert blocks == {"encoder.block.11", "decoder.block.7"}
    assert len(counted(model, "lora", layers="first:1", target_modules="q").names) == 3
    with pytest.raises(SpecError, match="layers=0-11: the model has layers 0 to 7"):
        counted(model, "lora", layers="0-11")


def test_what_peft_refuses_is_left_out_and_said():
    report = counted(case("tiny-falcon_h1"), "lora")
    assert not [name for name, _ in report.names if name.endswith("out_proj")]
    assert any("mamba.out_proj stays frozen: peft attaches no LoRA there" in text for text in report.frozen)
    with pytest.raises(SpecError, match="target-modules=out_proj: peft attaches no LoRA there"):
        counted(case("tiny-falcon_h1"), "lora", target_modules="out_proj")


def test_experts_are_found_under_their_old_names():
    model = case("mixtral-ipex")
    named, shape = counted(model, "lora", rank=4, target_modules="w1,w2,w3"), architecture.of(model)
    width = next(m for m in shape.modules if m.role == "down").features[0]
    assert {m.module.short_name for m in named.modules if m.trainable} == {"gate_up_proj", "down_proj"}
    each = 2 * 4 * (shape.hidden_size + 2 * width) + 4 * (shape.hidden_size + width)
    assert named.trainable_parameters == shape.n_layers * shape.facts.experts * each
    with pytest.raises(SpecError, match="target-modules=w1: .* w1 and w3 in one parameter.*; add w3"):
        counted(model, "lora", target_modules="w1")
    for method, settings in (("dora", {}), ("pissa", {}), ("lora", {"dropout": 0.1})):
        with pytest.raises(SpecError, match="one parameter.*; .*q_proj,k_proj,v_proj,o_proj"):
            counted(model, method, **settings)
    frozen = " ".join(counted(model, "adalora").frozen)
    assert "The experts stay frozen: they are one parameter, mlp.experts.gate_up_proj, mlp.experts.down_proj" in frozen
    assert "The experts stay 16-bit" in " ".join(counted(model, "qlora").frozen)
