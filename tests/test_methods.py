"""The registry's entries, and what the low-rank family does beyond peft's own code."""

import math
import re

import pytest
import torch
from tiny import attached, ids_on, logits, run_of, small, steps

from peftlab import RunSpec, SpecError, adapters, count
from peftlab.base import weights
from peftlab.base.models import MODELS
from peftlab.catalog import FAMILIES, PAPERS
from peftlab.methods import METHODS, SIZES, lora
from peftlab.resolve import METHOD_SETTINGS, resolve
from peftlab.run import gears
from peftlab.spec import SETTINGS


@pytest.mark.parametrize("key", METHODS)
def test_its_words_are_complete(key):
    about = METHODS[key].about
    for name in ("name", "hypothesis", "trains", "inference", "merging", "when", "when_not"):
        assert getattr(about, name).strip(), name
    for sentence in (about.hypothesis, about.trains, about.inference, about.merging, about.when, about.when_not):
        assert sentence == sentence.strip() and sentence.endswith("."), sentence
    assert about.family in FAMILIES
    assert not about.reparameterized or about.family == "additive"
    assert len(about.mistakes) >= 2 and len(set(about.mistakes)) == len(about.mistakes) and all(about.mistakes)
    assert about.papers and set(about.papers) <= set(PAPERS)


@pytest.mark.parametrize("key", METHODS)
def test_its_entry_is_complete(key):
    method = METHODS[key]
    assert method.key == key and method.terms and [m.name for m in METHODS.values()].count(method.name) == 1
    assert set(method.settings) | set(method.defaults) <= set(SETTINGS)
    assert resolve(RunSpec(method=method.key)).learning_rate > 0 and "learning_rate" in method.defaults
    own = {name for name in method.defaults if name in METHOD_SETTINGS}
    assert own - {"rank"} <= set(method.settings), "a default that no run of it reads"
    for term in (*method.terms, *(method.saved or ())):
        assert set(term.factors) <= set(SIZES) | set(method.settings), "counted by a setting that it does not read"
    assert (method.about.family == "additive") <= (not method.in_place)
    assert method.if_nothing == "" or "use " in method.if_nothing


@pytest.mark.parametrize("key", METHODS)
def test_its_drawing_can_be_drawn(key):
    drawing, gaps = METHODS[key].drawing, range(len(METHODS[key].drawing.main) + 1)
    assert drawing.main and all(box.strip() for box in (*drawing.main, *drawing.branch))
    assert drawing.joins is None or drawing.joins in gaps
    assert drawing.leaves is None or (drawing.leaves in gaps and drawing.leaves < drawing.joins)
    if drawing.branch:
        assert drawing.joins is not None, "a branch that leads nowhere"
    boxes = (*drawing.main, *drawing.branch)
    assert any(box.startswith("*") for box in boxes), "nothing drawn is trained"
    assert not any("*" in box[1:] for box in boxes), "a star that does not start its box"


def test_a_rank_no_matrix_can_have_and_layers_the_model_lacks_are_refused(tiny_model):
    with pytest.raises(SpecError, match="rank=65.*above 64"):
        count(resolve(RunSpec(model=str(tiny_model), rank=65)))
    with pytest.raises(SpecError, match="rank=33.*the smallest adapted matrix has rank 32.*or 32 at most"):
        count(resolve(RunSpec(model=str(tiny_model), method="pissa", rank=33)))
    with pytest.raises(SpecError, match="layers=last:4.*3 layers"):
        count(resolve(RunSpec(model=str(tiny_model), layers="last:4")))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"method": "oft", "block_size": 24}, "block-size=24: q_proj has 64 inputs.*try 16"),
        ({"method": "compacter", "bottleneck": 18}, "bottleneck=18: .*4 equal parts; try 16"),
        ({"method": "prompt", "virtual_tokens": 100}, "virtual-tokens=100: the model reads 256 tokens.*try 1"),
        ({"method": "prefix", "virtual_tokens": 100, "sequence_length": 250}, "virtual-tokens=100: .*250; try 6"),
        (
            {"method": "prompt", "sequence_length": 256},
            "sequence-length=256: the model reads 256.*20 virtual tokens; try 236",
        ),
    ],
    ids=str,
)
def test_a_setting_the_model_cannot_have_gets_one_that_it_can(settings, said, tiny_model):
    spec = RunSpec(**{"model": str(tiny_model), "sequence_length": 255, **settings})
    with pytest.raises(SpecError, match=said) as refused:
        count(resolve(spec))
    name, _, _ = str(refused.value).partition("=")
    proposed = int(str(refused.value).rpartition("try ")[2])
    assert count(resolve(spec.but(**{name.replace("-", "_"): proposed}))).trainable_parameters > 0


@pytest.mark.parametrize("method, scale", [("rslora", 6), ("pissa", 3)])
def test_alpha_over_rank_scales_the_update(method, scale, config_files):
    adapted = attached("llama", RunSpec(model=config_files["llama"], method=method, rank=4, alpha=12))
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == scale


@pytest.mark.parametrize("method", [m for m in METHODS if "adapter_precision" in METHODS[m].settings and m != "qlora"])
def test_adapter_precision_is_the_adapters_type(method, config_files):
    spec = RunSpec(model=config_files["llama"], method=method, adapter_precision="bf16", sequence_length=96)
    adapted = attached("llama", spec)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.bfloat16}
    assert adapted.get_input_embeddings().weight.dtype == torch.float32


def test_pissa_starts_from_the_top_singular_vectors(config_files):
    adapted = attached("llama", RunSpec(model=config_files["llama"], method="pissa", rank=4))
    for layer in (
        adapted.base_model.model.model.layers[0].self_attn.q_proj,
        adapted.base_model.model.model.layers[2].mlp.up_proj,
    ):
        principal = layer.get_delta_weight("default")
        whole = layer.base_layer.weight + principal
        u, s, v = torch.linalg.svd(whole)
        assert torch.allclose(principal, u[:, :4] @ s[:4].diag() @ v[:4], atol=1e-5)


def test_loraplus_groups_are_pefts(tiny_model, toy_task, tmp_path):
    from peft.optimizers import create_loraplus_optimizer

    spec = small(tiny_model, "lora-plus", lr_ratio=7, learning_rate=3e-4)
    model = run_of(spec, tmp_path).model
    ours = {id(p): 3e-4 * g["scale"] for g in gears._optimizer(model, spec, False).param_groups for p in g["params"]}
    peft = create_loraplus_optimizer(model, torch.optim.AdamW, lr=3e-4, loraplus_lr_ratio=7)
    theirs = {id(p): g["lr"] for g in peft.param_groups for p in g["params"]}
    assert ours == pytest.approx(theirs) and len(set(ours.values())) == 2
    names = {id(p): n for n, p in model.named_parameters()}
    assert all((rate > 1e-3) == ("lora_B" in names[i]) for i, rate in ours.items())


def test_adaloras_penalty_is_pefts(tiny_model, toy_task, tmp_path):
    model = run_of(small(tiny_model, "adalora"), tmp_path).model.eval()
    ids = ids_on(model, [[5, 6, 7, 8]])
    theirs = model(input_ids=ids, labels=ids)
    plain = torch.nn.functional.cross_entropy(theirs.logits[0, :-1], ids[0, 1:])
    assert (theirs.loss - plain).item() == pytest.approx(lora.orthogonality(model).item(), rel=1e-5)
    assert model.peft_config["default"].orth_reg_weight == lora.ORTHOGONALITY


def test_adaloras_penalty_is_no_part_of_the_loss_shown(tiny_model, toy_task, tmp_path):
    """Before the first step, AdaLoRA's model is the base, and so is its loss."""
    shown = [steps(run_of(small(tiny_model, m), tmp_path), 1)[0] for m in ("adalora", "lora")]
    assert shown[0] == pytest.approx(shown[1], rel=1e-5)


def test_adalora_saves_what_it_did_not_prune(tiny_model, toy_task, tmp_path):
    from safetensors.torch import load_file

    spec = small(tiny_model, "adalora", rank=12, steps=20)
    run = run_of(spec, tmp_path)
    steps(run, 20)
    learned = logits(run.model)
    folder = adapters.save(run.model, spec, tmp_path / "adapter")
    tensors = load_file(folder / adapters.TENSORS)
    stored = sum(t.numel() for t in tensors.values())
    assert stored < count(spec).trainable_parameters
    ranks = sum(len(t) for n, t in tensors.items() if "lora_E" in n)
    matrices = sum("lora_E" in n for n in tensors)
    assert matrices == 21 and ranks == round(12 * lora.SURVIVING) * matrices
    again = adapters.apply(weights.load(spec), adapters.read(folder))
    assert (logits(again) - learned).abs().max() < 1e-5


@pytest.mark.parametrize("steps_", [1, 2, 11])
def test_adalora_suits_a_run_of_any_length(steps_, tiny_model, toy_task, tmp_path):
    run = run_of(small(tiny_model, "adalora", steps=steps_), tmp_path)
    assert all(map(math.isfinite, steps(run, steps_)))


@pytest.mark.parametrize("method", METHODS)
def test_it_suits_every_published_model_or_says_why_not(method):
    suited = 0
    for key, entry in MODELS.items():
        if entry.config is None or not entry.is_causal:
            continue
        try:
            report = count(resolve(RunSpec(model=key, method=method)))
        except SpecError as error:
            said = str(error)
            assert key in said or entry.name in said or "block-size" in said, said
            assert re.search(r"; (use|try|set|turn) |, or ", said), said
        else:
            suited += 1
            assert 0 < report.trainable_parameters <= report.total_parameters + report.added_parameters
    assert suited >= (2 if method == "bitfit" else 20)
