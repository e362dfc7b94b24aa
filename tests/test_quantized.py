"""Methods on a quantized base, which bitsandbytes runs on a CPU too."""

import hashlib
import importlib.util
import math

import pytest
import torch
from tiny import digest, ids_on, logits, moved, run_of, small, steps

from peftlab import RunSpec, SpecError, adapters, compare, resolve
from peftlab.base import weights
from peftlab.methods import METHODS
from peftlab.run import train
from peftlab.run.generate import Decoding
from peftlab.run.loop import attached, quickened

pytestmark = pytest.mark.usefixtures("toy_task")
KINDS = ["nf4", "int8"]
REFUSED = {
    **{m: "trains the base's own parameters.*set it to none, or use qlora" for m in METHODS if METHODS[m].in_place},
    "pissa": "takes W apart.*set it to none, or use qlora",
}
WORKING = [m for m in METHODS if m not in REFUSED]
EACH = pytest.mark.parametrize("kind", KINDS)
PAIRS = [(m, kind) for m in WORKING for kind in KINDS if kind == "nf4" or METHODS[m].about.reparameterized]
"""Only what is added to a linear map meets the type of its weight."""


def beside(model):
    """What bitsandbytes keeps beside the parameters: scales, and int8's own view of the weights."""
    for name, module in model.named_modules():
        state = getattr(module, "state", None)
        quantized = getattr(module._parameters.get("weight"), "quant_state", None)
        if quantized is not None:
            yield f"{name}.absmax", quantized.absmax
            yield f"{name}.code", quantized.code
            if quantized.nested:
                yield f"{name}.state2.absmax", quantized.state2.absmax
                yield f"{name}.offset", quantized.offset
        for held in ("CB", "SCB"):
            if getattr(state, held, None) is not None:
                yield f"{name}.{held}", getattr(state, held)


def whole_digest(model):
    total = hashlib.sha256(digest(model).encode())
    for name, tensor in beside(model):
        total.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@EACH
def test_the_linear_maps_are_quantized_and_nothing_else(kind, tied_model):
    base = weights.load(small(tied_model, "qlora", quantization=kind)).model
    stored = {"nf4": torch.uint8, "int8": torch.int8}[kind]
    for name, parameter in base.named_parameters():
        linear = name.endswith("proj.weight")
        assert parameter.dtype == (stored if linear else torch.float32), name
    assert len(list(beside(base))) == 21 * (4 if kind == "nf4" else 2)


@pytest.mark.parametrize("method, kind", PAIRS)
def test_it_trains_is_kept_and_comes_back(method, kind, tied_model, tmp_path):
    spec = small(tied_model, method, quantization=kind)
    base = weights.load(spec)
    before = whole_digest(base.model)
    at_base = logits(base.model)
    assert whole_digest(base.model) == before, "using the base changed it"
    run = run_of(spec, tmp_path)
    if METHODS[method].about.family != "prompt-based":
        assert (logits(run.model) - at_base).abs().max() < 1e-2
    assert all(map(math.isfinite, steps(run, 2)))
    learned = logits(run.model)
    assert (learned - at_base).abs().max() > 1e-3
    again = adapters.apply(base, adapters.read(adapters.save(run.model, spec, tmp_path / "adapter")))
    assert (logits(again) - learned).abs().max() < 1e-5
    assert whole_digest(base.model) == before
    assert logits(base.model).equal(at_base)


@pytest.mark.parametrize(
    "method, kind, said",
    [("qlora", "none", "set it to nf4 or int8, or use lora"), *((m, "nf4", said) for m, said in REFUSED.items())],
)
def test_a_method_refuses_the_wrong_base(method, kind, said, tied_model, tmp_path):
    spec = RunSpec(model=str(tied_model), method=method, quantization=kind, task="toy")
    with pytest.raises(SpecError, match=f"quantization={kind}: .*{said}"):
        list(train(resolve(spec), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_qlora_is_lora_on_nf4(tied_model, tmp_path):
    runs = [run_of(small(tied_model, m, quantization="nf4"), tmp_path) for m in ("qlora", "lora")]
    assert runs[0].base is runs[1].base
    assert steps(runs[0], 3) == steps(runs[1], 3)


@EACH
def test_a_share_copies_nothing_and_outlives_what_is_done_to_another(kind, tied_model):
    base = weights.load(small(tied_model, "qlora", quantization=kind)).model
    before, twin, other = logits(base), weights.share(base), weights.share(base)
    for (name, a), (_, b) in zip(base.named_parameters(), twin.named_parameters(), strict=True):
        assert a is not b and type(a) is type(b) and a.data_ptr() == b.data_ptr(), name
    ours, theirs = dict(beside(base)), dict(beside(twin))
    assert list(ours) == list(theirs)
    assert all(t.data_ptr() == theirs[name].data_ptr() for name, t in ours.items())
    assert not {id(m) for m in base.modules()} & {id(m) for m in twin.modules()}
    other.to("cpu")
    other.model.layers[0].self_attn.q_proj = None
    assert logits(twin).equal(before) and logits(base).equal(before)


def test_a_whole_run(tied_model, tmp_path):
    spec = RunSpec(model=str(tied_model), method="lora", quantization="nf4", task="toy", steps=3)
    (*_, done) = train(resolve(spec), tmp_path / "run")
    assert done["steps"] == 3 and isinstance(done["forgetting"], float)
    report = compare.on_prompt([adapters.read(done["adapter"])], "the cat", Decoding(3))
    assert len(report.exchanges[0].replies) == 2


def test_adapters_of_bases_quantized_differently_are_not_compared(tied_model, tmp_path):
    """Each learned to make up for its own base's rounding."""
    chosen = []
    for kind in ("none", "nf4", "int8"):
        spec = small(tied_model, "lora", quantization=kind)
        run = run_of(spec, tmp_path)
        steps(run, 3)
        chosen.append(adapters.read(adapters.save(run.model, spec, tmp_path / kind)))
    for pair in (chosen[:2], chosen[1:], [chosen[0], chosen[2]]):
        with pytest.raises(SpecError, match="different bases .*(nf4|int8)"):
            compare.models_of(pair)
    base, models = compare.models_of(chosen[1:2])
    assert base.model.is_quantized and list(models) == ["base", "nf4"]
    base, models = compare.models_of(chosen[1:2], merged=True)  # into the quantized one it would be rounded away
    assert not getattr(base.model, "is_quantized", False)
    assert torch.allclose(logits(models["nf4"]), logits(adapters.apply(base, chosen[1])), atol=1e-5)


def test_without_bitsandbytes_it_says_what_to_install(tied_model, monkeypatch, nothing_loaded):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(SpecError, match="quantization=nf4: .*pip install bitsandbytes, or set it to none"):
        weights.load(small(tied_model, "qlora"))


def test_lora_over_nf4_is_fused_and_the_same_function(tied_model):
    spec = small(tied_model, "qlora", quantization="nf4")
    base = weights.load(spec)
    ids = ids_on(base.model, [[5, 6, 7, 8], [9, 3, 4, 2]])
    seen = []
    for plain in (True, False):
        model = attached(base, spec)
        assert quickened(model, spec, plain).lora == (0 if plain else 21)
        trained = {n: p for n, p in moved(model, 0.05).named_parameters() if p.requires_grad}
        logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        seen.append((logits.detach(), {n: p.grad for n, p in trained.items()}))
    (want, slopes), (got, fused) = seen
    assert got.allclose(want, atol=1e-4)
    for name, slope in slopes.items():
        assert fused[name].allclose(slope, rtol=1e-3, atol=1e-5), name
