"""The LoRA tab outside its picture: charts and words of real studies, the proofs' words, and the layer from scratch."""

import re

import pytest

gr = pytest.importorskip("gradio")

from demos import lora_visualizer, page, proving, real_weights
from peftlab import PeftlabError, RunSpec, count, lowrank
from peftlab.proofs import Agreement, Flip, LatencyReport, MergeReport, Speed


def test_the_sentence_and_the_table_are_of_the_bundled_studies():
    name, study = next(iter(real_weights.bundled().items()))
    matrix = next(m for m in study.matrices if m.role == "query" and m.layer == 3)
    said, kept, _, sizes, *_, table = real_weights.picture(None, "query", 3)
    assert f">{matrix.weight.rank_for(0.9)}</b> of its 576" in said and f"{name} <b" in said
    assert [line["name"] for line in kept["light"]["data"]] == ["W", *real_weights.bundled()]
    assert kept["dark"]["data"][1]["y"][-1] == pytest.approx(100)
    assert len(sizes["light"]["data"][0]["x"]) == 30
    assert re.findall(r"<td>rank of ΔW</td><td>(\d+)</td>", table) == [str(matrix.delta.rank)]


def test_a_study_of_ones_own_comes_first_and_is_compared():
    mine = next(iter(real_weights.bundled().values()))
    _, kept, _, _, shared, shared_said, table = real_weights.picture(mine, "value", 0)
    assert kept["light"]["data"][1]["name"] == "yours" and "<th>yours</th>" in table
    directions = next(m.directions for m in mine.matrices if m.role == "value" and m.layer == 0)
    overlap = lowrank.overlap(directions, directions, "left")
    assert shared["light"]["data"][0]["z"] == [list(row) for row in overlap.grid]
    assert f"<b>{overlap.grid[-1][-1]:.2f}</b>" in shared_said  # with itself: everything


def test_a_matrix_that_no_adapter_changes_is_refused_in_words():
    with pytest.raises(PeftlabError, match="no studied adapter changes the up of layer 0"):
        real_weights.picture(None, "up", 0)


def test_merging_is_told_with_its_numbers_and_texts_escaped():
    flip = Flip(7, "<b>", "&", 0.125)
    report = MergeReport(
        20, "yes", 32.3, (Agreement("fp32", 9.8e-5, 40, (), 0, 9.8e-5), Agreement("bf16", 0.97, 40, (flip,), 1, 1))
    )
    said = proving.merged_said(report)
    assert "<b>32.3</b>" in said and "<b>0.000098</b>" in said and "1 of 40" in said
    assert '<code>"&lt;b&gt;"</code> becomes <code>"&amp;"</code>' in said


def test_times_are_told_as_ratios_with_their_hardware():
    speeds = tuple(
        Speed(what, ms / 1000, ms / 1100, ms / 900, ms / 50, n, 10 * n)
        for what, ms, n in (("base", 50, 0), ("apart", 60, 420), ("merged", 49, 0), ("serial", 55, 180))
    )
    said = proving.timed(LatencyReport("m", "2 cores of X", {"torch": "2"}, "fp32", 9, 16, 5, speeds))
    assert "2 cores of X" in said and re.findall(r"<b>([\d.]+)×</b>", said) == ["1.00", "1.20", "0.98", "1.10"]


def test_the_script_has_the_settings_on_screen():
    text = lora_visualizer.code(RunSpec(model="gemma-3-270m", rank=16, target_modules="v_proj"))
    assert "nn.Linear(640, 256)" in text and "rank=16, alpha=32" in text
    assert "rank=256" in lora_visualizer.code(RunSpec(model="gemma-3-270m", rank=300, target_modules="v_proj"))


def test_each_way_to_change_the_forward_pass_is_drawn_and_counted():
    page_ = lora_visualizer.flows("llama-2-7b")
    for key in lora_visualizer.FLOWS:
        assert f"{count(RunSpec(model='llama-2-7b', method=key)).trainable_parameters:,} parameters" in page_
    assert page_.count("<svg") == len(lora_visualizer.FLOWS)


def test_settings_of_a_model_that_is_gone_are_not_taken():
    with gr.Blocks():
        view = lora_visualizer.build(gr.State(page.OPENING), gr.BrowserState([]))
    assert len(view.show(page.OPENING)) == len(view.outputs)
    refused = view.show(RunSpec(model="100B"))
    assert len(refused) == len(view.outputs) and "100B" in refused[0]
