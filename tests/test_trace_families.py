"""The exact trace of families that are unlike Llama: what runs in them on a GPU, and with which layers."""

import json

import pytest
import torch
from tiny import LLAMA
from torch._subclasses.fake_tensor import FakeTensorMode

from peftlab import RunSpec, methods, predict, resolve
from peftlab.base import architecture, configs
from peftlab.bench import families
from peftlab.memory import exact, kernels, shallow
from peftlab.memory import trace as tracing
from peftlab.memory.tape import GIVE
from peftlab.memory.trace import trace

KINDS = {
    "glm4_moe_lite": "heads of values unlike those of queries, a first layer without experts",
    "falcon": "attention that no interface looks up",
    "gpt_neo": "a list of kinds of layers in groups",
    "bart": "another depth of its encoder",
    "jamba": "kinds of layers by their period",
    "granitemoehybrid": "kinds of layers by list, state-space layers",
    "dbrx": "experts one after the other, each with its share of the tokens",
    "openai-gpt": "layers that give a list",
    "xlnet": "parameters that are made on the CPU",
    "mixtral": "experts in one product",
    "gemma3n_text": "layers that share keys, and an embedding for each layer",
}


@pytest.fixture
def family(tmp_path):
    """A function: the path of a family's tiny config, with changes."""

    def make(kind, **changes):
        path = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}.json"  # a trace is remembered by its model's name
        path.write_text(json.dumps(families.tiny(kind, "causal") | changes))
        return str(path)

    return make


def peak(model, **settings):
    defaults = {"batch_size": 2, "sequence_length": 64, "rank": 4, "precision": "bf16", "gpu": "h100-80gb"}
    return exact(resolve(RunSpec(model=model, **defaults | settings))).allocated


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_any_family_is_traced(kind, family, capfd):
    frozen, full = (peak(family(kind), method=method, sequence_length=16) for method in ("lora", "full"))
    assert frozen > 0 and full > 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["jamba", "granitemoehybrid", "gemma3n_text"])
def test_quantized_hybrids_are_traced(kind, family):
    assert peak(family(kind), method="qlora", sequence_length=16) > 0


def test_experts_in_one_product_are_traced_in_any_type(family, capfd):
    """torch's stand-in for that product knows bf16 alone."""
    half, full = (peak(family("mixtral"), method="lora", precision=p, sequence_length=16) for p in ("bf16", "fp32"))
    assert full > half and capfd.readouterr().err == ""


def test_alibi_is_a_mask_of_every_head(family):
    with_alibi, without = (peak(family("falcon", alibi=alibi), method="lora") for alibi in (True, False))
    assert with_alibi - without >= 2 * 64 * 64 * 2


def test_eager_attention_keeps_every_pair_of_tokens(family):
    """And is taken of itself where a family has nothing else."""
    model = family("gemma2")
    assert resolve(RunSpec(model=model)).attention == "eager"
    config = families.tiny("gemma2", "causal")
    first, second, third = (peak(model, method="lora", sequence_length=n) for n in (64, 128, 192))
    pairs = (
        2 * config["num_attention_heads"] * 64 * 64
    )  # what is left where all that grows with the length alone is taken away
    assert third - 2 * second + first > 2 * pairs * 2 * config["num_hidden_layers"]


def test_layers_of_a_kind_have_the_same_modules():
    dense = {"num_hidden_layers": 6, "mlp_layer_types": ["dense", *["sparse"] * 5]}
    for kind, changes, said in (("llama", {}, "aaaa"), ("glm4_moe_lite", dense, "abbbbb")):
        kinds = shallow.kinds(configs.build_meta(families.tiny(kind, "causal") | changes))
        names = dict(zip(dict.fromkeys(kinds), "abcdef", strict=False))
        assert "".join(names[kind] for kind in kinds) == said
    for kind in ("jamba", "granitemoehybrid"):
        assert len({*shallow.kinds(configs.build_meta(families.tiny(kind, "causal")))}) > 1


def test_layers_are_those_of_the_text(family):
    """Not those of the larger encoder of images beside them; where their parts lie in several lists, all are traced."""
    git = configs.build_meta(families.tiny("git", "causal") | {"num_hidden_layers": 2})
    assert len(shallow.layers(git)) == 2 < git.config.vision_config.num_hidden_layers
    xlm = configs.build_meta(families.tiny("xlm", "causal"))
    assert shallow.is_split(xlm) and shallow.kinds(xlm) == [0, 1, 2, 3] and not shallow.is_split(git)
    assert predict(resolve(RunSpec(model=family("xlm"), batch_size=2, sequence_length=16))).unknown


def test_a_skipped_layer_passes_on_what_it_is_given_and_answers_for_the_layer():
    """In the form of the layer before, and without parameters."""

    class Layer(torch.nn.Linear):
        kind = "sliding"

        beside = ("weights",)

        def forward(self, x, mask=None):
            return super().forward(x), *self.beside

    stack = torch.nn.ModuleList(Layer(3, 3) for _ in range(4))
    shallow.skip(stack, [0, 3])
    for beside in (("weights",), ()):
        stack[0].beside = beside
        first = stack[0](torch.ones(2, 3))
        given, *rest = stack[1](first[0], mask=None)
        assert given is first[0] and tuple(rest) == beside and stack[1].kind == "sliding"
    assert len(list(stack.parameters())) == 4


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("granitemoehybrid", {"num_hidden_layers": 12, "layer_types": ["mamba", "mamba", "attention"] * 4}),
        ("glm4_moe_lite", {"num_hidden_layers": 12, "mlp_layer_types": ["dense", *["sparse"] * 11]}),
        ("bart", {"decoder_layers": 12}),
        ("falcon_h1", {"num_hidden_layers": 12}),  # its layers give a tuple of one
    ],
)
def test_a_few_layers_are_as_good_as_all(kind, changes, family, monkeypatch):
    spec = resolve(RunSpec(model=family(kind, **changes), batch_size=2, sequence_length=16, precision="bf16"))
    few = trace(spec)
    monkeypatch.setattr("peftlab.memory.trace._known", {})
    monkeypatch.setattr(shallow, "shorten", lambda kinds: ([*range(len(kinds))], [*range(len(kinds))]))
    assert trace(spec) == few


def heads(layout, batch=2, heads=4, tokens=32, size=64, dtype=torch.bfloat16):
    x = torch.empty(batch, tokens, heads, size, dtype=dtype).transpose(1, 2)
    return (x if layout == "rows" else x.contiguous()).requires_grad_()


@pytest.mark.parametrize(
    "layout, size, values, dtype, masked, strides",
    [
        ("rows", 64, 64, torch.bfloat16, False, (8192, 64, 256, 1)), ("heads", 64, 64, torch.bfloat16, False, (8192, 2048, 64, 1)),
        ("heads", 192, 128, torch.bfloat16, False, (16384, 4096, 128, 1)), ("heads", 64, 64, torch.bfloat16, True, (8192, 2048, 64, 1)),
        ("heads", 64, 64, torch.float32, False, (8192, 64, 256, 1)), ("heads", 512, 512, torch.bfloat16, False, (65536, 512, 2048, 1)),
        ("rows", 36, 36, torch.bfloat16, False, (5120, 1280, 40, 1)), ("heads", 70, 70, torch.float32, False, (8960, 2240, 70, 1)),
    ],
)  # fmt: skip
def test_attention_is_laid_out_as_on_a_gpu(layout, size, values, dtype, masked, strides):
    """The strides of torch 2.11 on an H200; they decide whether what follows makes a copy."""
    with FakeTensorMode(), kernels.Fused():
        q, k, v = (heads(layout, size=n, dtype=dtype) for n in (size, size, values))
        mask = torch.ones(2, 1, 32, 32, dtype=torch.bool) if masked else None
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked)
        assert out.shape == (2, 4, 32, values) and out.stride() == strides
        out.sum().backward()
        assert (q.grad.shape, k.grad.shape, v.grad.shape) == (q.shape, k.shape, v.shape)


def test_an_output_that_lies_otherwise_than_its_reader_wants_is_copied(family):
    """As in Pythia: turning a part of each head lays queries out anew, so that full fine-tuning keeps a copy more a layer."""
    config, batch, length = families.tiny("gpt_neox", "causal"), 8, 256
    settings = {"method": "full", "batch_size": batch, "sequence_length": length, "precision": "bf16"}
    spec = resolve(RunSpec(model=family("gpt_neox"), **settings))
    targets = methods.targets(architecture.of(spec.model), spec)
    hidden = batch * length * config["hidden_size"] * 2
    tapes, _ = tracing._record(spec, configs.build_meta(config), [0, 1, 2, 3], targets, None, False)
    freed = {entry.key for entry in tapes["forward"] if entry.size == GIVE}
    kept = [e for e in tapes["forward"] if e.part == 1 and e.size == hidden and e.key not in freed]
    # the input, both norms' outputs, queries, keys, attention's output and its copy
    assert len(kept) == 7


def test_the_loss_of_virtual_tokens_is_computed_as_peft_does(tmp_path):
    (path := tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 32_000}))
    few, many = (peak(str(path), method="prompt", virtual_tokens=n, rank=None) for n in (4, 20))
    assert many - few >= 2 * 16 * 32_000 * 12
