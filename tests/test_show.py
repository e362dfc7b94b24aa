"""What people read on the page, as HTML and text: said of results that are known, and with what is not ours escaped."""

import re
from dataclasses import replace
from html import escape
from types import SimpleNamespace

import pytest

from peftlab import PeftlabError, RunSpec, count, measured, predict, resolve, units
from peftlab.base import architecture, weights
from peftlab.base.models import DEFAULT
from peftlab.catalog.gpus import GPUS
from peftlab.compare import BASE, ComparisonReport, Exchange, Reply, lowrank, score_of
from peftlab.compare.proofs import Agreement, Flip, LatencyReport, MergeReport, Speed
from peftlab.lectures import published
from peftlab.lectures.guide import CASES
from peftlab.lectures.lessons import LESSONS
from peftlab.methods.selection import where
from peftlab.show import comparisons, guide, lora, marks, memory_figures, races, runs, settings, studies
from peftlab.show.statements import statements_table


def plain(sentence):
    return re.sub(r"<[^>]+>", "", sentence)


@pytest.mark.parametrize(
    ("say", "values"),
    [
        (units.size, {0: "0 B", 999: "999 B", 1000: "1 kB", 1_474_560: "1.47 MB", 3.24e9: "3.24 GB", 84e9: "84 GB",
                      800e9: "800 GB", 96363135072: "96.4 GB", 10e12: "10 TB", None: "not known"}),
        (units.significant, {0: "0", 3240: "3,240", 0.27497: "0.275", 100: "100", 0.00012345: "0.000123", 12.0: "12",
                             -1.234: "-1.23"}),
        (units.seconds, {0.44: "0.4 s", 41.2: "41 s", 150: "2 min 30 s"}),
        (units.operations, {1.61e10: "16.1 GFLOP", 1e9: "1 GFLOP", 9.5e8: "950 MFLOP", 2.5e12: "2.5 TFLOP",
                            6.02e17: "602 PFLOP", 0: "0 MFLOP"}),
        (marks.bold, {"<script>": "<b>&lt;script&gt;</b>"}),
    ],
)  # fmt: skip
def test_numbers_and_names_are_said_as_people_write_them(say, values):
    assert {value: say(value) for value in values} == values


def test_layers_are_named_by_their_numbers():
    for layers, said in {"first:4": " of layers 0-3", "1,3-4": " of layers 1,3-4", "0-31": "", None: ""}.items():
        spec = RunSpec(model="llama-2-7b", target_modules="q_proj,v_proj", layers=layers)
        assert where(resolve(spec)) == "q and v" + said


def memory(convention="exact", source="trace", **settings):
    """Two predictions and their sentence, as if they had been traced."""
    spec = RunSpec(**{"model": "llama-3.1-8b", "gpu": "h100-80gb"} | settings)
    both = predict(resolve(spec.but(method="full", quantization=None)), convention), predict(resolve(spec), convention)
    full, chosen = (replace(report, source=source) for report in both)
    return full, chosen, plain(memory_figures.memory_sentence(full, chosen))


@pytest.mark.parametrize("convention, verb", [("exact", "it fits"), ("12n", "these alone fit")])
def test_the_memory_sentence_is_true(convention, verb):
    full, chosen, said = memory(convention, rank=16)
    assert f"Full fine-tuning of Llama 3.1 8B needs {units.size(full.needed)}." in said
    ratio = units.significant(full.needed / chosen.needed)
    assert f"LoRA, rank 16 needs {units.size(chosen.needed)}: {ratio}× less, and {verb} one " in said
    gpu = next(g for g in GPUS.values() if said.endswith(f"{verb} one {settings.gpu_name(g)}."))
    assert gpu.memory_bytes >= chosen.needed
    assert not any(chosen.needed <= g.memory_bytes < gpu.memory_bytes for g in GPUS.values())
    if convention == "exact":
        assert full.needed == full.process > full.reserved > full.allocated > full.states
        assert memory(source="closed-form", rank=16)[2] == (  # an estimate is marked as one and names no GPU
            f"Full fine-tuning of Llama 3.1 8B needs about {units.size(full.needed)}. LoRA, rank 16 needs about "
            f"{units.size(chosen.needed)}: about {ratio}× less."
        )


@pytest.mark.parametrize("convention, verb", [("exact", "it takes"), ("8n", "these alone take")])
def test_the_memory_sentence_says_how_many_gpus_it_takes_and_when_peft_needs_more(convention, verb):
    _, chosen, said = memory(convention, model="gpt3-175b")
    largest = list(GPUS.values())[-1]
    n = -(-chosen.needed // largest.memory_bytes)
    assert n > 1 and said.endswith(f"and {verb} {n} × {settings.gpu_name(largest)}.")
    full, _, said = memory(convention, method="full")
    start, end = said.split(". ")
    assert start == f"Full fine-tuning of Llama 3.1 8B needs {units.size(full.needed)}"
    assert re.fullmatch(r"(It|These alone) (fits? one|takes? \d+ ×) [^.]+\.", end)
    full, chosen, said = memory(rank=4096, precision="bf16")
    assert chosen.needed > full.needed and "× more" in said and "× less" not in said


def at_peak(report, *kinds):
    return sum(report.peak.bytes[kind] for kind in kinds)


def kept_and_spared(full, chosen):
    """What is kept for fp32 adapters outweighs the states that are spared."""
    more = at_peak(chosen, "activations", "logits") - at_peak(full, "activations", "logits")
    spared = more - (chosen.allocated - full.allocated)
    assert 0 < spared < more
    return [units.size(more), units.size(spared)]


SMALL = {"precision": "bf16", "batch_size": 4, "sequence_length": 512}
GEMMA = {"model": "gemma-3-270m", **SMALL}
SURPRISES = {
    "LoRA needs more memory than full fine-tuning": ({"model": "smollm2-135m", "rank": 16, **SMALL}, kept_and_spared),
    "memory is only": ({"model": "qwen3-0.6b", **SMALL}, lambda f, c: [units.percent(1 - c.allocated / f.allocated)]),
    "The logits alone take": (GEMMA, lambda f, c: [units.size(at_peak(c, "logits")), "2,048 tokens"]),
    "Activations and logits are": (GEMMA, lambda f, c: [units.percent(at_peak(c, "activations", "logits") / c.allocated)]),
    "An adapted one keeps its input a second time": ({"precision": "bf16", "rank": 16}, lambda f, c: []),
    "experts of every layer": ({"model": "olmoe-1b-7b"}, lambda f, c: ["All 64 experts", "a token meets 8 of"]),
    "are paged": ({"method": "full", "optimizer": "paged-adamw-8bit"}, lambda f, c: [units.size(c.outside)]),
}  # fmt: skip
"""What each finding says, a run that it is found in, and the numbers that it gives."""


@pytest.mark.parametrize("said", SURPRISES)
def test_each_surprise_is_found_in_a_real_run_with_its_numbers(said):
    asked, numbers = SURPRISES[said]
    full, chosen, _ = memory(**asked)
    found = [plain(text) for text in memory_figures.memory_surprises(full, chosen)]
    (text,) = [text for text in found if said in text]
    assert all(number in text for number in numbers(full, chosen))
    assert not any("-" in number for text in found for number in re.findall(r"-?[\d.,]+ [kMGT]?B", text))


def test_nothing_is_a_surprise_where_a_convention_counts_or_little_is_kept():
    quiet = {"method": "full", "gradient_checkpointing": True, "batch_size": 1, "sequence_length": 64}
    for asked in ({"convention": "12n"}, quiet):
        assert memory_figures.memory_surprises(*memory(**asked)[:2]) == []


def test_the_live_sentence_follows_a_recorded_run_and_one_that_ended_or_waits():
    events = next(r for r in measured.runs() if r["spec"]["task"] == "ticket")["events"]
    seen = [{"type": "queued", "ahead": 0}, {"type": "loading", "model": "tiny"}, *events]
    said = [plain(runs.live_sentence(seen[:n])) for n in range(1, len(seen) + 1)]
    assert said[:2] == ["Starting the run.", "Loading tiny."]
    name, done = f"{events[0]['model']}", events[-1]
    assert said[2] == f"{name} answers {events[0]['heldout']} held-out items before it has learned anything."
    before, after = (units.score(done["eval"][when]["exact_match"]) for when in ("before", "after"))
    assert said[-1].startswith(
        f"{name} has read {[e for e in events if e['type'] == 'step'][-1]['examples']} examples in"
    )
    assert said[-1].endswith(f"Exact records: {before} → {after} on items it has never seen.")
    error = {"type": "error", "message": "<b>"}
    assert runs.live_sentence([error]) == "The run ended before it had learned anything."
    assert runs.live_sentence([{"type": "step"}, {"type": "step"}, error]) == "The run ended after 2 steps."
    assert runs.live_sentence([{"type": "queued", "ahead": 1}]) == "Waiting: 1 run ahead of yours."


def test_the_comparison_sentence_is_true():
    before, after = [0, 0, 1, 1], [1, 1, 0, 1]
    pairs = zip(before, after, strict=True)
    exchanges = tuple(Exchange("p", "r", (Reply(BASE, "", 0, b), Reply("mine", "", 0, a))) for b, a in pairs)
    forgot = {0.02: "0.02 nats a token worse: it forgot almost nothing", 0.2: "forgot a little", 0.9: "forgot a lot"}
    for forgetting, said in (forgot | {-0.1: "no worse than before", None: "loses 1."}).items():
        scores = score_of(BASE, before), score_of("mine", after, forgetting)
        text = plain(comparisons.compare_sentence(ComparisonReport("ticket", "exact_match", exchanges, scores)))
        assert text.startswith("The adapter wins 2 of 4, loses 1") and said in text


def test_the_board_leaves_out_empty_columns_and_escapes_what_is_not_ours():
    line = races.recorded("rank").lines[0]
    html = races.board([replace(line, name="<script>", error="<b>no")], "score")["html"]
    assert "<script>" not in html and "<b>no" not in html and "time a token" not in html


def test_findings_give_each_statement_its_verdict_and_its_interval():
    for lesson in LESSONS.values():
        lines = lesson.recordings()[0].lines
        said, found = statements_table(lesson.findings(lines)), lesson.findings(lines)
        assert [statement for statement, _ in found] == lesson.statements
        assert said.count("95% interval") == sum(each.interval is not None for _, each in found)
        for statement, each in found:
            assert escape(statement.says) in said and f">{each.verdict}</span>" in said
        assert statements_table(lesson.findings([])) == ""
        for n in range(min(8, len(lines))):  # as they are asked for while a race runs here
            statements_table(lesson.findings(lines[:n]))


def test_the_bar_counts_runs_and_names_who_runs():
    lines = [vars(line) | {"scores": [], "error": None} for line in races.recorded("rank").lines[:2]]
    events = [
        {"type": "racers", "lines": lines, "seeds": 2},
        {"type": "run", "racer": 0, "seed": 0, "event": {"type": "step", "step": 3, "loss": 1.5}},
    ]
    found = races.so_far(events)
    assert found[0].losses == [*lines[0]["losses"], [1.5]] and found[1].losses == lines[1]["losses"]
    assert f"{found[0].name}, step 3" in races.status(events, found)
    events.append({"type": "line", "racer": 0, "line": lines[0] | {"error": "it diverged"}})
    found = races.so_far(events)
    assert found[0].error and found[0].losses[-1] == [1.5] and "2 of 4 runs" in races.status(events, found)
    assert "Waiting: 3 ahead of yours" in races.status([{"type": "queued"}], races.so_far([]), ahead=3)


def test_advice_is_of_what_is_ticked():
    ticked = [key for key, case in CASES.items() if case.ticked]
    text = guide.advice(iter(ticked), "gpt2")
    assert text.count('<section class="case">') == len(ticked) > 1 and "First try without training" in text
    assert "<b>LoRA</b> in 2 of 3" in text
    extreme = guide.advice(["gemma-extreme"], "gpt2")
    assert "Gemma 3 270M has no bias to train" in extreme and "does not hold" in extreme and "35,136" not in extreme
    assert "Tick" in guide.advice([], "gpt2")


def test_pros_and_cons_have_counts_and_every_run_of_the_chart_is_in_its_table():
    text = guide.pros_and_cons("gpt2")
    for key in ("head", "houlsby", "prompt", "prefix", "lora"):
        assert f"{count(resolve(RunSpec(model='gpt2', method=key))).trainable_parameters:,} of 124,439,808" in text
    assert guide.all_runs().count("<tr>") == 1 + len(published.runs())


def test_the_picture_of_a_matrix_is_of_the_base_as_it_is_stored(tiny_model, monkeypatch):
    loaded = weights.load(resolve(RunSpec(model=str(tiny_model), precision="fp32", quantization="none")))
    monkeypatch.setattr(studies, "MODELS", {DEFAULT: loaded.entry})
    monkeypatch.setattr(studies, "architecture", SimpleNamespace(of=lambda _: architecture.of(str(tiny_model))))
    studies._decomposed.cache_clear()
    weight, _ = studies._decomposed("query", 1)
    assert weight.equal(loaded.model.get_submodule("model.layers.1.self_attn.q_proj").weight.detach().cpu())
    assert studies.images("query", 1, 4).count("<img") == 2
    with pytest.raises(PeftlabError, match="no query of layer 9"):
        studies._decomposed("query", 9)
    studies._decomposed.cache_clear()


def test_the_sentence_and_the_table_are_of_the_bundled_studies():
    name, of = next(iter(studies.bundled().items()))
    matrix = next(m for m in of.matrices if m.role == "query" and m.layer == 3)
    shown = studies.pictures(None, "query", 3)
    assert f">{matrix.weight.rank_for(0.9)}</b> of its 576" in shown["study"] and f"{name} <b" in shown["study"]
    assert [line["name"] for line in shown["energy"]["light"]["data"]] == ["W", *studies.bundled()]
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
    agreements = Agreement("fp32", 9.8e-5, 40, (), 0, 9.8e-5), Agreement("bf16", 0.97, 40, (flip,), 1, 1)
    said = comparisons.merged_said(MergeReport(32.3, agreements))
    assert "<b>32.3</b>" in said and "<b>0.000098</b>" in said and "1 of 40" in said
    assert '<code>"&lt;b&gt;"</code> becomes <code>"&amp;"</code>' in said


def test_times_are_told_as_ratios_with_their_hardware():
    speeds = tuple(
        Speed(what, ms / 1000, ms / 1100, ms / 900, ms / 50, n, 10 * n)
        for what, ms, n in (("base", 50, 0), ("apart", 60, 420), ("merged", 49, 0), ("serial", 55, 180))
    )
    said = comparisons.timed(LatencyReport("2 cores of X", {"torch": "2"}, "fp32", 16, 5, speeds))
    assert "2 cores of X" in said and re.findall(r"<b>([\d.]+)×</b>", said) == ["1.00", "1.20", "0.98", "1.10"]


def test_the_script_has_the_settings_on_screen_and_each_way_to_change_the_forward_pass_is_counted():
    text = lora.code(RunSpec(model="gemma-3-270m", rank=16, target_modules="v_proj"))
    assert "nn.Linear(640, 256)" in text and "rank=16, alpha=32" in text
    assert "rank=256" in lora.code(RunSpec(model="gemma-3-270m", rank=300, target_modules="v_proj"))
    text = lora.flows("llama-2-7b")
    for key in lora.FLOWS:
        assert f"{count(resolve(RunSpec(model='llama-2-7b', method=key))).trainable_parameters:,} parameters" in text
    assert text.count("<svg") == len(lora.FLOWS)


def test_a_race_that_the_hosts_time_ended_says_so():
    said = "It ended after 9 seconds, which is the most that a run may take here."
    done = {"type": "done", "lines": [], "stopped": True, "job_seconds": 9.0}
    assert f"{said} What has finished stands. Run here, live." in races.status([{**done, "message": said}], [])
    assert "Stopped; what has finished stands. Run here, live." in races.status([done], [])
    assert "Done. Run here, live." in races.status([{**done, "stopped": False, "message": said}], [])
