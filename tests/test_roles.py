"""Roles come from shapes and siblings: what families of unknown names make keys, widen, narrow; and what hangs there."""

import json

import pytest
import torch
from tiny import fresh

from peftlab import RunSpec, SpecError, adapters, count, methods, resolve, seam
from peftlab.base import architecture
from peftlab.base.configs import normal
from peftlab.base.weights import share
from peftlab.bench import families

ROLES = {
    "gptj": "query key value attention-output up down",
    "gpt_neox": "query+key+value attention-output up down",
    "falcon": "query+key+value attention-output up down",
    "mpt": "query+key+value attention-output up down",
    "ctrl": "query key value attention-output up down",
    "cpmant": "query key value attention-output gate up down",
    "xlm": "query key value attention-output up down",
    "modernbert-decoder": "query key value attention-output gate+up down",
    "deepseek_v3": "query key+value attention-output gate+up gate up down",
    "lfm2": "query key value attention-output gate up down",
    "t5": "query key value attention-output up down",
}
METHODS = ("lora", "ia3", "prefix", "houlsby", "pfeiffer", "parallel", "post-attention", "last-block", "ln")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Family → (config, its file), made once."""
    made = {}

    def of(kind, task=""):
        if (kind, task) not in made:
            folder, config = tmp_path_factory.mktemp("families"), families.tiny(kind, task)
            (folder / "config.json").write_text(json.dumps(config))
            made[kind, task] = normal(config), str(folder)
        return made[kind, task]

    return of


@pytest.mark.parametrize("kind", ROLES)
def test_every_role_is_found(kind, tiny):
    shape = architecture.of(tiny(kind)[1])
    found = {m.role.replace(" ", "-") for m in shape.modules if m.role in architecture.ROLES}
    assert found == set(ROLES[kind].split())
    assert not [m.name for m in shape.modules if "conv" in m.name and m.role]


@pytest.mark.parametrize("kind", ["gpt_neox", "falcon", "mpt", "deepseek_v3", "lfm2", "t5", "mixtral"])
def test_what_is_counted_is_attached(kind, tiny):
    config, path = tiny(kind)
    model = fresh(config).requires_grad_(False)
    for method in METHODS:
        spec = resolve(RunSpec(model=path, method=method, sequence_length=64))
        report = count(spec)
        adapted = methods.find(method).attach(share(model), methods.targets(architecture.of(path), spec), spec)
        assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == report.trainable_parameters, method


@pytest.mark.parametrize("method", ["lora", "post-attention", "prompt", "bitfit", "head"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "t5"])
def test_a_classifier_is_trained_beside_the_adapter(kind, method, tiny):
    config, path = tiny(kind, "classification")
    spec = resolve(RunSpec(model=path, method=method, sequence_length=64))
    heads = [m for m in architecture.of(path).modules if m.classifier]
    assert bool(heads) is (kind != "t5")  # whose head has a name that peft does not know
    if (kind, method) in (("t5", "head"), ("t5", "bitfit")):
        return
    report = count(spec)
    targets = methods.targets(architecture.of(path), spec)
    adapted = methods.find(method).attach(share(fresh(config).requires_grad_(False)), targets, spec)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == report.trainable_parameters
    assert {m.name for m in heads} <= {name for name, _ in report.names}


@pytest.mark.parametrize("kind", ["deepseek_v3", "mixtral"])
def test_an_adapter_on_the_experts_acts_and_starts_at_nothing(kind, tiny):
    config, path = tiny(kind)
    model, ids = fresh(config).requires_grad_(False).eval(), torch.arange(5, 21)[None]
    plain = model(input_ids=ids).logits
    for method in ("lora", "houlsby", "parallel"):
        spec = resolve(RunSpec(model=path, method=method, sequence_length=64))
        adapted = methods.find(method).attach(share(model), methods.targets(architecture.of(path), spec), spec)
        assert torch.equal(adapted(input_ids=ids).logits, plain)
        trained = [p for n, p in adapted.named_parameters() if p.requires_grad and "experts" in n]
        assert trained
        for p in trained:
            torch.nn.init.normal_(p, std=0.1)
        assert not torch.equal(adapted(input_ids=ids).logits, plain)


UNLIKE = (
    "deepseek_v3",
    "deepseek_v32",
    "lfm2",
    "gemma4_text",
    "gemma3n_text",
    "falcon_h1",
    "zamba2",
    "roberta",
)


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_prefix_stands_before_what_each_layer_keeps(kind, tmp_path):
    config = families.tiny(kind, "causal")
    (tmp_path / "config.json").write_text(json.dumps(config))
    base, spec = (
        fresh(config).requires_grad_(False).eval(),
        resolve(RunSpec(model=str(tmp_path), method="prefix", virtual_tokens=5, sequence_length=64, precision="fp32")),
    )
    targets = methods.targets(architecture.of(spec.model), spec)
    model = methods.find("prefix").attach(share(base), targets, spec).eval()
    (own,) = (p for p in model.parameters() if p.requires_grad)
    assert own.numel() == count(spec).trainable_parameters
    ids = torch.arange(20, 26)[None]
    inputs = {"attention_mask": torch.ones_like(ids), "position_ids": seam.first_position(base) + torch.arange(6)[None]}
    whole = seam.logits(model, input_ids=ids, **inputs)
    whole[:, -1].square().sum().backward()
    assert own.grad.abs().sum(0).all()  # every layer looks at all of it
    with torch.no_grad():
        logits, held = seam.read(model, None, input_ids=ids[:, :4], **{name: t[:, :4] for name, t in inputs.items()})
        for n in (4, 5):
            more = {
                "attention_mask": inputs["attention_mask"][:, : n + 1],
                "position_ids": inputs["position_ids"][:, n : n + 1],
            }
            last, held = seam.read(model, held, input_ids=ids[:, n : n + 1], **more)
            logits = torch.cat([logits, last], 1)
    assert logits.allclose(whole, atol=1e-4)
    if not hasattr(model, "peft_config"):
        file = adapters.save(model, spec, tmp_path / "adapter") / adapters.TENSORS
        again = adapters._attached(share(base), spec, file).eval()
        assert torch.equal(seam.logits(again, input_ids=ids, **inputs), whole)


@pytest.mark.parametrize("kind", ["openai-gpt", "xlm", "minimax", "deepseek_v4", "hrm_text"])
def test_a_cache_that_is_not_of_keys_alone_gets_no_prefix(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(families.tiny(kind, "causal")))
    with pytest.raises(SpecError, match=r"method=prefix: .*\*\..*use prompt"):
        count(resolve(RunSpec(model=str(tmp_path), method="prefix", sequence_length=64)))
