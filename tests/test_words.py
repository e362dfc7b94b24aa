import re

import pytest

from peftlab import RunSpec, count, predict, words
from peftlab.compare import BASE, ComparisonReport, Exchange, Reply, score_of
from peftlab.memory import fits


@pytest.mark.parametrize(
    "n, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3.24e9, "3.24 GB"), (84e9, "84 GB"), (800e9, "800 GB"), (96363135072, "96.4 GB"),
     (10e12, "10 TB"), (None, "not known"), (1_474_560, "1.47 MB")],
)  # fmt: skip
def test_sizes(n, text):
    assert words.size(n) == text


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (3240, "3,240"),
        (0.27497, "0.275"),
        (100, "100"),
        (0.00012345, "0.000123"),
        (12.0, "12"),
        (-1.234, "-1.23"),
    ],
)
def test_three_significant_digits(value, text):
    assert words.significant(value) == text


@pytest.mark.parametrize("value, text", [(0.44, "0.4 s"), (41.2, "41 s"), (150, "2 min 30 s")])
def test_seconds(value, text):
    assert words.seconds(value) == text


def plain(sentence):
    return re.sub(r"<[^>]+>", "", sentence)


def memory(convention="12n", **settings):
    spec = RunSpec(model="llama-3.1-8b", **settings)
    full, chosen = predict(spec.but(method="full"), convention), predict(spec, convention)
    return full, chosen, plain(words.memory_sentence(full, chosen, fits(chosen.states or 0)))


def test_the_memory_sentence_is_true():
    full, chosen, said = memory(rank=16)
    assert f"Llama 3.1 8B needs {words.size(full.states)}" in said and "LoRA, rank 16" in said
    assert f"needs {words.size(chosen.states)}: {words.significant(full.states / chosen.states)}× less" in said
    gpu = words.gpu_name(words.smallest_gpu(fits(chosen.states)))
    assert f"fit one {gpu}" in said
    assert not any(f.n_gpus == 1 and f.gpu.memory_bytes < chosen.states for f in fits(chosen.states))


def test_the_memory_sentence_says_when_nothing_is_known():
    *_, said = memory("exact", optimizer="adafactor")
    assert "adafactor take is not known" in said


def test_the_memory_sentence_says_when_peft_needs_more():
    *_, said = memory("exact", rank=4096, precision="bf16")
    assert "× more" in said and "× less" not in said


def test_the_lora_sentence_is_true():
    report = count(RunSpec(model="gemma-3-270m", rank=16, target_modules="q_proj,v_proj"))
    said = plain(words.lora_sentence(report))
    assert said.startswith("Rank 16 on q and v trains 737,280 of 268,098,176 numbers: 0.275%.")


def test_the_live_sentence_follows_the_run(toy_spec, tmp_path):
    from peftlab.train import train

    seen = [{"type": "queued", "ahead": 0}]
    said = [plain(words.live_sentence(seen))]
    for event in train(toy_spec, tmp_path):
        seen.append(event)
        said.append(plain(words.live_sentence(seen)))
    assert said[:2] == ["Starting the run.", "Loading tiny-llama."]
    assert said[2] == "tiny-llama answers 3 held-out items before it has learned anything."
    before, after = seen[-1]["eval"]["before"]["exact_match"], seen[-1]["eval"]["after"]["exact_match"]
    assert said[-1].startswith("tiny-llama has read 8 examples in")
    assert said[-1].endswith(f"Exact records: {words.score(before)} → {words.score(after)} on items it has never seen.")


def test_the_live_sentence_of_a_run_that_ended():
    error = {"type": "error", "message": "<b>"}
    assert words.live_sentence([error]) == "The run ended before it had learned anything."
    assert words.live_sentence([{"type": "step"}, {"type": "step"}, error]) == "The run ended after 2 steps."
    assert words.live_sentence([{"type": "queued", "ahead": 1}]) == "Waiting: 1 run ahead of yours."


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
    text = plain(words.compare_sentence(report([(0, 1), (0, 1), (1, 0), (1, 1)], forgetting)))
    assert text.startswith("The adapter wins 2 of 4, loses 1") and said in text


def test_names_are_escaped():
    assert words.bold("<script>") == "<b>&lt;script&gt;</b>"
