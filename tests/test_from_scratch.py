"""The layers that the LoRA tab shows as code are run, and what they make is held against peft's own layer."""

import ast
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peftlab import SpecError
from peftlab.show import lora


def made_by(source):
    """The names that a source text defines, once it has run."""
    names = {}
    exec(compile(source, "shown.py", "exec"), names)
    return names


def lecture(name):
    """One of the lecture's classes, made without the lines that run them into the error."""
    classes = [n for n in ast.parse(lora.LECTURE).body if isinstance(n, ast.Import | ast.ClassDef)]
    return made_by(ast.unparse(ast.Module(classes, [])))[name]


def peft_twin(layer, rank, alpha):
    """peft's layer on copies of the same W, b, A and B."""
    whole = torch.nn.ModuleDict({"linear": copy.deepcopy(layer.base)})
    model = get_peft_model(whole, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["linear"]))
    twin = model.base_model.model["linear"]
    twin.lora_A["default"].weight.data.copy_(layer.A)
    twin.lora_B["default"].weight.data.copy_(layer.B)
    return twin.eval()


def test_the_script_runs_as_it_is_shown_and_says_how_many_it_trains(capsys):
    made_by(lora.lora_layer(640, 1024, 8, 16.0))
    said = f"{8 * (640 + 1024):,} trained parameters beside {640 * 1024 + 1024:,} frozen ones: 2.03%\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("sizes", [(64, 32, 4, 8), (48, 48, 1, 16), (160, 64, 64, 2.5), (1, 1, 1, 1)], ids=str)
@torch.no_grad()
def test_its_layer_computes_what_pefts_does_and_so_does_the_merged_one(sizes):
    d_in, d_out, rank, alpha = sizes
    layer = made_by(lora.lora_layer(*sizes))["layer"]
    assert (layer.A.shape, layer.B.shape) == ((rank, d_in), (d_out, rank)) and layer.scale == alpha / rank
    x, before = torch.randn(7, d_in, generator=torch.Generator().manual_seed(1)), layer.base.weight.clone()
    layer.B.mul_(0.1)  # outputs near 1, so that 1e-6 means something in fp32
    twin, merged = peft_twin(layer, rank, alpha), layer.merge()
    assert not layer(x).allclose(layer.base(x), atol=1e-4)
    assert layer(x).allclose(twin(x), rtol=0, atol=1e-6)
    assert type(merged) is torch.nn.Linear and merged(x).allclose(twin(x), rtol=1e-5, atol=1e-5)
    twin.merge(safe_merge=True)
    assert merged.weight.allclose(twin.get_base_layer().weight, rtol=0, atol=1e-6) and layer.base.weight.equal(before)


def test_it_trains_only_a_and_b_which_start_as_pefts():
    torch.manual_seed(3)
    fresh = made_by(lora.lora_layer(400, 300, 16, 32))["LoRALinear"](torch.nn.Linear(400, 300), 16, 32)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {"A", "B"}
    end = 400**-0.5  # peft's `reset_lora_parameters` is Kaiming's with a = √5: uniform up to 1/√d_in
    assert fresh.A.abs().max() <= end and fresh.A.std().item() == pytest.approx(end / 3**0.5, rel=0.05)
    assert not fresh.B.any()


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((0, 8, 1, 1), "at least 1.*try 64"),
        ((8, 8, 0, 1), "at least 1.*try 8"),
        ((64, 6, 7, 1), "at most 6.*try 6"),
        ((8, 8, 2, 0), "more than 0.*try 4"),
        ((8, 8, 2, float("nan")), "more than 0.*try 4"),
    ],
)
def test_a_size_that_makes_no_layer_is_refused_in_words(sizes, words):
    with pytest.raises(SpecError, match=words):
        lora.lora_layer(*sizes)


def test_the_texts_fit_on_a_page():
    shown = lora.lora_layer(8192, 28672, 64, 16.5)
    assert "alpha=16.5" in shown and "alpha=16)" in lora.lora_layer(64, 64, 8, 16.0)
    assert max(map(len, shown.splitlines())) <= 120 and len(shown.splitlines()) < 50
    assert max(map(len, lora.LECTURE.splitlines())) <= 90


def test_the_lectures_script_runs_up_to_the_error_that_is_quoted(capsys):
    with pytest.raises(RuntimeError) as raised:
        made_by(lora.LECTURE)
    assert capsys.readouterr().out == "forward: (4, 1024)\n" and f"RuntimeError: {raised.value}" in lora.WHY


@pytest.mark.parametrize("d_in, d_out, rank", [(64, 32, 4), (16, 32, 16), (32, 16, 1), (32, 32, 4), (32, 32, 31)])
def test_the_lectures_merge_raises_on_every_ordinary_layer_square_ones_too(d_in, d_out, rank):
    layer = lecture("LoRALinear")(torch.nn.Linear(d_in, d_out), rank, alpha=2 * rank)
    before = layer.linear.weight.clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied" if d_in != d_out else "size of tensor"):
        layer.merge_weights()
    assert layer.linear.weight.equal(before)


@pytest.mark.parametrize("rank", [1, 32])
@torch.no_grad()
def test_a_square_layer_of_rank_1_or_full_rank_is_spoilt_without_a_word(rank):
    torch.manual_seed(0)
    layer = lecture("LoRALinear")(torch.nn.Linear(32, 32), rank, alpha=2 * rank)
    torch.nn.init.normal_(layer.lora.lora_B)
    a, b, scale, before = layer.lora.lora_A, layer.lora.lora_B, layer.lora.scaling, layer.linear.weight.clone()
    x = torch.randn(5, 32)
    apart = layer(x)
    right = torch.nn.functional.linear(x, before + (a @ b).T * scale, layer.linear.bias)
    assert right.allclose(apart, atol=1e-5)  # the fix that WHY names
    layer.merge_weights()
    assert (layer.linear(x) - apart).abs().max() > 0.1
    expected = (b @ a).T * scale if rank > 1 else ((b @ a).item() * scale) * torch.ones(32, 32)
    assert (layer.linear.weight - before).allclose(expected, atol=1e-6)
