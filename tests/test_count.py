"""Counts against FACTS.md, against peft, and against the parameters that really require gradients."""

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
        ("rslora", {"rank": 8}, 26_880),
        ("lora-plus", {"rank": 8}, 26_880),
        ("pissa", {"rank": 8}, 26_880),
        ("dora", QV | {"rank": 8}, 5_664),
        ("adalora", QV | {"rank": 12}, 8_136),
        ("vera", QV | {"rank": 256}, 1_824),
        ("ia3", {}, 672),
        ("oft", QV | {"block_size": 16}, 2_880),
        ("prompt", {"virtual_tokens": 20}, 1_280),
        ("p-tuning", {"virtual_tokens": 20}, 13_760),
        ("prefix", {"virtual_tokens": 20}, 3_840),
        ("houlsby", {"bottleneck": 16}, 12_768),
        ("pfeiffer", {"bottleneck": 16}, 6_384),
        ("parallel", {"bottleneck": 16}, 6_384),
        ("post-attention", {"bottleneck": 16}, 6_384),
        ("io-adapter", {"bottleneck": 16}, 2 * (2 * 64 * 16 + 16 + 64)),
        ("compacter", {"bottleneck": 16}, 1_504),
    ],
)
def test_tiny_llama(tiny_model, method, settings, trainable):
    """FACTS.md, section 4. BOFT is added by test_registries."""
    report = count(resolve(RunSpec(model=str(tiny_model), method=method, sequence_length=96, **settings)))
    assert report.trainable_parameters == trainable and report.total_parameters == 195_008
    assert report.trainable_percent == pytest.approx(100 * trainable / 195_008)
    in_place = method in ("full", "head", "last-block", "bitfit")
    assert report.added_parameters == (0 if in_place else trainable)


def test_every_method_is_among_them():
    listed = {case[0] for mark in test_tiny_llama.pytestmark for case in mark.args[1]}
    assert listed == set(METHODS)


@pytest.mark.parametrize(
    "method, settings, trainable",
    [
        ("lora", QV | {"rank": 32}, 9_175_040),
        ("dora", QV | {"rank": 32}, 9_289_728),
        ("vera", QV | {"rank": 256}, 129_024),
        ("ia3", {}, 286_720),
        ("ln", {}, 175_104),
        ("p-tuning", {"virtual_tokens": 20}, 28_382_208),
        ("prefix", {"virtual_tokens": 200}, 11_468_800),
        ("prefix", {"virtual_tokens": 20}, 1_146_880),
    ],
)
def test_what_peft_published_of_llama_3_2_3b(method, settings, trainable):
    """`peft_benchmark.csv`; its prefix has 200 virtual tokens."""
    assert count(resolve(RunSpec(model="llama-3.2-3b", method=method, **settings))).trainable_parameters == trainable


@pytest.mark.parametrize(
    "model, rank, targets, trainable",
    [
        ("llama-2-7b", 8, "q_proj,v_proj", 4_194_304),
        ("llama-2-7b", 64, "q_proj,v_proj", 33_554_432),
        ("llama-2-70b", 64, "q_proj,v_proj", 131_072_000),
        ("gemma-3-270m", 8, "q_proj,v_proj", 368_640),
        ("gemma-3-270m", 16, "query,value", 737_280),
        ("gemma-3-270m", 64, "q_proj,v_proj", 2_949_120),
        ("gemma-3-270m", 8, "all-linear", 1_898_496),
        ("gemma-3-270m", 64, "all-linear", 15_187_968),
        ("llama-3.2-3b", 32, "q_proj,v_proj", 9_175_040),
    ],
)
def test_published_models(model, rank, targets, trainable):
    assert count(resolve(RunSpec(model=model, rank=rank, target_modules=targets))).trainable_parameters == trainable


LORA = [
    {"rank": 1}, {"rank": 8}, {"rank": 13}, {"rank": 4, "target_modules": "query,value"}, {"rank": 4, "target_modules": "down"},
    {"rank": 4, "layers": "last:1"}, {"rank": 4, "layers": "0,2", "target_modules": "up,down"},
]  # fmt: skip


@pytest.mark.parametrize("settings", LORA, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_lora_equals_peft(name, settings, config_files):
    spec = RunSpec(model=config_files[name], **settings)
    adapted = attached(name, spec)
    trainable = adapted.get_nb_trainable_parameters()[0]
    assert count(resolve(spec)).trainable_parameters == trainable
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == trainable


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


PUBLISHED = ["smollm2-135m", "gemma-3-270m", "llama-2-7b", "llama-3.1-70b", "gpt2-xl", "opt-1.3b", "qwen3-0.6b"]


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("m", [16, 64])
def test_adapters_follow_their_papers(model, m):
    """Houlsby et al., section 2.1: 2md + d + m an adapter, two a layer. Compacter: n³ that all share, and for each map a column
    and a row as long as its sizes, d + m, and the bias: 2(d + m) + d + m an adapter."""
    c = MODELS[model].config
    d, layers = c.get("hidden_size") or c["n_embd"], c.get("num_hidden_layers") or c["n_layer"]

    def trained(method):
        return count(resolve(RunSpec(model=model, method=method, bottleneck=m))).trainable_parameters

    assert trained("houlsby") == layers * 2 * (2 * d * m + m + d)
    for method in ("pfeiffer", "parallel", "post-attention"):
        assert 2 * trained(method) == trained("houlsby")
    assert trained("io-adapter") * layers == trained("houlsby")
    assert trained("compacter") == 4**3 + layers * 2 * (3 * d + 3 * m)


@pytest.mark.parametrize("model", [*PUBLISHED, "opt-350m"])
@pytest.mark.parametrize("p", [1, 20])
def test_virtual_tokens_follow_their_formulas(model, p):
    """FACTS.md, section 4, with h = d. OPT-350m projects its embedding: its vectors are as narrow as that."""
    c = MODELS[model].config
    d = c.get("word_embed_proj_dim") or c.get("hidden_size") or c["n_embd"]
    h, layers = d, c.get("num_hidden_layers") or c["n_layer"]
    heads = c.get("num_attention_heads") or c["n_head"]
    head_dim = c.get("head_dim") or (c.get("hidden_size") or c["n_embd"]) // heads
    kv = (c.get("num_key_value_heads") or heads) * head_dim

    def report(method):
        return count(resolve(RunSpec(model=model, method=method, virtual_tokens=p)))

    assert report("prompt").trainable_parameters == p * d
    tuned = report("p-tuning")
    assert tuned.trainable_parameters == p * d + (d * h + h) + (h * h + h) + (h * d + d)
    assert tuned.adapter_bytes == 4 * p * d  # the encoder is not saved
    assert report("prefix").trainable_parameters == 2 * p * layers * kv


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma-3-270m", "llama-2-7b", "opt-1.3b", "qwen3-0.6b"])
@pytest.mark.parametrize("b", [2, 16, 32])
def test_oft_has_one_rotation_for_each_block(model, b):
    """A rotation of b numbers has b(b − 1)/2 free ones."""
    linear = architecture.of(model).linear()
    expected = sum(m.count * (m.d_in // b) * b * (b - 1) // 2 for m in linear)
    assert count(resolve(RunSpec(model=model, method="oft", block_size=b))).trainable_parameters == expected


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
    tied = {k: next(m.tied for m in architecture.of(k).modules if m.head) for k in PUBLISHED}
    assert tied == dict.fromkeys(PUBLISHED, True) | {"llama-2-7b": False, "llama-3.1-70b": False}
    assert count(resolve(RunSpec(model="gemma-3-270m", method="head"))).added_parameters == 262_144 * 640


def test_full_counts_everything_once(config_files):
    for file in config_files.values():
        report = count(resolve(RunSpec(model=file, method="full")))
        assert report.trainable_parameters == report.total_parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_the_modules_add_up(name, config_files):
    report = count(resolve(RunSpec(model=config_files[name], rank=2, layers="first:2")))
    assert sum(m.trainable for m in report.modules) == report.trainable_parameters
    assert sum(trainable for _, trainable in report.names) == report.trainable_parameters
    kinds = [m.module for m in report.modules]
    assert sum((m.weight + m.bias) * m.count for m in kinds) == report.total_parameters
    assert all(".2." not in name for name, _ in report.names)


def test_adapter_bytes_follow_the_precision(tiny_model):
    assert count(resolve(RunSpec(model=str(tiny_model)))).adapter_bytes == 4 * 26_880
    assert count(resolve(RunSpec(model=str(tiny_model), adapter_precision="bf16"))).adapter_bytes == 2 * 26_880
    assert count(resolve(RunSpec(model=str(tiny_model), method="full", precision="bf16"))).adapter_bytes == 2 * 195_008


def test_a_bare_count_cannot_be_counted():
    with pytest.raises(SpecError, match="7B.*no layers"):
        count(resolve(RunSpec(model="7B")))
