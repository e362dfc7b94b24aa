"""What every method leaves alone, and what it trains."""

import pytest
from tiny import digest, fresh

from peftlab import RunSpec, SpecError, architecture, count, methods, resolve, weights
from peftlab.catalog.papers import PAPERS
from peftlab.methods import METHODS
from peftlab.spec import SETTINGS
from peftlab.train import train

CASES = [("tiny_model", m) for m in METHODS if m != "bitfit"] + [("tied_model", m) for m in METHODS if m != "bitfit"]
CASES += [("gpt2_model", m) for m in METHODS]


@pytest.mark.parametrize("model, method", CASES)
def test_training_leaves_the_base_as_it_was(model, method, request, toy_task, tmp_path):
    spec = RunSpec(model=str(request.getfixturevalue(model)), method=method, task="toy", steps=3, learning_rate=0.05)
    base = weights.load(resolve(spec)).model
    before, flags = digest(base), [p.requires_grad for p in base.parameters()]
    names = [n for n, _ in base.named_modules()]
    (*_, done) = train(spec, tmp_path)
    assert done["steps"] == 3
    assert digest(base) == before
    assert [p.requires_grad for p in base.parameters()] == flags and not any(flags)
    assert [n for n, _ in base.named_modules()] == names


def test_a_share_has_the_storage_and_nothing_else():
    base = fresh("llama-tied")
    twin = weights.share(base)
    for (name, a), (_, b) in zip(base.named_parameters(), twin.named_parameters(), strict=True):
        assert a is not b and a.data_ptr() == b.data_ptr(), name
    for (name, a), (_, b) in zip(base.named_buffers(), twin.named_buffers(), strict=True):
        assert a is b, name
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert not {id(m) for m in base.modules()} & {id(m) for m in twin.modules()}


@pytest.mark.parametrize("model, method", CASES)
def test_only_the_methods_own_parameters_change(model, method, request):
    import torch

    folder = str(request.getfixturevalue(model))
    spec = resolve(RunSpec(model=folder, method=method))
    base = weights.load(spec)
    shape = architecture.of(folder)
    adapted = methods.find(method).attach(weights.share(base.model), methods.targets(shape, spec), spec)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # LoRA's A moves once B is no longer zero
        ids = torch.tensor([[5, 6, 7, 8]])
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert changed <= trained and len(changed) > 0.8 * len(trained)
    owners = {
        n.split(".lora_")[0].removeprefix("base_model.model.") if ".lora_" in n else n.rpartition(".")[0]
        for n in trained
    }
    expected = {name for name, _ in count(spec).names}
    assert owners == expected or (model != "tiny_model" and method == "full" and owners == expected - {"lm_head"})


def test_every_entry_says_what_it_is():
    for key, method in METHODS.items():
        assert method.key == key and method.hypothesis and method.trains and method.terms
        assert method.family in ("full", "additive", "selective", "prompt-based")
        assert set(method.papers) <= set(PAPERS)
        assert set(method.settings) <= set(SETTINGS) and set(method.defaults) <= set(SETTINGS)
        assert method.defaults["learning_rate"] > 0


def test_bitfit_needs_biases_and_says_where_there_are_some(tiny_model):
    with pytest.raises(SpecError, match="no bias to train.*gpt2"):
        count(RunSpec(model=str(tiny_model), method="bitfit"))


def test_a_rank_no_matrix_can_have_is_refused(tiny_model):
    with pytest.raises(SpecError, match="rank=65.*above 64"):
        count(RunSpec(model=str(tiny_model), rank=65))


def test_layers_the_model_lacks_are_refused(tiny_model):
    with pytest.raises(SpecError, match="layers=last:4.*3 layers"):
        count(RunSpec(model=str(tiny_model), layers="last:4"))


def test_alpha_over_rank_scales_the_update(tiny_model):
    spec = resolve(RunSpec(model=str(tiny_model), rank=4, alpha=12))
    adapted = methods.find("lora").attach(fresh("llama"), methods.targets(architecture.of(str(tiny_model)), spec), spec)
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 3


def test_adapter_precision_is_the_adapters_type(tiny_model):
    import torch

    spec = resolve(RunSpec(model=str(tiny_model), adapter_precision="bf16"))
    adapted = methods.find("lora").attach(fresh("llama"), methods.targets(architecture.of(str(tiny_model)), spec), spec)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.bfloat16}
