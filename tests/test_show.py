"""What people read on the page, as HTML and text: said of results that are known, and with what is not ours escaped."""

import re
from html import escape
from types import SimpleNamespace

import pytest

from peftlab import PeftlabError, RunSpec, count, resolve
from peftlab.base import architecture, weights
from peftlab.base.models import DEFAULT
from peftlab.compare import lowrank
from peftlab.compare.proofs import Agreement, Flip, LatencyReport, MergeReport, Speed
from peftlab.lectures import published
from peftlab.lectures.guide import CASES
from peftlab.lectures.lessons import LESSONS
from peftlab.show import guide, lora, races, studies, weight_figures
from peftlab.show.comparisons import merged_said, timed
from peftlab.show.races import board, so_far, status
from peftlab.show.statements import statements_table

# --- races


def test_a_column_nobody_has_is_not_shown():
    assert "time a token" not in board(races.recorded("rank").lines, "score")["html"]


def test_what_is_not_ours_is_text():
    line = races.recorded("rank").lines[0]
    line = type(line)(**vars(line) | {"name": "<script>", "error": "<b>no"})
    assert "<script>" not in board([line], "score")["html"] and "<b>no" not in board([line], "score")["html"]


def test_findings_give_each_statement_its_verdict_and_its_interval():
    for lesson in LESSONS.values():
        lines = lesson.recordings()[0].lines
        said, found = statements_table(lesson.findings(lines)), lesson.findings(lines)
        assert [statement for statement, _ in found] == lesson.statements
        assert said.count("95% interval") == sum(each.interval is not None for _, each in found)
        for statement, each in found:
            assert escape(statement.says) in said and f">{each.verdict}</span>" in said


@pytest.mark.parametrize("key", LESSONS)
def test_findings_of_a_race_of_which_little_has_finished(key):
    """As they are asked for while a race runs here."""
    lines = races.recorded(key).lines
    assert statements_table(LESSONS[key].findings([])) == ""
    for n in range(min(8, len(lines))):
        statements_table(LESSONS[key].findings(lines[:n]))


def test_the_bar_counts_runs_and_names_who_runs():
    lines = [vars(line) | {"scores": [], "error": None} for line in races.recorded("rank").lines[:2]]
    events = [
        {"type": "racers", "lines": lines, "seeds": 2},
        {"type": "run", "racer": 0, "seed": 0, "event": {"type": "step", "step": 3, "loss": 1.5}},
    ]
    found = so_far(events)
    assert found.running == {0: [1.5]} and found.with_running()[0].losses == [*lines[0]["losses"], [1.5]]
    assert f"{found.lines[0].name}, step 3" in status(events, found)
    events.append({"type": "line", "racer": 0, "line": lines[0] | {"error": "it diverged"}})
    found = so_far(events)
    assert found.lines[0].error and found.running == {0: [1.5]} and "2 of 4 runs" in status(events, found)
    assert "Waiting: 3 ahead of yours" in status([{"type": "queued"}], so_far([]), ahead=3)


# --- the guide


def test_advice_is_of_what_is_ticked():
    ticked = [key for key, case in CASES.items() if case.ticked]
    text = guide.advice(iter(ticked), "gpt2")
    assert text.count('<section class="case">') == len(ticked) > 1 and "First try without training" in text
    assert "<b>LoRA</b> in 2 of 3" in text
    extreme = guide.advice(["gemma-extreme"], "gpt2")
    assert "Gemma 3 270M has no bias to train" in extreme and "does not hold" in extreme and "35,136" not in extreme
    assert "Tick" in guide.advice([], "gpt2")


def test_pros_and_cons_have_counts_of_the_model():
    text = guide.pros_and_cons("gpt2")
    for key in ("head", "houlsby", "prompt", "prefix", "lora"):
        assert f"{count(resolve(RunSpec(model='gpt2', method=key))).trainable_parameters:,} of 124,439,808" in text


def test_every_run_of_the_chart_is_in_its_table():
    text = guide.all_runs()
    assert text.count("<tr>") == 1 + len(published.runs())
    charts, said = guide.benchmark("memory", "accuracy")
    assert set(charts) == {"light", "dark"} and "7 of 63 runs" in said


# --- LoRA: studies, proofs, code


def test_the_picture_of_a_matrix_is_of_the_base_as_it_is_stored(tiny_model, monkeypatch):
    tiny = resolve(RunSpec(model=str(tiny_model), precision="fp32", quantization="none"))
    entry = weights.load(resolve(tiny)).entry
    monkeypatch.setattr(weight_figures, "MODELS", {DEFAULT: entry})
    monkeypatch.setattr(weight_figures, "architecture", SimpleNamespace(of=lambda _: architecture.of(str(tiny_model))))
    weight_figures._decomposed.cache_clear()
    weight, _ = weight_figures._decomposed("query", 1)
    assert weight.equal(
        weights.load(resolve(tiny)).model.get_submodule("model.layers.1.self_attn.q_proj").weight.detach().cpu()
    )
    assert weight_figures.images("query", 1, 4).count("<img") == 2
    with pytest.raises(PeftlabError, match="no query of layer 9"):
        weight_figures._decomposed("query", 9)
    weight_figures._decomposed.cache_clear()


def test_the_sentence_and_the_table_are_of_the_bundled_studies():
    name, of = next(iter(studies.bundled().items()))
    matrix = next(m for m in of.matrices if m.role == "query" and m.layer == 3)
    shown = studies.pictures(None, "query", 3)
    assert f">{matrix.weight.rank_for(0.9)}</b> of its 576" in shown["study"] and f"{name} <b" in shown["study"]
    assert [line["name"] for line in shown["energy"]["light"]["data"]] == ["W", *studies.bundled()]
    assert shown["energy"]["dark"]["data"][1]["y"][-1] == pytest.approx(100)
    assert len(shown["update_sizes"]["light"]["data"][0]["x"]) == 30
    assert re.findall(r"<td>rank of ΔW</td><td>(\d+)</td>", shown["matrix_table"]) == [str(matrix.delta.rank)]


def test_a_study_of_ones_own_comes_first_and_is_compared():
    mine = next(iter(studies.bundled().values()))
    shown = studies.pictures(mine, "value", 0)
    assert shown["energy"]["light"]["data"][1]["name"] == "yours" and "<th>yours</th>" in shown["matrix_table"]
    directions = next(m.directions for m in mine.matrices if m.role == "value" and m.layer == 0)
    overlap = lowrank.overlap(directions, directions, "left")
    assert shown["shared"]["light"]["data"][0]["z"] == [list(row) for row in overlap.grid]
    assert f"<b>{overlap.grid[-1][-1]:.2f}</b>" in shown["shared_said"]  # with itself: everything


def test_merging_is_told_with_its_numbers_and_texts_escaped():
    flip = Flip(7, "<b>", "&", 0.125)
    report = MergeReport(
        32.3, (Agreement("fp32", 9.8e-5, 40, (), 0, 9.8e-5), Agreement("bf16", 0.97, 40, (flip,), 1, 1))
    )
    said = merged_said(report)
    assert "<b>32.3</b>" in said and "<b>0.000098</b>" in said and "1 of 40" in said
    assert '<code>"&lt;b&gt;"</code> becomes <code>"&amp;"</code>' in said


def test_times_are_told_as_ratios_with_their_hardware():
    speeds = tuple(
        Speed(what, ms / 1000, ms / 1100, ms / 900, ms / 50, n, 10 * n)
        for what, ms, n in (("base", 50, 0), ("apart", 60, 420), ("merged", 49, 0), ("serial", 55, 180))
    )
    said = timed(LatencyReport("2 cores of X", {"torch": "2"}, "fp32", 16, 5, speeds))
    assert "2 cores of X" in said and re.findall(r"<b>([\d.]+)×</b>", said) == ["1.00", "1.20", "0.98", "1.10"]


def test_the_script_has_the_settings_on_screen():
    text = lora.code(RunSpec(model="gemma-3-270m", rank=16, target_modules="v_proj"))
    assert "nn.Linear(640, 256)" in text and "rank=16, alpha=32" in text
    assert "rank=256" in lora.code(RunSpec(model="gemma-3-270m", rank=300, target_modules="v_proj"))


def test_each_way_to_change_the_forward_pass_is_drawn_and_counted():
    text = lora.flows("llama-2-7b")
    for key in lora.FLOWS:
        assert f"{count(resolve(RunSpec(model='llama-2-7b', method=key))).trainable_parameters:,} parameters" in text
    assert text.count("<svg") == len(lora.FLOWS)
