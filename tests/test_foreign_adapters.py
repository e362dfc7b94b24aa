"""Adapters that peft made elsewhere: they say what they say there, and the shared base keeps every byte and its own answer."""

import json
from functools import cache

import peft
import pytest
import torch
from tiny import QWEN2, digest, make_model, moved

from peftlab import AdapterError, RunSpec, SpecError, adapters, compare, resolve
from peftlab.base import weights
from peftlab.run.generate import Decoding

QUERY_VALUE = {"gpt2": ["c_attn"], "qwen2": ["q_proj", "v_proj"], "opt": ["q_proj", "v_proj"]}
NORMS = {"gpt2": ["ln_1"], "qwen2": ["input_layernorm"]}


def lora(**settings):
    """A maker of LoRA configs on the maps t of a family."""
    return lambda t, family: peft.LoraConfig(**{"r": 4, "target_modules": t} | settings)


def like(kind, **settings):
    """The same of another kind of adapter."""
    return lambda t, family: getattr(peft, kind)(**{"target_modules": t} | settings)


VIRTUAL = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
KINDS = {
    "lora": lora(),
    "lora, bias of adapted maps": lora(bias="lora_only"),
    "lora, every bias": lora(bias="all"),
    "lora with a bias of its own": lora(lora_bias=True),
    "rslora": lora(use_rslora=True),
    "lora of several ranks": lora(rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 3}),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "lora, orthogonal": lora(init_lora_weights="orthogonal"),
    "lora and the head": lora(modules_to_save=["lm_head"]),
    "lora, embedding and head": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "lora and some tokens": lora(trainable_token_indices=[5, 7]),
    "lora and other tokens in the head": lora(trainable_token_indices={"embed_tokens": [5], "lm_head": [7]}),
    "lora of the embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "lora of the head": lora(target_modules=["lm_head", "q_proj"]),
    "lora of a parameter": lora(target_parameters=["mlp.up_proj.weight"]),
    "adalora": like("AdaLoraConfig", init_r=4, target_r=4, total_step=10),
    "ia3": like("IA3Config", feedforward_modules=[]),
    "vera": lambda t, f: peft.VeraConfig(r=8, target_modules=t[:1]),
    "loha": like("LoHaConfig", r=4),
    "lokr": like("LoKrConfig", r=4),
    "oft": like("OFTConfig", oft_block_size=16, r=0),
    "boft": like("BOFTConfig", boft_block_size=4),
    "hra": like("HRAConfig"),
    "hira": like("HiraConfig", r=4),
    "fourierft": like("FourierFTConfig", n_frequency=20),
    "c3a": lambda t, f: peft.C3AConfig(block_size=16, target_modules=t[:1]),
    "road": like("RoadConfig", group_size=16),
    "shira": like("ShiraConfig", r=4),
    "osf": like("OSFConfig", effective_rank=8),
    "tokens": like("TrainableTokensConfig", token_indices=[5, 7], target_modules=["embed_tokens"]),
    "ln": lambda t, f: peft.LNTuningConfig(target_modules=NORMS[f]),
    "prompt": lambda t, f: peft.PromptTuningConfig(**VIRTUAL),
    "prefix": lambda t, f: peft.PrefixTuningConfig(**VIRTUAL),
    "p-tuning": lambda t, f: peft.PromptEncoderConfig(encoder_hidden_size=16, **VIRTUAL),
}
ON_CONV1D = """lora|lora, bias of adapted maps|lora, every bias|dora|pissa|lora and the head|lora and some tokens|ia3|ln|prefix"""
IN_BF16 = """lora, every bias|lora, embedding and head|lora and some tokens|lora of the embedding|dora|pissa|ia3|ln|oft|fourierft|prompt
|prefix"""
CASES = [
    *((kind, "qwen2", "fp32") for kind in KINDS),
    *((kind.strip(), "gpt2", "fp32") for kind in ON_CONV1D.split("|")),
    *((kind.strip(), "qwen2", "bf16") for kind in IN_BF16.split("|")),
]


@pytest.fixture(scope="module")
def places(models_dir, families):
    """Families with biases and a tied head, and one with neither."""
    tied = QWEN2 | {"tie_word_embeddings": True}
    return families | {"qwen2": str(make_model(models_dir / "qwen2-tied", tied))}


@pytest.fixture(scope="module")
def second(places, tmp_path_factory):
    """Another adapter of the same base, made once."""

    @cache
    def of(family, precision):
        made("lora", family, places[family], folder := tmp_path_factory.mktemp("second"), precision)
        return folder

    return of


def made(kind, family, folder, out, precision="fp32"):
    """An adapter as peft saves it, every trained number moved; and what plain peft says with it, loaded afresh."""
    from transformers import AutoModelForCausalLM

    def fresh():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype={"bf16": torch.bfloat16}.get(precision, torch.float32)
        )

    torch.manual_seed(0)
    model = moved(peft.get_peft_model(fresh(), KINDS[kind](QUERY_VALUE[family], family)), 0.05)
    model.save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(folder)}))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return said(peft.PeftModel.from_pretrained(fresh(), out)), trained


def said(model):
    ids = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("kind, family, precision", CASES)
def test_it_says_what_it_says_in_peft_and_the_base_is_untouched(kind, family, precision, places, second, tmp_path):
    wanted, _ = made(kind, family, places[family], tmp_path, precision)
    base = weights.load(resolve(RunSpec(model=places[family], precision=precision)))
    before, own = digest(base.model), said(base.model)
    model = adapters.apply(base, adapters.read(tmp_path))
    assert digest(base.model) == before and said(base.model).equal(own), "loading it changed the base"
    ours = said(model)
    wanted = wanted[:, -ours.shape[1] :]
    assert ours.allclose(wanted, rtol=0, atol={"fp32": 1e-5}.get(precision, 2e-2)), (ours - wanted).abs().max()
    assert (ours.argmax(-1) == wanted.argmax(-1)).float().mean() >= 0.99
    assert not ours.allclose(own, atol=1e-4), "it changed nothing"
    assert digest(base.model) == before and said(base.model).equal(own), "using it changed the base"
    adapters.apply(base, adapters.read(second(family, precision)))
    try:
        merged = adapters.merge(base, adapters.read(tmp_path))
    except (SpecError, AdapterError):
        pass
    else:
        assert said(merged).allclose(ours, atol={"fp32": 1e-3}.get(precision, 0.1))
    del model
    assert digest(base.model) == before and said(base.model).equal(own), "it left something behind"


@pytest.mark.parametrize(
    "kind, family", [("lora, every bias", "gpt2"), ("lora, bias of adapted maps", "qwen2"), ("lora, every bias", "opt")]
)
def test_biases_that_an_adapter_brings_are_its_own(kind, family, places, tmp_path):
    """Beside it, and after it, the base answers as itself: the first row of the cases."""
    _, trained = made(kind, family, places[family], tmp_path / "biased")
    assert any(name.endswith("bias") for name in trained)
    made("lora", family, places[family], tmp_path / "plain")
    folders = [tmp_path / name for name in ("plain", "biased", "plain")]
    reports = [compare.on_prompt([adapters.read(f)], "what colour", Decoding(8)) for f in folders]
    alone, (base, biased), after = ([reply.text for reply in r.exchanges[0].replies] for r in reports)
    assert base == alone[0] == after[0] and biased != base


@pytest.fixture
def adapter(places, tmp_path):
    """A LoRA folder of peft's, and what puts it on its base."""
    made("lora", "qwen2", places["qwen2"], tmp_path / "adapter")
    base = weights.load(resolve(RunSpec(model=places["qwen2"], precision="fp32")))
    return tmp_path / "adapter", lambda: adapters.apply(base, adapters.read(tmp_path / "adapter"))


def change(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_settings_of_another_peft_that_are_off_are_named_and_left_out(adapter):
    folder, put = adapter
    want = said(put())
    change(folder, use_later=False, later_config=None, peft_version="9.0", later_version=3)
    assert said(put()).equal(want)
    report = compare.on_prompt([adapters.read(folder)], "what colour", Decoding(2))
    assert report.notes == (adapters.set_aside(adapters.read(folder)),)
    assert "use_later, later_config" in report.notes[0] and "version" not in report.notes[0]


@pytest.mark.parametrize(
    "settings, what",
    [
        ({"use_later": True}, "use_later=True.*does not know.*pip install -U peft"),
        ({"peft_type": "LATER"}, "peft_type=LATER.*does not have"),
        ({"r": "four"}, "does not fit"),
        ({"target_modules": ["nothing"]}, "does not fit .*not found"),
        ({"r": 8}, "does not fit .*size mismatch"),
        ({"exclude_modules": "("}, "does not fit .*unterminated"),
        (
            {"alora_invocation_tokens": "4", "task_type": "CAUSAL_LM"},
            "does not fit .*invalid data type",
        ),  # which only reading a text shows
    ],
)
def test_settings_that_may_change_the_numbers_are_refused(settings, what, adapter):
    folder, put = adapter
    change(folder, **settings)
    with pytest.raises(AdapterError, match=what) as error:
        put()
    assert "\n" not in str(error.value)


def test_numbers_that_are_none_or_not_there_are_named(adapter):
    from safetensors.torch import load_file, save_file

    folder, put = adapter
    tensors = load_file(folder / adapters.TENSORS)
    first, *_, last = tensors
    tensors[last].view(-1)[:2] = torch.nan
    save_file(tensors, folder / adapters.TENSORS)
    with pytest.raises(AdapterError, match=f"{last} has 2 numbers that are not finite"):
        put()
    save_file({name: tensors[name] for name in tensors if name not in (first, last)}, folder / adapters.TENSORS)
    with pytest.raises(AdapterError, match=f"({first}|{last}) is in the model only"):
        put()
    (folder / adapters.TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="adapter_model.bin, a pickle.*save it as safetensors"):
        put()
