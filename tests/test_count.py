"""Counts against known values, against peft, and against the parameters that really require gradients."""

import pytest
from tiny import CONFIGS, attached, fresh

from peftlab import RunSpec, SpecError, count, resolve
from peftlab.base import architecture, configs
from peftlab.base.models import MODELS
from peftlab.methods import METHODS

QV = {"target_modules": "q_proj,v_proj"}


@pytest.mark.parametrize(
    "method, settings, trainable",
    [
        ("full", {}, 195_008),
        ("head", {}, 32_768),
        ("last-block", {}, 43_136),
        ("ln", {}, 448),
        ("bitfit", {"train_norms": True}, 448),
        ("lora", QV | {"rank": 8}, 5_376),
        ("lora", {"rank": 8}, 26_880),
        ("qlora", {"rank": 8}, 26_880),
        ("dora", QV | {"rank": 8}, 5_664),
        ("adalora", QV | {"rank": 12}, 8_136),
        ("vera", QV | {"rank": 256}, 1_824),
        ("ia3", {}, 672),
        ("oft", QV | {"block_size": 16}, 2_880),
        ("prompt", {"virtual_tokens": 20}, 1_280),
        ("p-tuning", {"virtual_tokens": 20}, 13_760),
        ("prefix", {"virtual_tokens": 20}, 3_840),
        ("houlsby", {"bottleneck": 16}, 12_768),
        ("parallel", {"bottleneck": 16}, 6_384),
        ("io-adapter", {"bottleneck": 16}, 2 * (2 * 64 * 16 + 16 + 64)),
        ("compacter", {"bottleneck": 16}, 1_504),
    ],
)
def test_tiny_llama(tiny_model, method, settings, trainable):
    """Known from attached models. BOFT is added by test_registries."""
    report = count(resolve(RunSpec(model=str(tiny_model), method=method, sequence_length=96, **settings)))
    assert report.trainable_parameters == trainable and report.total_parameters == 195_008
    assert report.trainable_percent == pytest.approx(100 * trainable / 195_008)
    in_place = method in ("full", "head", "last-block", "bitfit")
    assert report.added_parameters == (0 if in_place else trainable)


@pytest.mark.parametrize(
    "model, method, settings, trainable",
    [
        ("llama-2-7b", "lora", QV | {"rank": 8}, 4_194_304),
        ("llama-2-70b", "lora", QV | {"rank": 64}, 131_072_000),
        ("gemma-3-270m", "lora", {"rank": 16, "target_modules": "query,value"}, 737_280),
        ("gemma-3-270m", "lora", {"rank": 64}, 15_187_968),
        ("llama-3.2-3b", "lora", QV | {"rank": 32}, 9_175_040),
        ("llama-3.2-3b", "dora", QV | {"rank": 32}, 9_289_728),
        ("llama-3.2-3b", "vera", QV | {"rank": 256}, 129_024),
        ("llama-3.2-3b", "ia3", {}, 286_720),
        ("llama-3.2-3b", "ln", {}, 175_104),
        ("llama-3.2-3b", "p-tuning", {"virtual_tokens": 20}, 28_382_208),
        ("llama-3.2-3b", "prefix", {"virtual_tokens": 200}, 11_468_800),
    ],
)
def test_published_models(model, method, settings, trainable):
    """Llama 3.2 3B is in `peft_benchmark.csv`; its prefix has 200 virtual tokens."""
    assert count(resolve(RunSpec(model=model, method=method, **settings))).trainable_parameters == trainable


@pytest.mark.parametrize("name", CONFIGS)
def test_the_chosen_modules_of_the_chosen_layers_are_counted(name, config_files):
    for settings in ({"rank": 13, "layers": "first:2"}, {"rank": 4, "layers": "0,2", "target_modules": "up,down"}):
        spec = RunSpec(model=config_files[name], **settings)
        report, adapted = count(resolve(spec)), attached(name, spec)
        assert report.trainable_parameters == adapted.get_nb_trainable_parameters()[0]
        assert (
            sum(m.trainable for m in report.modules) == sum(n for _, n in report.names) == report.trainable_parameters
        )
        kinds = [m.module for m in report.modules]
        assert sum((m.weight + m.bias) * m.count for m in kinds) == report.total_parameters


REFUSED = [("bitfit", "llama"), ("bitfit", "llama-tied"), ("bitfit", "gemma3"), ("oft", "gpt2")]
INPUTS = ("prompt", "p-tuning", "prefix")
"""What these train is put before the input, and in no module."""


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_each_modules_count_is_that_of_the_model(method, name, config_files):
    spec = RunSpec(model=config_files[name], method=method, sequence_length=96)
    if (method, name) in REFUSED:
        with pytest.raises(SpecError):
            count(resolve(spec))
        return
    report, known = count(resolve(spec)), dict(fresh(name).named_modules())
    trained = {n: p for n, p in attached(name, spec).named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == report.trainable_parameters == sum(dict(report.names).values())
    shapes = {e["name"]: tuple(e["shape"]) for e in report.to_dict()["modules"]}
    shared = METHODS[method].shared
    assert all(tuple(known[n].weight.shape) == shape for n, shape in shapes.items() if n not in shared)
    if method in INPUTS:
        return
    found = dict.fromkeys(dict(report.names), 0)
    for n, p in trained.items():
        own = n.removeprefix("base_model.model.")
        owner = max((m for m in known if own.startswith(m + ".")), key=len)
        alone = own.rpartition(".")[2]  # what all adapters share is held by the first of them
        found[alone if alone in shared else owner] += p.numel()
    assert found == dict(report.names)


@pytest.mark.parametrize("model", ["gpt2", "opt-125m", "opt-350m", "smollm2-135m", "llama-2-7b", "qwen3-0.6b"])
def test_bitfit_is_the_sum_of_the_biases(model):
    meta = configs.build_meta(MODELS[model].config)
    biases = sum(p.numel() for n, p in meta.named_parameters() if n.endswith("bias"))
    modules = [m for m in meta.modules() if "Norm" in type(m).__name__]
    norms = sum(m.weight.numel() for m in modules if getattr(m, "weight", None) is not None)
    spec = RunSpec(model=model, method="bitfit")
    assert count(resolve(spec.but(train_norms=True))).trainable_parameters == biases + norms
    if biases:
        for alone in (spec, spec.but(train_norms=False)):
            assert count(resolve(alone)).trainable_parameters == biases
    else:
        with pytest.raises(SpecError, match="has no bias to train"):
            count(resolve(spec))


@pytest.mark.parametrize("model", MODELS)
def test_a_head_is_vocabulary_by_hidden_and_new_where_it_was_tied(model):
    entry = MODELS[model]
    if entry.config is None or not entry.is_causal:
        return
    (head,) = [m for m in architecture.of(model).modules if m.head]
    report = count(resolve(RunSpec(model=model, method="head")))
    assert report.trainable_parameters == head.d_in * head.d_out + head.bias
    assert report.added_parameters == (head.d_in * head.d_out if head.tied else 0)
    assert report.adapter_bytes == 4 * report.trainable_parameters


def test_which_heads_are_tied():
    for model, added in {"gemma-3-270m": 262_144 * 640, "opt-1.3b": 50_272 * 2048, "llama-2-7b": 0}.items():
        assert count(resolve(RunSpec(model=model, method="head"))).added_parameters == added


def test_adapter_bytes_follow_the_precision(tiny_model):
    assert count(resolve(RunSpec(model=str(tiny_model)))).adapter_bytes == 4 * 26_880
    assert count(resolve(RunSpec(model=str(tiny_model), adapter_precision="bf16"))).adapter_bytes == 2 * 26_880
    assert count(resolve(RunSpec(model=str(tiny_model), method="full", precision="bf16"))).adapter_bytes == 2 * 195_008


def test_a_bare_count_cannot_be_counted():
    with pytest.raises(SpecError, match="7B.*no layers"):
        count(resolve(RunSpec(model="7B")))
