import json

import pytest
from tiny import CONFIGS, fresh

from peftlab import RunSpec, SpecError, caches, count, predict, resolve, seam
from peftlab.base import configs
from peftlab.bench import families
from peftlab.memory import serve as served

LLAMA_8B = RunSpec(model="llama-3.1-8b", precision="bf16", rank=8)


def serve(spec, adapters, streams, context):
    return served(resolve(spec), adapters, streams, context)


def test_fifty_adapters_on_llama_3_8b_by_hand():
    found = serve(LLAMA_8B, adapters=50, streams=8, context=8192)
    assert found.cache == 8 * 8192 * (2 * 32 * 8 * 128 * 2) == 2**33
    assert found.on_one_base == 2 * 8_030_261_248 + 50 * 4 * 20_971_520 + 2**33
    assert found.as_copies == 50 * 2 * 8_030_261_248 + 2**33


@pytest.mark.parametrize("method", ["full", "head", "ln", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_a_copy_is_the_whole_model_whatever_the_method_trains(config_files, family, method):
    spec = RunSpec(model=config_files[family], method=method, precision="fp32", sequence_length=64)
    found = serve(spec, 3, 2, 100)
    copy = sum(p.nbytes for p in fresh(family).parameters())
    assert found.as_copies == 3 * copy + found.cache
    adapters = 3 * count(resolve(spec)).adapter_bytes
    assert found.on_one_base == (0 if method == "full" else copy) + adapters + found.cache


def test_what_is_shared(config_files):
    packed = serve(LLAMA_8B.but(method="qlora"), 1, 1, 1)
    assert packed.as_copies - packed.cache == predict(resolve(LLAMA_8B.but(method="qlora"))).frozen_weights < 6e9
    full = serve(LLAMA_8B.but(method="full"), 50, 8, 8192)
    assert full.on_one_base == full.as_copies
    some = serve(RunSpec(model=config_files["llama"], method="last-block", precision="bf16"), 10, 1, 100)
    assert some.on_one_base == 2 * 195_008 + 10 * 2 * 43_136 + some.cache


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("context", [1, 20, 100])
def test_the_cache_is_what_transformers_keeps(config_files, family, context):
    import torch

    model = fresh(family).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(1, context, dtype=torch.long), use_cache=True).past_key_values
    numbers = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    window = CONFIGS[family].get("sliding_window")
    if window and context > window:  # transformers keeps one fewer, and adds the token at hand
        numbers += sum(
            t[:, :, :1].numel() for layer in cache.layers if layer.is_sliding for t in (layer.keys, layer.values)
        )
    found = serve(RunSpec(model=config_files[family]), 1, 1, context)
    assert found.cache == 2 * numbers


@pytest.mark.parametrize(
    "kind",
    [
        "gemma3n_text",
        "gemma4_text",
        "deepseek_v3",
        "falcon",
        "gpt_bigcode",
        "jamba",
        "phi3",
        "llama4_text",
        "falcon_h1",
    ],
)
def test_the_cache_of_other_families(kind, tmp_path):
    """Shared keys, heads of another size in some layers, keys and values of unlike widths, one head for all queries, states,
    chunks."""
    import torch

    (path := tmp_path / "config.json").write_text(json.dumps(families.tiny(kind, "causal") | {"use_cache": True}))
    model = seam.library().AutoModelForCausalLM.from_config(configs.parsed(json.loads(path.read_text()))[0]).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.ones(1, 6, dtype=torch.long), use_cache=True).past_key_values
    kept = caches.kept_by(cache)
    found = serve(RunSpec(model=str(path)), 1, 1, 6)
    assert found.cache == 2 * sum(t.numel() for t in kept)
    assert found.stateful == sum("Linear" in type(layer).__name__ for layer in cache.layers)


@pytest.mark.parametrize("kind", ["mamba", "deepseek_v32"])
def test_a_state_alone_is_no_cache_of_keys_nor_what_an_indexer_adds(kind, tmp_path):
    (path := tmp_path / "config.json").write_text(json.dumps(families.tiny(kind, "causal")))
    with pytest.raises(SpecError, match="keeps a state of its texts"):
        serve(RunSpec(model=str(path)), 1, 1, 6)


def test_refusals():
    for name, values in (("adapters", (0, 1, 1)), ("streams", (1, 0, 1)), ("context", (1, 1, 0))):
        with pytest.raises(SpecError, match=f"{name}=0.*at least 1; try 1"):
            serve(LLAMA_8B, *values)
    with pytest.raises(SpecError, match="context=2000.*reads 1,024 tokens; try 1024"):
        serve(RunSpec(model="gpt2"), 1, 1, 2000)
    with pytest.raises(SpecError, match="model=bert-base.*no cache; try gpt2"):
        serve(RunSpec(model="bert-base"), 1, 1, 10)
    with pytest.raises(SpecError, match="model=7B: a bare count has no layers"):
        serve(RunSpec(model="7B"), 1, 1, 10)
