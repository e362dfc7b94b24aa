"""Updates and studies of adapters on tiny real models, against numpy and the tensors that were saved."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import digest, drain, saved

from peftlab import AdapterError, RunSpec, SpecError, adapters
from peftlab.base import architecture
from peftlab.compare import lowrank, study
from peftlab.methods import METHODS


def stored(base, name):
    """A base's weight, d_out × d_in."""
    module = base.model.get_submodule(name)
    weight = module.weight.data.float().cpu()
    return weight.T if type(module).__name__ == "Conv1D" else weight


@pytest.mark.parametrize(
    "model, precision, alpha", [("tiny_model", "bf16", 12), ("gpt2_model", "fp32", 12), ("tiny_model", "fp32", 1e-4)]
)
def test_loras_update_is_ba_times_its_scale_and_of_its_rank(model, precision, alpha, request, tmp_path):
    """A small alpha is as after one step: an fp32 sum would leave only the sum's rounding."""
    folder = request.getfixturevalue(model)
    base, adapter = saved(folder, "lora", tmp_path, rank=4, alpha=alpha, precision=precision, adapter_precision="fp32")
    before, found = digest(base.model), study.updates(base, adapter)
    kinds = architecture.of(str(folder)).linear()
    assert {u.name for u in found} == {name for kind in kinds for _, name in kind.names()}
    tensors = load_file(adapter.folder / adapters.TENSORS)
    for u in found:
        a, b = (tensors[f"base_model.model.{u.name}.lora_{side}.weight"].cpu() for side in "AB")
        assert u.delta.allclose(b @ a * (alpha / 4), rtol=0, atol=1e-6 * alpha)
        assert u.weight.equal(stored(base, u.name)) and u.weight.shape == (u.module.d_out, u.module.d_in)
        assert lowrank.spectrum(u.delta).rank == 4 and f".{u.layer}." in u.name and u.delta.dtype == torch.float32
    assert digest(base.model) == before


@pytest.mark.parametrize("model, method", [("gpt2_model", "full"), ("tied_model", "last-block")])
def test_of_weights_trained_in_place_it_is_the_difference(model, method, request, tmp_path):
    folder = request.getfixturevalue(model)
    base, adapter = saved(folder, method, tmp_path)
    before, found = digest(base.model), [u for u in study.updates(base, adapter) if not u.module.head]
    tensors = load_file(adapter.folder / adapters.TENSORS)
    linear = {n for kind in architecture.of(str(folder)).linear() for _, n in kind.names() if f"{n}.weight" in tensors}
    assert {u.name for u in found} == linear and digest(base.model) == before
    for u in found:
        tuned = tensors[f"{u.name}.weight"].T if u.module.kind == "conv1d" else tensors[f"{u.name}.weight"]
        assert u.delta.allclose(tuned.cpu() - stored(base, u.name), rtol=0, atol=1e-6)
        assert lowrank.spectrum(u.delta).rank == min(u.delta.shape)
    assert {u.layer for u in found} == ({2} if method == "last-block" else {0, 1, 2})


LIKE_LORA = {"lora", "lora-plus", "rslora", "qlora"}


@pytest.mark.parametrize("method", [key for key, m in METHODS.items() if m.merge and key not in {*LIKE_LORA, "bitfit"}])
def test_whatever_merges_has_an_update_that_makes_the_merged_weight(method, tiny_model, tmp_path):
    base, adapter = saved(tiny_model, method, tmp_path, sequence_length=96)
    found, merged = study.updates(base, adapter), adapters.merge(base, adapter)
    assert bool(found) == (method != "ln")
    for u in found:
        assert (u.weight + u.delta).allclose(merged.get_submodule(u.name).weight.cpu(), rtol=0, atol=1e-4)
    rest = {n for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)} - {u.name for u in found}
    assert all(merged.get_submodule(n).weight.equal(base.model.get_submodule(n).weight) for n in rest)


def test_only_what_is_named(tiny_model, tmp_path):
    base, adapter = saved(tiny_model, "lora", tmp_path, target_modules="query,value", layers="last:2")
    value = "model.layers.2.self_attn.v_proj"
    (only,) = study.updates(base, adapter, [value, "model.layers.0.self_attn.v_proj"])  # layer 0 has no adapter
    assert (only.name, only.layer, only.module.role) == (value, 2, "value")
    with pytest.raises(SpecError, match=r"v_proj is no linear map of .*; its first is model\.layers\.0"):
        study.updates(base, adapter, ["v_proj"])


def test_a_study_says_of_each_matrix_what_the_functions_do(tiny_model, tmp_path):
    base, adapter = saved(tiny_model, "lora", tmp_path, rank=4, target_modules="query,value")
    shares, found = drain(study.study(base, adapter, keep=3))
    assert shares == pytest.approx([n / 6 for n in range(7)])
    assert (found.adapter, found.model, found.method) == ("lora", str(tiny_model), "lora")
    for m, u in zip(found.matrices, study.updates(base, adapter), strict=True):
        w, d = u.weight.cpu().numpy(), u.delta.cpu().numpy()
        assert (m.name, m.layer, m.shape) == (u.name, u.layer, w.shape)
        assert (m.role, m.short_name) in {("query", "q_proj"), ("value", "v_proj")}
        assert m.weight.values == pytest.approx(np.linalg.svd(w, compute_uv=False), rel=1e-3, abs=1e-5)
        assert m.delta.rank == 4 == m.amplification.directions
        assert m.relative_size == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w), rel=1e-5)
        assert m.amplification == lowrank.amplification(u.weight, u.delta, 4)
        assert m.intruders == lowrank.intruders(u.weight, u.weight + u.delta) and len(m.intruders.cosines) == 10
        assert m.directions == lowrank.directions(u.delta, 3) and m.directions.count == 3


@pytest.mark.parametrize("keep", [0, 2])
def test_a_study_survives_its_file_whose_lines_are_its_matrices(keep, gpt2_model, tmp_path):
    base, adapter = saved(gpt2_model, "lora", tmp_path, target_modules="c_attn")
    assert study.recorded(adapter) is None
    found = drain(study.study(base, adapter, [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)], keep))[1]
    text = found.to_json()
    first, *lines, last = text.splitlines()
    assert json.loads(text) == found.to_dict() and first.endswith('"matrices":[') and last == "]}"
    assert [json.loads(line.rstrip(","))["name"] for line in lines] == [m.name for m in found.matrices]
    assert ", " not in text and ": " not in text and "NaN" not in text
    (adapter.folder / study.FILE).write_text(text)
    again = study.recorded(adapter)
    assert again.to_dict() == found.to_dict()
    one, other = found.matrices[1], again.matrices[1]
    assert (other.directions, other.shape) == (one.directions, (192, 64)) and (one.directions is None) == (keep == 0)
    assert other.weight.values == pytest.approx(one.weight.values, rel=5e-4)
    assert other.amplification.factor == pytest.approx(one.amplification.factor, rel=2e-3)
    assert max(len(str(value)) for value in other.weight.values) <= 9


def test_a_recorded_study_that_cannot_be_read_is_refused(tmp_path):
    for text in ("", "{", "[]", "{}", '{"adapter":"a","model":"m","method":null,"matrices":[{}]}'):
        (tmp_path / study.FILE).write_text(text)
        with pytest.raises(
            AdapterError, match=r"study\.json: cannot be read .*write it again with python -m peftlab study"
        ):
            study.recorded(adapters.Adapter(tmp_path, RunSpec(), {}))


def of(model, method, **settings):
    return adapters.Adapter(model, RunSpec(model=str(model), method=method, **settings), {})


@pytest.mark.parametrize(
    "model, method, settings, short_names, layers",
    [
        ("tiny_model", "lora", {}, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 3),
        ("tiny_model", "lora", {"target_modules": "query,down", "layers": "last:2"}, {"q_proj", "down_proj"}, 2),
        ("tiny_model", "lora", {"target_modules": "value,lm_head"}, {"v_proj"}, 3),
        ("tiny_model", "ia3", {}, {"k_proj", "v_proj", "down_proj"}, 3),
        ("tiny_model", "ln", {}, set(), 0),
        ("gpt2_model", "full", {}, {"c_attn"}, 3),
    ],
)
def test_unasked_it_is_what_the_adapter_adapts(model, method, settings, short_names, layers, request):
    names = study.names(of(request.getfixturevalue(model), method, **settings))
    assert {name.rpartition(".")[2] for name in names} == short_names and len(names) == len(short_names) * layers


def test_of_an_unknown_method_it_is_every_linear_map_and_only_what_changed_is_studied(tiny_model, tmp_path):
    base, adapter = saved(tiny_model, "lora", tmp_path, target_modules="key")
    (adapter.folder / adapters.MANIFEST).unlink()
    elsewhere = adapters.read(adapter.folder)
    names = study.names(elsewhere)
    assert len(names) == 7 * 3 and "lm_head" not in names
    assert {u.module.role for u in study.updates(base, elsewhere, names)} == {"key"}


def test_asked_it_is_what_is_named(tiny_model):
    adapter = of(tiny_model, "lora", target_modules="query")
    assert study.names(adapter, "lm_head") == ["lm_head"]
    assert study.names(adapter, "gate,v_proj")[::3] == [f"model.layers.0.{n}_proj" for n in ("mlp.gate", "self_attn.v")]
    with pytest.raises(SpecError, match="^targets=c_attn: .* it has q_proj, k_proj"):
        study.names(adapter, "c_attn")
    with pytest.raises(SpecError, match="^targets is empty; leave it out"):
        study.names(adapter, " ,")
