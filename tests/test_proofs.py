"""The proofs on tiny models: what they report is recomputed here by other means."""

import math
from importlib.metadata import version

import numpy as np
import pytest
import torch
from tiny import digest, drain, ids_on, make_tokenizer, said, saved

from peftlab import RunSpec, SpecError, adapters, methods, resolve
from peftlab.compare import proofs
from peftlab.data import tasks
from peftlab.run.generate import Decoding

PROMPT = "what colour is the sky"


@pytest.fixture
def lora(tiny_model, tmp_path):
    return saved(tiny_model, "lora", tmp_path, rank=4)


def answered(model, base, adapter, max_new_tokens):
    """The ids of the prompt, and of what a model says to it."""
    ids = tasks.prompt_ids(base.tokenizer, tasks.find(adapter.spec.task).instruction, PROMPT)
    (tokens,) = said(model, [ids], Decoding(max_new_tokens), eos=base.tokenizer.eos_token_id)
    return ids, tokens


def test_the_merged_weight_is_w_plus_scaled_ba_and_the_dial_scales_it(lora):
    base, adapter = lora
    apart, merged = adapters.apply(base, adapter), adapters.merge(base, adapter)
    half = proofs._between(base.model, merged, 0.5)
    name = "model.layers.1.self_attn.v_proj"
    layer = apart.get_submodule(f"base_model.model.{name}")
    w, a, b = (
        t.weight.detach().double().cpu().numpy()
        for t in (base.model.get_submodule(name), layer.lora_A["default"], layer.lora_B["default"])
    )
    assert w.shape == (32, 64) and a.shape == (4, 64) and b.shape == (32, 4)
    for model, share in ((merged, 1.0), (half, 0.5), (proofs._between(base.model, merged, -2), -2)):
        found = model.get_submodule(name).weight.detach().cpu().numpy()
        assert np.abs(found - (w + share * (8 / 4) * b @ a)).max() < 1e-6
    untouched = "model.layers.1.input_layernorm"
    assert half.get_submodule(untouched).weight.data_ptr() == base.model.get_submodule(untouched).weight.data_ptr()


def test_agreement_counts_what_numpy_counts_on_a_small_matrix():
    apart = np.array([[0.0, 2.0, 1.0], [3.0, 2.5, 0.0], [1.0, 0.0, 5.0]], dtype=np.float32)
    merged = apart + np.array([[0.1, 0.0, 0.0], [-0.25, 0.5, 0.0], [0.0, 0.0, -0.75]], dtype=np.float32)
    tokenizer = make_tokenizer(chat=False)
    true = apart + np.float32(0.25)
    found = proofs._agreement("bf16", *(torch.tensor(m) for m in (apart, merged, true)), tokenizer)
    assert found.largest_difference == np.abs(apart - merged).max() == 0.75 and found.positions == 3
    assert found.flips == (proofs.Flip(1, tokenizer.decode([0]), tokenizer.decode([1]), 0.5),)
    assert (found.apart_off, found.merged_off) == (0.25, np.abs(merged - true).max())


def test_merging_is_exact_in_fp32_and_rounds_in_bf16_while_the_adapter_itself_moves_the_logits(lora):
    base, adapter = lora
    before = digest(base.model)
    report = proofs.merge_check(adapter, PROMPT, max_new_tokens=8)
    whole, rounded = report.agreements
    assert (whole.precision, rounded.precision) == ("fp32", "bf16")
    assert 0 < whole.largest_difference < 1e-4 < rounded.largest_difference < report.adapter_moves
    assert (whole.apart_off, whole.merged_off) == (0, whole.largest_difference)
    assert 1e-4 < rounded.apart_off < report.adapter_moves and rounded.merged_off < 4 * rounded.apart_off
    assert whole.flips == () and report.adapter_moves > 0.5
    apart = adapters.apply(base, adapter)
    prompt, answer = answered(apart, base, adapter, 8)
    assert whole.positions == rounded.positions == len(prompt + answer)
    ids = ids_on(base.model, [prompt + answer])
    with torch.no_grad():
        outs = [m(ids).logits.double().cpu().numpy() for m in (base.model, apart, adapters.merge(base, adapter))]
    assert report.adapter_moves == pytest.approx(abs(outs[1] - outs[0]).max(), rel=1e-4)
    assert whole.largest_difference == pytest.approx(abs(outs[1] - outs[2]).max(), rel=1e-3)
    assert digest(base.model) == before


def test_bf16_rounds_parameters_and_no_buffers_of_a_private_copy(lora):
    base, _ = lora
    copy = proofs._rounded(base.model)
    assert {str(p.dtype) for p in copy.parameters()} == {"torch.bfloat16"}
    assert {str(b.dtype) for b in copy.buffers()} == {"torch.float32"}
    assert {str(p.dtype) for p in base.model.parameters()} == {"torch.float32"}


@pytest.mark.parametrize("method", sorted(key for key, method in methods.METHODS.items() if method.merge))
def test_every_method_that_merges_can_be_checked_and_dialled(method, gpt2_model, tiny_model, tmp_path):
    model = gpt2_model if method == "bitfit" else tiny_model  # the Llama has no biases
    base, adapter = saved(model, method, tmp_path, noise=0.02)
    before = digest(base.model)
    report = proofs.merge_check(adapter, PROMPT, max_new_tokens=4)
    assert report.adapter_moves > 0 and report.agreements[0].largest_difference < 1e-4
    stops = dict(proofs.dial(adapter, PROMPT, max_new_tokens=6))
    assert tuple(stops) == (0, 0.5, 1, 1.5, 2)
    for stop, model in ((0, base.model), (1, adapters.apply(base, adapter))):
        _, tokens = answered(model, base, adapter, 6)
        assert stops[stop] == base.tokenizer.decode(tokens, skip_special_tokens=True)
    assert digest(base.model) == before


def test_a_tied_head_stays_tied_at_every_stop(tied_model, tmp_path):
    base, adapter = saved(tied_model, "full", tmp_path, noise=0.05)
    between = proofs._between(base.model, adapters.merge(base, adapter), 0.5)
    head, embedding = between.get_output_embeddings().weight, between.get_input_embeddings().weight
    assert head is embedding and not head.equal(base.model.get_input_embeddings().weight)


def test_latency_reports_all_four_with_what_they_add(lora):
    base, adapter = lora
    before = digest(base.model)
    shares, report = drain(proofs.latency(adapter, PROMPT, tokens=3, rounds=3))
    assert digest(base.model) == before
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1 and len(shares) == 4 * 4 + 1
    speeds = {s.what: s for s in report.speeds}
    assert list(speeds) == ["base", "apart", "merged", "serial"]
    for speed in speeds.values():
        assert 0 < speed.lower <= speed.seconds <= speed.upper
        assert speed.ratio == speed.seconds / speeds["base"].seconds
    assert (report.tokens, report.rounds, report.precision) == (3, 3, resolve(RunSpec()).precision)
    assert report.device and report.versions["torch"] == version("torch")
    added = {name: (s.added_modules > 0, s.added_parameters) for name, s in speeds.items()}
    assert added == {"base": (False, 0), "merged": (False, 0), "apart": (True, 13_440), "serial": (True, 12_768)}


@pytest.mark.parametrize(
    "method, proof, words",
    [
        ("houlsby", lambda adapter: proofs.merge_check(adapter, PROMPT), "method=houlsby: it cannot be merged"),
        ("houlsby", lambda adapter: next(proofs.dial(adapter, PROMPT)), "method=houlsby: it cannot be merged"),
        ("houlsby", lambda adapter: drain(proofs.latency(adapter, PROMPT)), "method=houlsby: it cannot be merged"),
        ("lora", lambda adapter: next(proofs.latency(adapter, PROMPT, rounds=1)), "rounds=1.*at least 2; try 5"),
        ("lora", lambda adapter: next(proofs.latency(adapter, PROMPT, tokens=0)), "tokens=0"),
        ("lora", lambda adapter: next(proofs.dial(adapter, PROMPT, (0, math.nan))), "stop=nan.*finite.*from 0 to 2"),
        ("lora", lambda adapter: proofs.merge_check(adapter, " "), "the prompt is empty"),
    ],
)
def test_what_proves_nothing_is_refused_in_words(method, proof, words, tiny_model, tmp_path):
    _, adapter = saved(tiny_model, method, tmp_path)
    with pytest.raises(SpecError, match=words):
        proof(adapter)
