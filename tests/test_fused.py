"""Fused operations are the model's own functions, up to rounding, on private copies only."""

import copy
import json

import pytest
import torch
from tiny import CONFIGS, fresh, moved

from peftlab import RunSpec, fused, methods, resolve, seam
from peftlab.base import architecture, configs, weights
from peftlab.base.models import MODELS, from_config
from peftlab.bench import families
from peftlab.fused import adjoin, attention, functions, quicken

FILES = {family: from_config(json.dumps(config)).key for family, config in CONFIGS.items()}
IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [9, 3, 4, 2, 7, 1]])
LABELS = torch.tensor([[-100, -100, 7, 8, 9, 3], [-100, 3, 4, 2, -100, 1]])


def copies(family, method="lora", dtype=torch.float32, **settings):
    """The same adapted model twice, with every trained number moved."""
    base = fresh(family).to(dtype).requires_grad_(False)
    adjoin(base)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        spec = resolve(RunSpec(model=FILES[family], method=method, **settings))
        targets = methods.targets(architecture.of(spec.model), spec)
        model = methods.find(method).attach(weights.share(base), targets, spec)
        made.append(moved(model, 0.05).train())
    return base, *made


def read(model):
    """Logits, and the gradient of each trained parameter in training."""
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS, use_cache=False).logits
    torch.manual_seed(0)  # for models that drop
    out = model.train()(input_ids=IDS, use_cache=False).logits
    (fused.cross_entropy(out, LABELS, fused.head(model)) / IDS.numel()).backward()
    return logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


SOME = "k_proj,down_proj,up_proj"  # of the maps that read one input


@pytest.mark.parametrize(
    "family, method, settings, loras",
    [
        *((family, "lora", {}, 21) for family in ("llama", "llama-tied", "gemma3", "qwen2")),
        *(("llama", method, {}, 21 * (method == "rslora")) for method in ("rslora", "ln", "houlsby", "dora")),
        *((family, "lora", {"target_modules": SOME}, 9) for family in ("llama", "qwen2")),
        ("qwen2", "lora", {"target_modules": "o_proj"}, 3),
    ],
)
def test_logits_and_gradients_that_add_up_are_the_models_own(family, method, settings, loras):
    _, plain, quick = copies(family, method, **settings)
    found = quicken(quick)
    assert found.norms and found.rotary == 3 and found.lora == loras
    assert found.attention == 1 and found.joined == (0 if method == "dora" else 6)  # of three layers, q k v and gate up
    read(plain), read(quick)
    (want, slopes), (got, fused) = read(plain), read(quick)
    assert got.allclose(want, atol=1e-5) and slopes.keys() == fused.keys()
    for name, slope in slopes.items():
        assert fused[name].allclose(slope, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
def test_bf16_differs_by_rounding(adapter):
    """As far from fp32 as the model's own bf16 is."""
    exact = copies("llama")[1]
    _, plain, quick = copies("llama", dtype=torch.bfloat16, adapter_precision=adapter)
    quicken(quick)
    (true, _), (own, slopes), (got, fused) = read(exact), read(plain), read(quick)
    assert (got - true).norm() < 1.3 * (own - true).norm()
    for name, slope in slopes.items():
        assert fused[name].dtype == slope.dtype
        assert (fused[name].float() - slope.float()).norm() < 0.05 * slope.float().norm(), name


def test_dropout_and_variants_keep_pefts_forward_and_it_is_told():
    for method, settings, told in (
        ("lora", {"dropout": 0.1}, ["LoRA on 21 linear maps (dropout)"]),
        ("dora", {}, ["LoRA on 21 linear maps (a variant of LoRA)"]),
        ("adalora", {}, []),
    ):
        _, _, quick = copies("llama", method, **settings)
        found = quicken(quick)
        assert found.lora == 0 and list(found.kept) == told


CAUSAL = {model.config["model_type"]: key for key, model in MODELS.items() if model.is_causal and model.config}


@pytest.mark.parametrize("family", CAUSAL)
def test_no_family_of_the_catalogue_loses_an_operation(family):
    """In its real sizes, on the meta device: what is known is known without the model's numbers."""
    entry = MODELS[CAUSAL[family]]
    model = configs.build_meta(dict(entry.config)).requires_grad_(False)
    layers = model.config.num_hidden_layers
    positions, root = bool(seam.rotary_sizes(model)), family not in ("gpt2", "opt")
    found = quicken(model)
    assert found.kept == () and fused.head(model) is not None and found.attention == 1
    assert found.rotary == (layers if positions else 0) and positions == root
    assert found.norms >= (2 * layers + 1 if root else 0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_what_was_found_is_what_runs(family, monkeypatch):
    """Every layer's positions go through `rotate`, in the copy alone, and are prepared once for all layers."""
    calls, prepared, own = [], set(), functions.rotate

    def counted(q, k, cos, sin, *args, **kwargs):
        calls.append(q.shape)
        prepared.add(id(sin.signed))
        return own(q, k, cos, sin, *args, **kwargs)

    monkeypatch.setattr(functions, "rotate", counted)
    base, _, quick = copies(family)
    before = {name: type(module) for name, module in base.named_modules()}
    found = quicken(quick)
    calls.clear(), prepared.clear()
    with torch.no_grad():
        quick(input_ids=IDS)
    assert len(calls) == found.rotary == 3 and len(prepared) <= 2  # Gemma 3 has two bases of angles
    base(input_ids=IDS)
    assert len(calls) == 3 and {name: type(module) for name, module in base.named_modules()} == before
    assert isinstance(quick.get_base_model().model.norm, before["model.norm"])


def other(name, **values):
    import transformers

    small = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(name, vocab_size=512, **small, **values)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)


def test_what_rotates_another_way_is_told_and_stays_itself():
    """A quarter of each head (GPT-NeoX); pairs of neighbours (Cohere)."""
    for model in (
        other("gpt_neox", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}),
        other("cohere", num_key_value_heads=2, pad_token_id=0),
    ):
        quick = weights.share(model)
        found = quicken(quick)
        assert found.rotary == 0 and "rotary positions in 2 attention modules" in found.kept
        with torch.no_grad():
            assert torch.equal(quick.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_a_norm_with_another_epsilon_or_function_is_told():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Cubed(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) ** 3

    class Forgetful(LlamaRMSNorm):
        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2)

    for kind in (Cubed, Forgetful):
        model = fresh("llama").requires_grad_(False)
        model.model.norm.__class__ = kind
        found = quicken(model)
        assert found.norms == 6 and found.kept == ("norms in 1 places",)


def test_the_base_to_generate_with_is_fused_and_the_base_stays_itself(tiny_model):
    base = weights.load(resolve(RunSpec(model=str(tiny_model), precision="fp32")))
    kinds = {type(m) for m in base.model.modules()}
    with torch.no_grad():
        ids = IDS.to(base.device)
        want, got = base.model(input_ids=ids).logits, base.quick(input_ids=ids).logits
    assert got.allclose(want, atol=1e-5)
    assert {type(m) for m in base.model.modules()} == kinds and not {type(m) for m in base.quick.modules()} <= kinds
    assert [p.data_ptr() for p in base.quick.parameters()] == [p.data_ptr() for p in base.model.parameters()]
    assert base.quick is base.quick


def test_maps_that_are_apart_in_memory_or_trained_are_not_joined():
    base = fresh("llama").requires_grad_(False)
    apart, trained = weights.share(base), weights.share(base)
    assert quicken(apart).joined == 0
    adjoin(base)
    trained = weights.share(base)
    for p in trained.parameters():
        p.requires_grad_(True)
    assert quicken(trained).joined == 0


def test_side_by_side_weights_are_the_same_numbers_and_no_more_memory():
    base = fresh("llama")
    other = copy.deepcopy(base)
    adjoin(base)
    for a, b in zip(base.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in base.parameters())


def test_two_threads_read_one_model():
    """What is put by for a sibling is another input's as soon as the other thread has come between."""
    base, _, _ = copies("llama")
    quick = weights.share(base)
    quicken(quick)
    attention = quick.model.layers[0].self_attn
    a, b = torch.randn(1, 3, 64), torch.randn(1, 4, 64)
    want = [base.model.layers[0].self_attn.k_proj(x) for x in (a, b)]
    attention.q_proj(a)
    attention.q_proj(b)
    assert attention.k_proj(a).allclose(want[0], atol=1e-6) and attention.k_proj(b).allclose(want[1], atol=1e-6)
    assert attention.q_proj(a).allclose(attention.q_proj(a))


def test_a_decoded_token_attends_as_the_models_own_attention_does():
    """Through a mask with padding, and heads that share keys."""
    for family in ("llama", "gemma3"):
        base, _, _ = copies(family)
        base.eval()
        quick = weights.share(base)
        quicken(quick)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        outs = []
        for model in (base, quick):
            with torch.no_grad():
                first = model(input_ids=IDS, attention_mask=mask[:, :6], use_cache=True)
                last = model(input_ids=IDS[:, :1], attention_mask=mask, past_key_values=first.past_key_values)
            outs.append(last.logits)
        assert outs[1].allclose(outs[0], atol=1e-5)


def test_a_recorded_step_has_no_mask(monkeypatch):
    """transformers builds one whenever a graph is recorded; without it attention is causal all the same."""
    for family in ("llama", "gemma3"):
        _, plain, quick = copies(family)
        quicken(quick)
        asked = []
        own = attention.attend

        def attend(module, query, key, value, mask, asked=asked, own=own, **more):
            asked.append(mask)
            return own(module, query, key, value, mask, **more)

        from transformers import AttentionInterface

        monkeypatch.setattr(attention, "recording", lambda: True)
        monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
        AttentionInterface.register(attention.NAME, attend)
        got = read(quick)[0]
        AttentionInterface.register(attention.NAME, own)
        monkeypatch.undo()
        assert got.allclose(read(plain)[0], atol=1e-5) and asked == [None] * 6


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_one_batch_for_a_base_and_its_adapters(family):
    """Of other ranks, on other modules: each row is what its own model says."""
    base, first, _ = copies(family)
    spec = resolve(RunSpec(model=FILES[family], method="lora", rank=3, target_modules="v_proj,down_proj"))
    targets = methods.targets(architecture.of(spec.model), spec)
    second = moved(methods.find("lora").attach(weights.share(base), targets, spec))
    quicken(second)
    models = [base.eval(), first.eval(), second.eval()]
    joint = fused.together(weights.share(base), models[1:])
    with torch.inference_mode():
        got = joint(input_ids=IDS[:1].expand(3, -1)).logits
        for row, model in zip(got, models, strict=True):
            assert row.allclose(model(input_ids=IDS[:1]).logits[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_moe", "minicpm3"])
def test_a_family_that_lays_its_tokens_otherwise_answers_by_itself(kind, tmp_path):
    """In one line for all rows, or for each head apart, as none of the maps of one batch expects."""
    folder = families.save(kind, tmp_path / kind, "causal")
    spec = resolve(RunSpec(model=str(folder), rank=3, precision="fp32"))
    base = (
        configs.parsed(json.loads((folder / "config.json").read_text()))[1]
        .from_pretrained(folder)
        .requires_grad_(False)
        .eval()
    )
    targets = methods.targets(architecture.of(spec.model), spec)
    adapted = moved(methods.find("lora").attach(weights.share(base), targets, spec)).eval()
    assert fused.together(weights.share(base), [adapted]) is None


def test_what_is_more_than_lora_is_not_put_in_one_batch():
    for method in ("dora", "ln", "prompt"):
        base, adapted, _ = copies("llama", method, sequence_length=64)
        assert fused.together(weights.share(base), [adapted]) is None, method
    _, lora, _ = copies("llama")
    assert fused.together(weights.share(copies("llama")[0]), [lora]) is None  # another base


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt"])
def test_a_loss_in_pieces_is_torchs_own(family, monkeypatch):
    """A few rows of logits at a time, the same number and the same gradients."""
    _, plain, quick = copies(family)
    quicken(quick)
    head = fused.head(quick)
    assert head.weight.data_ptr() == quick.get_base_model().get_output_embeddings().weight.data_ptr()
    outs = []
    for model in (plain, quick):
        torch.manual_seed(0)  # for models that drop
        outs.append(model(input_ids=IDS).logits)
    want = torch.nn.functional.cross_entropy(outs[0].flatten(0, 1), LABELS.flatten(), reduction="sum")
    monkeypatch.setattr(fused.loss, "LOGITS", 5 * 512)
    got = fused.cross_entropy(outs[1], LABELS, head)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    slopes = [
        torch.autograd.grad(3 * x, [p for p in m.parameters() if p.requires_grad])
        for x, m in ((want, plain), (got, quick))
    ]
    for a, b in zip(*slopes, strict=True):
        assert b.allclose(a, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_trained_asked_for_or_not_the_last_keeps_its_logits():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    _, whole, quick = copies("llama", target_modules="lm_head")
    quicken(quick)
    assert fused.head(quick) is None
    quicken(whole, logits=True)
    assert fused.head(whole) is None and whole(input_ids=IDS).logits.shape[-1] == 512
    trained = fresh("llama-tied")
    quicken(trained)
    assert fused.head(trained) is None
    for cap in (None, 30.0):
        left = ("architectures", "model_type", "sliding_window")
        small = {k: v for k, v in CONFIGS["gemma3"].items() if k not in left}
        model = Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=cap, **small)).requires_grad_(False)
        quicken(model)
        assert (fused.head(model) is None) == (cap is not None)
