"""Every method on every family: attached, counted, trained, saved, loaded, merged, and two at once, with the base untouched."""

import threading

import pytest
from tiny import digest, logits, run_of, small, steps

from peftlab import RunSpec, SpecError, adapters, count, hardware, resolve
from peftlab.base import weights
from peftlab.methods import METHODS

FAMILIES = ("llama-tied", "gemma3", "qwen2", "gpt2", "opt")
REFUSED = {
    ("bitfit", "llama-tied"): "has no bias to train.*set train-norms",
    ("bitfit", "gemma3"): "has no bias to train.*set train-norms",
    ("oft", "gpt2"): "Conv1D, which OFT in peft does not take",
}
CASES = [(m, f) for m in METHODS for f in FAMILIES if (m, f) not in REFUSED]


ROUNDING = 0 if hardware.here().device == "cpu" else 1e-4
"""A GPU adds up in any order."""


def stored(folder):
    from safetensors.torch import load_file

    return sum(t.numel() for t in load_file(folder / adapters.TENSORS).values())


def inside(model):
    """Every module's name, class and numbers of hooks."""
    return [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]


@pytest.mark.parametrize("method, family", list(REFUSED))
def test_what_does_not_suit_is_refused_with_its_reason(method, family, families, toy_task):
    with pytest.raises(SpecError, match=REFUSED[method, family]):
        count(resolve(RunSpec(model=families[family], method=method)))


@pytest.mark.parametrize("method, family", CASES)
def test_it_is_what_its_entry_says(method, family, families, toy_task, tmp_path):
    import torch

    spec = small(families[family], method)
    entry = METHODS[method]
    base = weights.load(spec)
    before, flags, modules = digest(base.model), [p.requires_grad for p in base.model.parameters()], inside(base.model)
    at_base = logits(base.model)
    run = run_of(spec, tmp_path)

    trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    report = count(spec)
    assert sum(p.numel() for p in trained.values()) == report.trainable_parameters > 0
    if hasattr(run.model, "get_nb_trainable_parameters"):
        assert run.model.get_nb_trainable_parameters()[0] == report.trainable_parameters
    assert sum(m["trainable"] for m in report.to_dict()["modules"]) == report.trainable_parameters
    saved = adapters.save(run.model, spec, tmp_path / "start")
    assert 4 * stored(saved) == report.adapter_bytes

    if entry.about.family != "prompt-based":
        assert (logits(run.model) - at_base).abs().max() < 1e-5
    start = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    seen = steps(run, 5)
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, start[n])}
    assert changed <= set(trained) and len(changed) > 0.8 * len(trained), set(trained) - changed
    assert all(torch.isfinite(torch.tensor(seen)))

    learned = logits(run.model)
    assert not torch.equal(learned, at_base)
    folder = adapters.save(run.model, spec, tmp_path / "adapter")
    again = adapters.apply(base, adapters.read(folder))
    assert torch.allclose(logits(again), learned, atol=1e-5)
    if entry.merge:
        whole = weights.load(resolve(spec.but(quantization="none")))
        merged = adapters.merge(whole, adapters.read(folder))
        apart = adapters.apply(whole, adapters.read(folder))
        assert torch.allclose(logits(merged), logits(apart), atol=1e-5)
        assert not [m for m in merged.modules() if "peft" in type(m).__module__ or "adapter" in dir(m)]
    else:
        with pytest.raises(SpecError, match=f"method={method}: it cannot be merged"):
            adapters.merge(base, adapters.read(folder))
    assert digest(base.model) == before and inside(base.model) == modules
    assert [p.requires_grad for p in base.model.parameters()] == flags and not any(flags)


PAIRS = [("qlora", "lora"), ("dora", "adalora"), ("pissa", "vera"), ("full", "bitfit"), ("head", "ln"), ("ia3", "oft"),
         ("prompt", "prefix"), ("p-tuning", "compacter"), ("parallel", "io-adapter")]  # fmt: skip


@pytest.mark.parametrize("pair, family", [(pair, FAMILIES[2 + i % 3]) for i, pair in enumerate(PAIRS)])
def test_two_at_once_equal_the_same_alone(pair, family, families, toy_task, tmp_path):
    """On one base. Methods that differ in what they train alone are left out."""
    import torch

    specs = [small(families[family], m, seed=i) for i, m in enumerate(pair)]

    def losses(*numbers):
        """Of runs of `specs`, each in a thread of its own, all at once."""
        seen = {}

        def work(i):
            run = run_of(specs[i], tmp_path / str(i))
            seen[i] = steps(run, 3), {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}
            run.close()

        threads = [threading.Thread(target=work, args=(i,)) for i in numbers]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return seen

    alone, both = losses(0) | losses(1), losses(0, 1)
    for i in range(2):
        assert both[i][0] == pytest.approx(alone[i][0], rel=ROUNDING, abs=0)
        assert all(torch.allclose(p, alone[i][1][n], rtol=0, atol=ROUNDING) for n, p in both[i][1].items())


def test_nothing_is_merged_into_a_quantized_base(families, toy_task, tmp_path):
    spec = small(families["llama-tied"], "qlora")
    folder = adapters.save(run_of(spec, tmp_path).model, spec, tmp_path / "adapter")
    with pytest.raises(SpecError, match="quantized base would round.*quantization none"):
        adapters.merge(weights.load(spec), adapters.read(folder))
