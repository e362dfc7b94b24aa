import json
import shutil
from dataclasses import replace

import pytest
from tiny import TOY, drain, run_of, saved, small, wait_for

from peftlab import RunSpec, SpecError, adapters, fused, resolve
from peftlab.base import weights
from peftlab.compare import BASE, ComparisonReport, models_of, on_prompt, on_task, wilson
from peftlab.data.tasks import prompt_ids
from peftlab.hardware import Machine
from peftlab.resolve import resolve_again
from peftlab.run import train
from peftlab.run.generate import Decoding


@pytest.mark.parametrize(
    "right, items, low, high",
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (1, 1, 0.2065, 1), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)],
)
def test_wilson_against_published_values(right, items, low, high):
    assert wilson(right, items) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@pytest.fixture
def adapter(tiny_model, toy_task, tmp_path):
    return saved(tiny_model, "lora", tmp_path, task="toy")[1]


@pytest.mark.parametrize("decoding", [Decoding(8), Decoding(8, 0.9, seed=2)], ids=["greedy", "drawn"])
def test_one_batch_says_what_models_in_turn_say(adapter, decoding, monkeypatch):
    asked, together = [], fused.together
    monkeypatch.setattr(fused, "together", lambda *a: asked.append(together(*a)) or asked[-1])
    report = on_prompt([adapter], "what colour is the sky?", decoding)
    ((batch, reference),) = [(e.replies, e.reference) for e in report.exchanges]
    assert [r.model for r in batch] == [BASE, "lora"] and all(r.score is None and r.seconds > 0 for r in batch)
    assert asked[0] is not None and reference is None and report.scores == () and report.task is None
    monkeypatch.setattr(fused, "together", lambda *_: None)
    turns = on_prompt([adapter], "what colour is the sky?", decoding).exchanges[0].replies
    assert [(r.model, r.text) for r in batch] == [(r.model, r.text) for r in turns]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_is_compared_in_its_own_precision(precision, toy_spec, toy_task, tmp_path):
    """So that base and adapter say what they said in it."""
    for _ in train(resolve(toy_spec.but(precision=precision, steps=8)), tmp_path / "run"):
        pass
    adapter = adapters.read(tmp_path / "run" / "adapter")
    assert weights.load(resolve(adapter.spec)) is models_of([adapter])[0]
    _, report = drain(on_task([adapter], toy_task))
    said = [tuple(r.text for r in e.replies) for e in report.exchanges]
    assert said == [(r["base"], r["adapted"]) for r in adapter.result["heldout"]]


def test_runs_of_several_precisions_are_compared_in_the_widest(adapter):
    narrow, wide = (replace(adapter, spec=adapter.spec.but(precision=precision)) for precision in ("bf16", "fp32"))
    assert str(models_of([narrow, wide])[0].model.dtype) == "torch.float32"


OLD_CPU, NEW_CPU = (Machine("cpu", "a CPU", None, 2, None, bf16) for bf16 in (False, True))
GPU = Machine("cuda", "NVIDIA L4", "l4", 8, None)


@pytest.mark.parametrize(
    "run, machine, precision",
    [
        ({"precision": "bf16", "gpu": "h100-80gb"}, OLD_CPU, "fp32"),
        ({"precision": "bf16", "gpu": "h100-80gb"}, NEW_CPU, "bf16"),
        ({"precision": "bf16", "gpu": "h100-80gb", "method": "qlora"}, NEW_CPU, "fp32"),
        ({"precision": "fp16", "gpu": "h100-80gb"}, NEW_CPU, "bf16"),
        ({"precision": "amp"}, OLD_CPU, "fp32"),
        ({"precision": "bf16"}, OLD_CPU, "bf16"),
        ({"precision": "fp32"}, NEW_CPU, "fp32"),
        ({"precision": "amp", "gpu": "h100-80gb"}, GPU, "amp"),
        ({}, OLD_CPU, "fp32"),
        ({}, GPU, "bf16"),
    ],
    ids=str,
)
def test_a_runs_precision_is_kept_where_this_machine_can_run_it(run, machine, precision):
    spec = RunSpec(**run)
    again = resolve_again(spec.but(quantization="nf4") if spec.method == "qlora" else spec, machine)
    assert (again.precision, again.gpu) == (precision, machine.gpu or "")


@pytest.mark.parametrize(
    "prompt, tokens, words",
    [
        ("", 5, "the prompt is empty: write"),
        ("  \n", 5, "the prompt is empty: write"),
        ("the cat sat " * 200, 5, r"the prompt has \d.* tokens; .* reads 256 .* shorten it to 251 tokens"),
        ("the cat", 300, "max-new-tokens=300.*256"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_with_its_limit(adapter, prompt, tokens, words):
    with pytest.raises(SpecError, match=words):
        on_prompt([adapter], prompt, Decoding(tokens))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_take_their_room_in_the_context(method, gpt2_model, toy_task, tmp_path):
    """GPT-2 has no positions after its last."""
    spec = small(gpt2_model, method)
    chosen = adapters.read(adapters.save(run_of(spec, tmp_path).model, spec, tmp_path / "adapter"))
    tokens = weights.load(spec).tokenizer
    words = next(n for n in range(300) if len(prompt_ids(tokens, TOY.instruction, "x" * (n + 1))) > 256 - 5 - 4)
    assert on_prompt([chosen], "x" * words, Decoding(4)).exchanges
    with pytest.raises(SpecError, match="shorten it to 247 tokens"):
        on_prompt([chosen], "x" * (words + 1), Decoding(4))


def test_a_task_is_scored_for_every_model(adapter, toy_task):
    shares, report = drain(on_task([adapter], toy_task))
    assert shares == sorted(shares) and 0 < shares[0] <= shares[-1] <= 1
    assert (report.task, report.metric, len(report.exchanges)) == ("toy", "exact_match", 3)
    for exchange, row in zip(report.exchanges, toy_task.heldout, strict=True):
        assert (exchange.prompt, exchange.reference) == (row.prompt, row.answer)
        assert [r.model for r in exchange.replies] == [BASE, "lora"]
        assert all(r.score == float(r.text.strip() == row.answer) for r in exchange.replies)
    base, adapted = report.scores
    assert base.forgetting is None and isinstance(adapted.forgetting, float)
    assert adapted.mean == sum(e.replies[1].score for e in report.exchanges) / 3 and adapted.items == 3
    assert adapted.low <= adapted.mean <= adapted.high
    assert json.loads(json.dumps(report.to_dict()))["scores"][1]["model"] == "lora"


def test_two_adapters_of_one_name_are_both_compared(adapter, tmp_path):
    twin = adapters.read(shutil.copytree(adapter.folder, tmp_path / "other" / "lora"))
    replies = on_prompt([adapter, twin], "the cat", Decoding(3)).exchanges[0].replies
    assert len({r.model for r in replies}) == 3 and replies[1].text == replies[2].text


def test_adapters_of_different_bases_are_not_compared(adapter, tied_model):
    other = adapters.Adapter(adapter.folder, RunSpec(model=str(tied_model)), {})
    with pytest.raises(SpecError, match="different bases"):
        on_prompt([adapter, other], "the cat", Decoding(3))


def test_a_scoring_in_the_room_is_the_report_of_the_comparison(room, adapter, toy_task):
    spec = adapter.spec.to_dict()
    job = room.start("score", {"spec": spec, "adapter": "mine", "folder": str(adapter.folder)}, "ann")
    wait_for(lambda: job.over)
    told, (_, report) = ComparisonReport.from_dict(job.events[-1]["report"]), drain(on_task([adapter], toy_task))
    assert told.scores == report.scores and [e.prompt for e in told.exchanges] == [e.prompt for e in report.exchanges]
    assert any(event["type"] == "progress" for event in job.events) and not job.folder.exists()


def test_an_adapter_of_ones_own_has_one_name_in_the_list_at_its_bar_and_as_a_file(trained_here):
    pytest.importorskip("gradio")
    from test_presses import Visit

    from demos.side_by_side import Compare

    job = trained_here(adapters.bundled()[0].folder, "ann")
    name = f"{job.spec.task}-{job.spec.method}-{job.id[-6:]}"  # as served.py names the file
    seen = Visit(Compare()).sees()
    assert seen["adapter"]["choices"][0] == (f"yours: {name}", job.id) and job.id not in str(seen["chart"])
    assert f'"{name}"' in json.dumps(seen["chart"])
    assert [said for said, _ in seen["adapter"]["choices"][1:]] == [f"bundled: {a.name}" for a in adapters.bundled()]
    assert all(len(said) <= 30 for said, _ in seen["adapter"]["choices"])
    assert seen["adapter"]["info"].startswith("Support ticket to JSON, lora rank ") and "UTC" in seen["adapter"]["info"]
