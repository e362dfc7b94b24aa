import pytest
from tiny import attached

from peftlab import RunSpec, SpecError, resolve
from peftlab.memory import compute as compute_module
from peftlab.memory.compute import compute, peak

LENGTH = 32


def measured(family, spec):
    """Operations of (forward, backward) for each token, counted by torch as they run."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    spec = resolve(spec)
    model = attached(family, spec).train()
    model.config._attn_implementation = "eager"  # torch does not count the fused kernel of a CPU
    model.config.use_cache = False
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.randint(2, 500, (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        forward = counter.get_total_flops()
        torch.nn.functional.cross_entropy(logits[:, -LENGTH:].flatten(0, 1), ids.flatten()).backward()
    tokens = LENGTH + (0 if spec.method == "prefix" else spec.virtual_tokens or 0)
    return forward / tokens, (counter.get_total_flops() - forward) / tokens


@pytest.fixture
def unmasked(monkeypatch):
    """The eager kernel multiplies what the mask then hides."""
    monkeypatch.setattr(compute_module, "_seen", lambda length, window=0: length)


def tiny(config_files, family, **settings):
    return RunSpec(model=config_files[family], precision="fp32", sequence_length=LENGTH, batch_size=1, **settings)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", {"method": "full"}), ("llama-tied", {"method": "full"}), ("gpt2", {"method": "full"}),
        ("llama", {"method": "lora"}), ("llama", {"method": "lora", "layers": "first:1", "target_modules": "down_proj"}),
        ("gemma3", {"method": "lora"}), ("opt", {"method": "lora", "target_modules": "q_proj,k_proj,v_proj"}),
        ("llama", {"method": "head"}), ("llama-tied", {"method": "head"}), ("llama", {"method": "last-block"}),
        ("llama", {"method": "ln"}), ("gpt2", {"method": "bitfit"}), ("llama", {"method": "ia3", "layers": "1"}),
        ("llama", {"method": "prompt"}), ("llama", {"method": "houlsby"}), ("llama", {"method": "parallel"}),
        ("llama", {"method": "io-adapter"}),
    ],
    ids=str,
)  # fmt: skip
def test_every_product_is_counted_once(config_files, unmasked, family, settings):
    spec = tiny(config_files, family, **settings)
    found = compute(resolve(spec))
    forward, backward = measured(family, spec)
    # torch spares the one product whose gradient is that of the lowest layer's frozen query
    spared = 2 * 4 * 16 * LENGTH if settings["method"] == "ia3" else 0
    assert found.forward == pytest.approx(forward, rel=1e-12)
    assert found.input_gradients + found.weight_gradients - spared == pytest.approx(backward, rel=1e-12)
    assert found.recomputed == 0


@pytest.mark.parametrize("method", ["prefix", "compacter", "p-tuning"])
def test_what_is_left_out_is_small(config_files, unmasked, method):
    spec = tiny(config_files, "llama", method=method)
    assert compute(resolve(spec)).per_token == pytest.approx(sum(measured("llama", spec)), rel=0.05)


@pytest.mark.parametrize("method, last", [("full", 160 * 64), ("lora", 8 * 64)])
def test_recomputing_stops_before_each_layers_last_product(config_files, unmasked, method, last):
    spec = tiny(config_files, "llama", method=method, gradient_checkpointing=True)
    found = compute(resolve(spec))
    assert found.per_token - 3 * 2 * last == pytest.approx(sum(measured("llama", spec)), rel=1e-12)


def test_under_checkpointing_the_backward_pass_goes_all_the_way_down(config_files):
    low, high = (tiny(config_files, "llama", layers=layers, gradient_checkpointing=True) for layers in ("0", "2"))
    assert compute(resolve(low)).input_gradients == compute(resolve(high)).input_gradients
    plain = [compute(resolve(s.but(gradient_checkpointing=False))).input_gradients for s in (low, high)]
    assert plain[0] > plain[1]


def test_llama_3_8b_by_hand():
    spec = RunSpec(model="llama-3.1-8b", method="full", sequence_length=1024, batch_size=2, accumulation=3, steps=10)
    found = compute(resolve(spec))
    products = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # all but the embedding and the norms
    attention = 4 * 32 * 32 * 128 * (1024 + 1) / 2
    assert found.forward == 2 * products + attention
    assert found.input_gradients == 2 * products + 2 * attention
    assert found.weight_gradients == 2 * products
    assert found.tokens == 2 * 3 * 1024 * 10
    assert found.total == found.per_token * found.tokens
    again = compute(resolve(spec.but(gradient_checkpointing=True))).recomputed
    assert again == 2 * (products - 128_256 * 4096) + attention


def test_of_a_mixture_only_the_chosen_experts_and_the_router():
    spec = RunSpec(model="mixtral-8x7b", sequence_length=512, target_modules="q_proj", layers="0", rank=1)
    found = compute(resolve(spec))
    attention_maps, router = 2 * 4096**2 + 2 * 4096 * 1024, 8 * 4096
    chosen = 2 * (28672 * 4096 + 4096 * 14336)
    products = 32 * (attention_maps + router + chosen) + 32000 * 4096 + 2 * 4096
    assert found.forward == 2 * products + 4 * 32 * 32 * 128 * 513 / 2


@pytest.mark.parametrize("length, window", [(1, 0), (10, 0), (10, 3), (10, 10), (10, 99)])
def test_what_a_token_sees(length, window):
    seen = [min(i + 1, window or length) for i in range(length)]
    assert compute_module._seen(length, window) == pytest.approx(sum(seen) / length)


def test_a_window_spares_attention():
    spec = RunSpec(model="gemma-3-270m", sequence_length=4096)
    near, far = 512 - 512 * 511 / 8192, 4097 / 2
    attention = 4 * 4 * 256 * (15 * near + 3 * far)
    short = compute(resolve(spec.but(sequence_length=512)))
    assert compute(resolve(spec)).forward - short.forward == pytest.approx(attention - 4 * 4 * 256 * 18 * 513 / 2)


@pytest.mark.parametrize("method, checkpointing, times", [("full", False, 6), ("lora", False, 4), ("full", True, 8)])
def test_a_bare_count_follows_kaplan(method, checkpointing, times):
    spec = RunSpec(model="100B", method=method, gradient_checkpointing=checkpointing, sequence_length=100, batch_size=1)
    assert compute(resolve(spec)).per_token == times * 100e9
    assert compute(resolve(spec)).total == times * 100e9 * 100 * resolve(spec).steps
    four = resolve(spec.but(n_gpus=4, sharding="zero3"))
    assert compute(four).total == 4 * compute(resolve(spec)).total


def test_refusals():
    with pytest.raises(SpecError, match="gpu=t4: NVIDIA T4 has no bf16.*choose"):
        peak("t4")
    with pytest.raises(SpecError, match="gpu=h1000.*did you mean"):
        peak("h1000")
    with pytest.raises(SpecError, match="model=7B: a bare count has no layers for last-block.*name a model"):
        compute(resolve(RunSpec(model="7B", method="last-block")))
    with pytest.raises(SpecError, match="model=bert-base: only models that write text"):
        compute(resolve(RunSpec(model="bert-base")))
