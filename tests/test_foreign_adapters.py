"""Adapters that peft made elsewhere: they say what they say there, and the shared base keeps every byte and its own answer."""

import json

import peft
import pytest
import torch
from tiny import digest, logits, moved

from peftlab import AdapterError, RunSpec, SpecError, adapters, compare, resolve
from peftlab.base import weights
from peftlab.run.generate import Decoding

FAMILIES = ("gpt2", "qwen2")
"""With biases everywhere and a tied head; with biases in some maps and a head of its own."""
QUERY_VALUE = {"gpt2": ["c_attn"], "qwen2": ["q_proj", "v_proj"], "opt": ["q_proj", "v_proj"]}
NORMS = {"gpt2": ["ln_1"], "qwen2": ["input_layernorm"]}
KINDS = {
    "lora": lambda t, f: peft.LoraConfig(r=4, target_modules=t),
    "lora, bias of adapted maps": lambda t, f: peft.LoraConfig(r=4, target_modules=t, bias="lora_only"),
    "lora, every bias": lambda t, f: peft.LoraConfig(r=4, target_modules=t, bias="all"),
    "lora with a bias of its own": lambda t, f: peft.LoraConfig(r=4, target_modules=t, lora_bias=True),
    "rslora": lambda t, f: peft.LoraConfig(r=4, target_modules=t, use_rslora=True),
    "dora": lambda t, f: peft.LoraConfig(r=4, target_modules=t, use_dora=True),
    "pissa": lambda t, f: peft.LoraConfig(r=4, target_modules=t, init_lora_weights="pissa"),
    "lora and a whole module": lambda t, f: peft.LoraConfig(r=4, target_modules=t, modules_to_save=["lm_head"]),
    "lora and some tokens": lambda t, f: peft.LoraConfig(r=4, target_modules=t, trainable_token_indices=[5, 7]),
    "adalora": lambda t, f: peft.AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=t),
    "ia3": lambda t, f: peft.IA3Config(target_modules=t, feedforward_modules=[]),
    "vera": lambda t, f: peft.VeraConfig(r=8, target_modules=t[:1]),
    "loha": lambda t, f: peft.LoHaConfig(r=4, target_modules=t),
    "lokr": lambda t, f: peft.LoKrConfig(r=4, target_modules=t),
    "oft": lambda t, f: peft.OFTConfig(oft_block_size=16, r=0, target_modules=t),
    "ln": lambda t, f: peft.LNTuningConfig(target_modules=NORMS[f]),
    "prompt": lambda t, f: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda t, f: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda t, f: peft.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=16, task_type="CAUSAL_LM"
    ),
}
UNSUITED = {("oft", "gpt2"), ("vera", "gpt2"), ("loha", "gpt2"), ("lokr", "gpt2")}
"""Which peft does not have for Conv1D."""


def made(kind, family, folder, out):
    """An adapter as peft saves it, every trained number moved; and what plain peft says with it, loaded afresh."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, KINDS[kind](QUERY_VALUE[family], family))
    moved(model).save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder)}))
    afresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return said(peft.PeftModel.from_pretrained(afresh, out)), [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def said(model):
    return logits(model).cpu()


@pytest.mark.parametrize("kind, family", [(k, f) for k in KINDS for f in FAMILIES if (k, f) not in UNSUITED])
def test_it_says_what_it_says_in_peft_and_the_base_is_untouched(kind, family, families, tmp_path):
    wanted, _ = made(kind, family, families[family], tmp_path)
    base = weights.load(resolve(RunSpec(model=families[family], precision="fp32")))
    before, own = digest(base.model), said(base.model)
    model = adapters.apply(base, adapters.read(tmp_path))
    assert digest(base.model) == before and said(base.model).equal(own), "loading it changed the base"
    ours = said(model)
    assert ours.allclose(wanted[:, -ours.shape[1] :], atol=2e-5) and not ours.allclose(own, atol=1e-4)
    assert digest(base.model) == before and said(base.model).equal(own), "using it changed the base"
    try:
        merged = adapters.merge(base, adapters.read(tmp_path))
    except (SpecError, AdapterError):
        pass
    else:
        assert said(merged).allclose(ours, atol=1e-3)
    del model
    assert digest(base.model) == before and said(base.model).equal(own), "it left something behind"


@pytest.mark.parametrize(
    "kind, family", [("lora, every bias", "gpt2"), ("lora, bias of adapted maps", "qwen2"), ("lora, every bias", "opt")]
)
def test_biases_that_an_adapter_brings_are_its_own(kind, family, families, tmp_path):
    """Beside it, and after it, the base answers as itself: the first row of the cases."""
    _, trained = made(kind, family, families[family], tmp_path / "biased")
    assert any(name.endswith("bias") for name in trained)
    made("lora", family, families[family], tmp_path / "plain")
    folders = [tmp_path / name for name in ("plain", "biased", "plain")]
    reports = [compare.on_prompt([adapters.read(f)], "what colour", Decoding(8)) for f in folders]
    alone, (base, biased), after = ([reply.text for reply in r.exchanges[0].replies] for r in reports)
    assert base == alone[0] == after[0] and biased != base
