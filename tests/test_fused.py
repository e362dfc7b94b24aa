"""Fused operations are the model's own functions, up to rounding, on private copies only."""

import pytest
import torch
from tiny import CONFIGS, fresh

from peftlab import RunSpec, architecture, methods, resolve, weights
from peftlab.fused import quicken, rotate

IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [9, 3, 4, 2, 7, 1]])


def copies(family, method="lora", dtype=torch.float32, **settings):
    """The same adapted model twice, with every trained number moved."""
    base = fresh(family).to(dtype).requires_grad_(False)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        spec = resolve(RunSpec(model=settings.pop("model", None) or FILES[family], method=method, **settings))
        model = methods.find(method).attach(
            weights.share(base), methods.targets(architecture.of(spec.model), spec), spec
        )
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=draw).to(p))
        made.append(model.train())
    return base, *made


FILES: dict[str, str] = {}


@pytest.fixture(autouse=True)
def files(config_files):
    FILES.update(config_files)


def read(model):
    """Logits, and the gradient of each trained parameter."""
    torch.manual_seed(0)  # for models that drop
    logits = model(input_ids=IDS, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), IDS.flatten()).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "rslora", "ln", "houlsby", "dora"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3", "qwen2"])
def test_logits_and_gradients_are_the_models_own(family, method):
    _, plain, quick = copies(family, method)
    counts = quicken(quick)
    assert counts["norms"] and counts["rotary"] == 3 and counts["lora"] == (21 if method in ("lora", "rslora") else 0)
    (want, slopes), (got, fused) = read(plain), read(quick)
    assert got.allclose(want, atol=1e-5)
    for name, slope in slopes.items():
        assert fused[name].allclose(slope, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("adapter", ["fp32", "bf16"])
def test_bf16_differs_by_rounding(adapter):
    """As far from fp32 as the model's own bf16 is."""
    _, exact, _ = copies("llama")
    _, plain, quick = copies("llama", dtype=torch.bfloat16, adapter_precision=adapter)
    quicken(quick)
    (true, _), (own, slopes), (got, fused) = read(exact), read(plain), read(quick)
    assert (got - true).norm() < 1.3 * (own - true).norm()
    for name, slope in slopes.items():
        assert fused[name].dtype == slope.dtype
        assert (fused[name].float() - slope.float()).norm() < 0.05 * slope.float().norm(), name


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_can_be_quickened(family):
    _, plain, quick = copies(family)
    quicken(quick)
    assert read(quick)[0].allclose(read(plain)[0], atol=1e-5)


def test_the_base_keeps_its_own_forwards():
    base, _, quick = copies("llama")
    before = {name: type(module) for name, module in base.named_modules()}
    quicken(quick)
    assert {name: type(module) for name, module in base.named_modules()} == before
    norms = [m for m in quick.modules() if type(m).__name__ == "LlamaRMSNorm"]
    assert norms and all(isinstance(m, before["model.norm"]) for m in norms)


def test_dropout_and_variants_keep_pefts_forward():
    for method, settings in (("lora", {"dropout": 0.1}), ("dora", {}), ("adalora", {})):
        _, _, quick = copies("llama", method, **settings)
        assert quicken(quick)["lora"] == 0


def test_a_rotation_of_another_kind_is_left_alone():
    """Where neighbours are the pairs, as in GPT-J: not `rotate`'s function."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    angles = torch.randn(1, 3, 4)
    apart, pairs = angles.repeat(1, 1, 2), angles.repeat_interleave(2, -1)
    turned = torch.stack((-q[..., 1::2], q[..., ::2]), -1).flatten(-2)
    neighbours = q * pairs.cos()[:, None] + turned * pairs.sin()[:, None]
    assert not rotate(q, k, apart.cos(), apart.sin())[0].allclose(neighbours, atol=1e-3)


def test_accumulated_gradients_add_up():
    _, plain, quick = copies("llama")
    quicken(quick)
    for model in (plain, quick):
        read(model)
        read(model)
    for p, q in zip(plain.parameters(), quick.parameters(), strict=True):
        if p.requires_grad:
            assert q.grad.allclose(p.grad, rtol=1e-4, atol=1e-6)


def test_the_base_to_generate_with_is_fused_and_the_base_stays_itself(tiny_model):
    base = weights.load(resolve(RunSpec(model=str(tiny_model), precision="fp32")))
    kinds = {type(m) for m in base.model.modules()}
    with torch.no_grad():
        want, got = base.model(input_ids=IDS).logits, base.quick(input_ids=IDS).logits
    assert got.allclose(want, atol=1e-5)
    assert {type(m) for m in base.model.modules()} == kinds and not {type(m) for m in base.quick.modules()} <= kinds
    assert [p.data_ptr() for p in base.quick.parameters()] == [p.data_ptr() for p in base.model.parameters()]
    assert base.quick is base.quick
