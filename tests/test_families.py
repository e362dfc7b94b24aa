"""Every family that transformers knows: tiny models of it, the survey of all of them, and its committed table."""

import json

import pytest

from peftlab import SpecError, measured
from peftlab.base import configs
from peftlab.bench import families, survey

TABLE = measured.MEASURED / "families-cpu.json"


def rows_of(file):
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize(
    "kind, task", [("llama", "causal"), ("arcee", "classification"), ("gpt_neox", "causal"), ("t5", "seq2seq")]
)
def test_a_family_is_surveyed_to_the_end(kind, task, monkeypatch):
    monkeypatch.setattr(survey, "_closed_form_error", lambda kind, task, file: 0.01)
    row = list(survey.look(kind, task))[-1]
    assert set(row) - {"family", "task", "methods"} == set(survey.STAGES if task == "causal" else survey.STAGES[:1])
    assert {row[stage] for stage in survey.STAGES[:-1] if stage in row} == {"ok"}, row
    assert not [said for said in row["methods"].values() if said.startswith("wrong")], row


def test_the_closed_form_is_held_against_the_trace_at_the_familys_own_size(tmp_path):
    error = survey._closed_form_error("gpt2", "causal", tmp_path / "config.json")
    assert abs(error) < survey.WITHIN


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "deepseek_v3", "mamba2", "t5gemma", "jamba"])
def test_a_tiny_model_is_small_and_has_every_kind_of_layer(kind):
    config, cls = configs.parsed(families.tiny(kind))
    assert cls.__name__ == families.tiny(kind)["architectures"][0] or kind == "gemma3"
    assert sum(p.numel() for p in configs.build_meta(families.tiny(kind)).parameters()) < 10**6
    usual = configs.stack(type(config)())
    for name in ("layer_types", "layers_block_type"):
        assert set(getattr(configs.stack(config), name, None) or ()) == set(getattr(usual, name, None) or ())


def test_a_tiny_model_is_the_same_each_time(tmp_path):
    first, second = (families.save("mixtral", tmp_path / name) / "model.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_a_survey_goes_on_where_it_was_stopped_and_repeats_what_is_asked(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        survey, "apart", lambda *key: made.append(key) or dict(zip(("family", "task"), key, strict=True))
    )
    out = tmp_path / "families.json"
    for only, again, new in ((["gpt2"], False, 2), (["gpt2", "t5"], False, 2), (["gpt2"], True, 2), (["t5"], False, 0)):
        survey.record_families(out, lambda said: None, only, again=again)
        assert len(made) == new
        made.clear()
    assert [(row["family"], row["task"]) for row in rows_of(out)] == [
        ("gpt2", "causal"), ("gpt2", "classification"), ("t5", "classification"), ("t5", "seq2seq"),
    ]  # fmt: skip
    document = json.loads(out.read_text())
    assert document["totals"]["causal"]["families"] == 1
    out.write_text(json.dumps(document | {"versions": {}}))
    survey.record_families(out, lambda said: None, ["gpt2"])
    assert len(made) == len(rows_of(out)) == 2  # of other versions, nothing is kept
    with pytest.raises(SpecError, match="family=nosuch: .*; name one"):
        survey.record_families(out, lambda said: None, ["nosuch"])


def test_what_gets_worse_is_named():
    row = {
        "family": "a",
        "task": "causal",
        "traced": "ok",
        "closed_form": 0.01,
        "methods": {"lora": "ok", "ia3": "refused: x"},
    }
    assert survey.worse([row], [row]) == survey.worse([row], []) == []
    new = row | {"traced": "refused: y", "closed_form": 0.2, "methods": {"lora": "wrong: 1 are counted", "ia3": "ok"}}
    assert survey.worse([row], [new]) == [
        "a/causal traced: refused: y", "a/causal lora: wrong: 1 are counted", "a/causal closed form: 20.0% from the trace",
    ]  # fmt: skip
    assert survey.worse([new], [row | {"methods": {"lora": "ok", "ia3": "ok"}}]) == []


@pytest.mark.survey
def test_nothing_is_worse_than_in_the_table(tmp_path):
    new = survey.record_families(tmp_path / "families.json", print, jobs=2)
    assert survey.worse(rows_of(TABLE), new["rows"]) == []
