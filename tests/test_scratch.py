"""The texts of scratch.py are run, and what they make is held against peft's own layer."""

import ast
import subprocess
import sys

import pytest

from peftlab import SpecError
from peftlab.lectures import scratch

SIZES = [(64, 32, 4, 8), (32, 64, 8, 8), (48, 48, 1, 16), (160, 64, 64, 2.5), (1, 1, 1, 1)]


def made_by(source):
    """The names that a source text defines, once it has run."""
    names = {}
    exec(compile(source, "shown.py", "exec"), names)
    return names


def lecture():
    """The lecture's classes, without the lines that run them into the error."""
    classes = [n for n in ast.parse(scratch.LECTURE).body if isinstance(n, ast.Import | ast.ClassDef)]
    return made_by(ast.unparse(ast.Module(classes, [])))


def run(source, tmp_path):
    file = tmp_path / "layer.py"
    file.write_text(source, encoding="utf-8")
    return subprocess.run([sys.executable, file], capture_output=True, text=True, cwd=tmp_path)


def peft_twin(layer, rank, alpha):
    """peft's layer on copies of the same W, b, A and B."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = copy.deepcopy(layer.base)

    model = get_peft_model(Wrapped(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["linear"]))
    twin = model.base_model.model.linear
    with torch.no_grad():
        twin.lora_A["default"].weight.copy_(layer.A)
        twin.lora_B["default"].weight.copy_(layer.B)
    return twin.eval()


def test_the_script_runs_as_it_is_shown_and_says_how_many_it_trains(tmp_path):
    done = run(scratch.lora_layer(640, 1024, 8, 16.0), tmp_path)
    assert done.returncode == 0, done.stderr
    rank_8 = 8 * (640 + 1024)
    assert done.stdout == f"{rank_8:,} trained parameters beside {640 * 1024 + 1024:,} frozen ones: 2.03%\n"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_its_layer_computes_what_pefts_does_and_so_does_the_merged_one(sizes):
    import torch

    d_in, d_out, rank, alpha = sizes
    names = made_by(scratch.lora_layer(*sizes))
    layer = names["layer"]
    assert (layer.A.shape, layer.B.shape) == ((rank, d_in), (d_out, rank)) and layer.scale == alpha / rank
    x = torch.randn(7, d_in, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.B.mul_(0.1)  # outputs near 1, so that 1e-6 means something in fp32
        twin = peft_twin(layer, rank, alpha)
        assert not layer(x).allclose(layer.base(x), atol=1e-4)
        assert layer(x).allclose(twin(x), rtol=0, atol=1e-6)
        assert layer.merge()(x).allclose(twin(x), rtol=1e-5, atol=1e-5)
        twin.merge(safe_merge=True)
        assert layer.merge().weight.allclose(twin.get_base_layer().weight, rtol=0, atol=1e-6)
    assert type(layer.merge()) is torch.nn.Linear


def test_it_starts_as_the_base_and_trains_only_a_and_b_and_a_starts_as_pefts():
    import torch

    names = made_by(scratch.lora_layer(400, 300, 16, 32))
    torch.manual_seed(3)
    fresh = names["LoRALinear"](torch.nn.Linear(400, 300), 16, 32)
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {"A", "B"}
    x = torch.randn(2, 400)
    assert fresh(x).equal(fresh.base(x))
    fresh(x).square().sum().backward()
    assert fresh.B.grad.abs().sum() > 0 and fresh.base.weight.grad is None
    theirs = torch.empty(16, 400)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)  # peft's `reset_lora_parameters`
    assert fresh.A.std().item() == pytest.approx(theirs.std().item(), rel=0.05)
    assert fresh.A.abs().max() <= 400**-0.5 and not fresh.B.any()


def test_merging_leaves_the_layer_itself_as_it_was():
    layer = made_by(scratch.lora_layer(24, 16, 2, 4))["layer"]
    before = layer.base.weight.clone()
    assert not layer.merge().weight.equal(before) and layer.base.weight.equal(before)


@pytest.mark.parametrize(
    "sizes, limit, fix",
    [
        ((0, 8, 1, 1), "at least 1", "try 64"),
        ((8, 8, 0, 1), "at least 1", "try 8"),
        ((64, 6, 7, 1), "at most 6", "try 6"),
        ((8, 8, 2, 0), "more than 0", "try 4"),
        ((8, 8, 2, float("nan")), "more than 0", "try 4"),
    ],
    ids=str,
)
def test_a_size_that_makes_no_layer_is_refused_in_words(sizes, limit, fix):
    with pytest.raises(SpecError, match=f"{limit}.*{fix}"):
        scratch.lora_layer(*sizes)


def test_the_texts_fit_on_a_page():
    shown = scratch.lora_layer(8192, 28672, 64, 16.5)
    assert "alpha=16.5" in shown and "alpha=16)" in scratch.lora_layer(64, 64, 8, 16.0)
    assert max(map(len, shown.splitlines())) <= 120 and len(shown.splitlines()) < 50
    assert max(map(len, scratch.LECTURE.splitlines())) <= 90


def test_the_lectures_script_runs_up_to_the_error_that_is_quoted(tmp_path):
    done = run(scratch.LECTURE, tmp_path)
    assert done.returncode == 1 and done.stdout == "forward: (4, 1024)\n"
    assert "layer.merge_weights()" in done.stderr
    assert done.stderr.splitlines()[-1] in scratch.WHY


@pytest.mark.parametrize(
    "d_in, d_out, rank", [(64, 32, 4), (32, 64, 4), (16, 32, 16), (32, 16, 1), (32, 32, 4), (32, 32, 31)]
)
def test_the_lectures_merge_raises_on_every_ordinary_layer_square_ones_too(d_in, d_out, rank):
    import torch

    layer = lecture()["LoRALinear"](torch.nn.Linear(d_in, d_out), rank, alpha=2 * rank)
    before = layer.linear.weight.clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied" if d_in != d_out else "size of tensor"):
        layer.merge_weights()
    assert layer.linear.weight.equal(before)


@pytest.mark.parametrize("rank", [1, 32])
def test_a_square_layer_of_rank_1_or_full_rank_is_spoilt_without_a_word(rank):
    import torch

    torch.manual_seed(0)
    layer = lecture()["LoRALinear"](torch.nn.Linear(32, 32), rank, alpha=2 * rank)
    torch.nn.init.normal_(layer.lora.lora_B)
    before = layer.linear.weight.clone()
    a, b, scale = layer.lora.lora_A, layer.lora.lora_B, layer.lora.scaling
    x = torch.randn(5, 32)
    with torch.no_grad():
        apart = layer(x)
        right = torch.nn.functional.linear(x, before + (a @ b).T * scale, layer.linear.bias)
        assert right.allclose(apart, atol=1e-5)  # the fix that WHY names
        layer.merge_weights()
        assert (layer.linear(x) - apart).abs().max() > 0.1
        added = layer.linear.weight - before
    expected = (b @ a).T * scale if rank > 1 else ((b @ a).item() * scale) * torch.ones(32, 32)
    assert added.allclose(expected, atol=1e-6)


def test_the_lectures_a_is_drawn_at_a_hundredth_where_its_text_says_kaiming():
    import torch

    torch.manual_seed(0)
    layer = lecture()["LoRALayer"](400, 300, rank=16)
    assert layer.lora_A.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer.lora_A.abs().max() < 400**-0.5 and not layer.lora_B.any()
