"""Roles come from shapes and siblings: what families of unknown names make keys, widen, narrow; and what hangs there."""

import json

import pytest
import torch
from tiny import fresh

from peftlab import RunSpec, SpecError, count, methods, resolve
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
        try:
            report = count(spec)
        except SpecError as error:
            assert method == "prefix" and kind in ("deepseek_v3", "lfm2"), error
            continue
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
