import re
from dataclasses import replace

import pytest

from peftlab import RunSpec, predict, resolve, units
from peftlab.catalog import GPUS
from peftlab.compare import BASE, ComparisonReport, Exchange, Reply, score_of
from peftlab.methods.selection import where
from peftlab.show import sentences
from peftlab.show.marks import bold
from peftlab.show.settings import gpu_name


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
    ],
)  # fmt: skip
def test_numbers_are_said_with_their_units(say, values):
    assert {value: say(value) for value in values} == values


@pytest.mark.parametrize(
    "layers, said", [("first:4", " of layers 0-3"), ("1,3-4", " of layers 1,3-4"), ("0-31", ""), (None, "")]
)
def test_layers_are_named_by_their_numbers(layers, said):
    spec = RunSpec(model="llama-2-7b", target_modules="q_proj,v_proj", layers=layers)
    assert where(resolve(spec)) == "q and v" + said


def plain(sentence):
    return re.sub(r"<[^>]+>", "", sentence)


def memory(convention="exact", source="trace", **settings):
    """Two predictions and their sentence, as if they had been traced."""
    spec = RunSpec(**{"model": "llama-3.1-8b", "gpu": "h100-80gb"} | settings)
    both = predict(resolve(spec.but(method="full", quantization=None)), convention), predict(resolve(spec), convention)
    full, chosen = (replace(report, source=source) for report in both)
    return full, chosen, plain(sentences.memory_sentence(full, chosen))


@pytest.mark.parametrize("convention, verb", [("exact", "it fits"), ("12n", "these alone fit")])
def test_the_memory_sentence_is_true(convention, verb):
    full, chosen, said = memory(convention, rank=16)
    assert f"Full fine-tuning of Llama 3.1 8B needs {units.size(full.needed)}." in said
    ratio = units.significant(full.needed / chosen.needed)
    assert f"LoRA, rank 16 needs {units.size(chosen.needed)}: {ratio}× less, and {verb} one " in said
    gpu = next(g for g in GPUS.values() if said.endswith(f"{verb} one {gpu_name(g)}."))
    assert gpu.memory_bytes >= chosen.needed
    assert not any(chosen.needed <= g.memory_bytes < gpu.memory_bytes for g in GPUS.values())


def test_an_estimate_is_marked_as_one_and_names_no_gpu():
    full, chosen, said = memory(source="closed-form", rank=16)
    ratio = units.significant(full.needed / chosen.needed)
    assert said == (
        f"Full fine-tuning of Llama 3.1 8B needs about {units.size(full.needed)}. LoRA, rank 16 needs about "
        f"{units.size(chosen.needed)}: about {ratio}× less."
    )


def test_the_memory_sentence_counts_what_nvidia_smi_shows():
    full, _, said = memory()
    assert full.needed == full.process and f"needs {units.size(full.process)}." in said
    assert full.process > full.reserved > full.allocated > full.states


def test_the_memory_sentence_of_full_fine_tuning_alone():
    full, _, said = memory(method="full")
    largest = list(GPUS.values())[-1]
    n = -(-full.needed // largest.memory_bytes)
    assert said.startswith("Full fine-tuning of Llama 3.1 8B needs") and "less" not in said
    assert said.endswith(f"It fits one {gpu_name(largest)}." if n == 1 else f"It takes {n} × {gpu_name(largest)}.")


@pytest.mark.parametrize("convention, verb", [("exact", "it takes"), ("8n", "these alone take")])
def test_the_memory_sentence_says_how_many_gpus(convention, verb):
    _, chosen, said = memory(convention, model="gpt3-175b")
    largest = list(GPUS.values())[-1]
    n = -(-chosen.needed // largest.memory_bytes)
    assert n > 1 and said.endswith(f"and {verb} {n} × {gpu_name(largest)}.")


def test_the_memory_sentence_says_when_peft_needs_more():
    full, chosen, said = memory(rank=4096, precision="bf16")
    assert chosen.needed > full.needed and "× more" in said and "× less" not in said


SMALL = {"precision": "bf16", "batch_size": 4, "sequence_length": 512}
SURPRISES = {
    "needs more memory than full fine-tuning": {"model": "smollm2-135m", "rank": 16, **SMALL},
    "memory is only": {"model": "qwen3-0.6b", **SMALL},
    "The logits alone take": {"model": "gemma-3-270m", **SMALL},
    "Activations and logits are": {"model": "gemma-3-270m", **SMALL},
    "An adapted one keeps its input a second time": {"precision": "bf16", "rank": 16},
    "of optimizer states are paged": {"method": "full", "optimizer": "paged-adamw-8bit"},
}
"""What each finding says, and a run that it is found in."""


def surprises(**settings):
    full, chosen, _ = memory(**settings)
    return full, chosen, [plain(text) for text in sentences.memory_surprises(full, chosen)]


@pytest.mark.parametrize("said", SURPRISES)
def test_each_surprise_is_found_in_a_real_run(said):
    _, _, found = surprises(**SURPRISES[said])
    assert sum(said in text for text in found) == 1
    assert all(re.search(r"\d (B|kB|MB|GB|TB)\b|\d%", text) or "second time" in text for text in found)
    assert not any("-" in number for text in found for number in re.findall(r"-?[\d.,]+ [kMGT]?B", text))


def test_lora_of_a_small_model_takes_more_than_full_fine_tuning():
    """The finding of the page's lesson: what is kept for fp32 adapters outweighs the states that are spared."""
    full, chosen, found = surprises(model="smollm2-135m", rank=16, **SMALL)

    def at_the_peak(*kinds):
        return sum(chosen.peak.bytes[k] - full.peak.bytes[k] for k in kinds)

    more = at_the_peak("activations", "logits")
    spared = -at_the_peak("frozen_weights", "trainable_weights", "gradients", "optimizer", "temporaries", "workspace")
    assert chosen.allocated > full.allocated and 0 < spared < more
    assert found[0].startswith("LoRA needs more")
    assert units.size(spared) in found[0] and units.size(more) in found[0]


def test_surprises_give_the_reports_numbers():
    _, chosen, found = surprises(model="gemma-3-270m", **SMALL)
    logits, batch = chosen.peak.bytes["logits"], chosen.peak.bytes["logits"] + chosen.peak.bytes["activations"]
    assert any(units.size(logits) in text and "2,048 tokens" in text for text in found)
    assert any(units.percent(batch / chosen.allocated) in text for text in found)
    full, chosen, found = surprises(model="qwen3-0.6b", **SMALL)
    assert units.percent(1 - chosen.allocated / full.allocated) in found[0]
    _, chosen, found = surprises(**SURPRISES["of optimizer states are paged"])
    assert units.size(chosen.outside) in found[-1]


def test_nothing_is_a_surprise_where_a_convention_counts():
    quiet = {"method": "full", "gradient_checkpointing": True, "batch_size": 1, "sequence_length": 64}
    assert surprises(convention="12n")[2] == surprises(**quiet)[2] == []


def test_the_live_sentence_follows_the_run(toy_spec, tmp_path):
    from peftlab.run import train

    seen = [{"type": "queued", "ahead": 0}]
    said = [plain(sentences.live_sentence(seen))]
    for event in train(resolve(toy_spec), tmp_path):
        seen.append(event)
        said.append(plain(sentences.live_sentence(seen)))
    assert said[:2] == ["Starting the run.", "Loading tiny-llama."]
    assert said[2] == "tiny-llama answers 3 held-out items before it has learned anything."
    before, after = seen[-1]["eval"]["before"]["exact_match"], seen[-1]["eval"]["after"]["exact_match"]
    assert said[-1].startswith("tiny-llama has read 8 examples in")
    assert said[-1].endswith(f"Exact records: {units.score(before)} → {units.score(after)} on items it has never seen.")


def test_the_live_sentence_of_a_run_that_ended():
    error = {"type": "error", "message": "<b>"}
    assert sentences.live_sentence([error]) == "The run ended before it had learned anything."
    assert sentences.live_sentence([{"type": "step"}, {"type": "step"}, error]) == "The run ended after 2 steps."
    assert sentences.live_sentence([{"type": "queued", "ahead": 1}]) == "Waiting: 1 run ahead of yours."


def report(pairs, forgetting):
    exchanges = tuple(Exchange("p", "r", (Reply(BASE, "", 0, b), Reply("mine", "", 0, a))) for b, a in pairs)
    scores = score_of(BASE, [b for b, _ in pairs]), score_of("mine", [a for _, a in pairs], forgetting)
    return ComparisonReport("ticket", "exact_match", exchanges, scores)


@pytest.mark.parametrize(
    "forgetting, said",
    [(0.02, "0.02 nats a token worse: it forgot almost nothing"), (0.2, "forgot a little"), (0.9, "forgot a lot"),
     (-0.1, "no worse than before"), (None, "loses 1.")],
)  # fmt: skip
def test_the_comparison_sentence_is_true(forgetting, said):
    text = plain(sentences.compare_sentence(report([(0, 1), (0, 1), (1, 0), (1, 1)], forgetting)))
    assert text.startswith("The adapter wins 2 of 4, loses 1") and said in text


def test_names_are_escaped():
    assert bold("<script>") == "<b>&lt;script&gt;</b>"
