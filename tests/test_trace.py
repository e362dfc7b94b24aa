"""The exact trace against steps that a GPU has really taken, and against common sense."""

import json
import threading
from pathlib import Path
from statistics import fmean

import pytest
from tiny import CONFIGS, small

from peftlab import RunSpec, SpecError, resolve
from peftlab.cli import main
from peftlab.memory import exact, predict, shallow
from peftlab.memory import trace as tracing
from peftlab.memory.report import KINDS
from peftlab.memory.states import workspace
from peftlab.memory.trace import trace

MEASURED = Path(__file__).parent.parent / "assets/measured"
ROWS = json.loads((MEASURED / "memory-h100.json").read_text())["rows"]


def telling():
    """Rows with a value of a setting that no row before has."""
    known = set()
    for row in ROWS:
        facts = {(name, str(value)) for name, value in row["spec"].items()}
        if facts - known:
            yield row
        known |= facts


@pytest.mark.parametrize(
    "model, method, batch, length, checkpointing, measured, fresh",
    [("smollm2-1.7b", "qlora", 1, 2048, True, 2_676_422_656, False), ("qwen3-0.6b", "dora", 4, 512, False, 14_674_014_208, True)],
)  # fmt: skip
def test_peaks_measured_elsewhere(model, method, batch, length, checkpointing, measured, fresh):
    """On an H100, before this project; `fresh` says whether cuBLAS had its workspace."""
    spec = RunSpec(model=model, method=method, precision="bf16", batch_size=batch, sequence_length=length, rank=16,
                   gradient_checkpointing=checkpointing, gpu="h100-80gb")  # fmt: skip
    report = exact(resolve(spec))
    peak = dict(report.peak.bytes)
    assert predict(resolve(spec)).allocated == pytest.approx(report.allocated, rel=0.03)
    workspace = peak.pop("workspace")
    assert sum(peak.values()) + fresh * workspace == pytest.approx(measured, rel=0.01)


def test_the_recording_is_broad_and_within_one_percent_on_average():
    errors = {}
    for name in ("peak_allocated_bytes", "peak_reserved_bytes"):
        errors[name] = [row["predicted"][name] / row["measured"][name] - 1 for row in ROWS]
    allocated, reserved = errors.values()
    assert min(allocated) >= -0.01 and max(allocated) <= 0.03
    assert fmean(map(abs, allocated)) <= 0.01 and fmean(map(abs, reserved)) <= 0.03
    specs = [row["spec"] for row in ROWS]
    several = {
        "model": 7,
        "method": 9,
        "optimizer": 4,
        "precision": 2,
        "gradient_checkpointing": 2,
        "double_quantization": 2,
    }
    assert len(specs) >= 48 and all(len({spec.get(name) for spec in specs}) >= n for name, n in several.items())


@pytest.mark.parametrize("row", telling(), ids=lambda r: f"{r['spec']['model']} {r['spec']['method']}")
def test_a_fresh_trace_and_the_closed_form_agree_with_the_recording(row):
    spec = resolve(RunSpec.from_dict(row["spec"]))
    report = exact(spec)
    assert predict(spec).allocated == pytest.approx(report.allocated, rel=0.03)
    assert report.allocated == pytest.approx(row["measured"]["peak_allocated_bytes"], rel=0.01)
    assert report.reserved == pytest.approx(row["measured"]["peak_reserved_bytes"], rel=0.03)


@pytest.mark.parametrize("method", ["prompt", "prefix", "houlsby", "parallel"])
def test_a_base_is_quantized_whatever_is_attached(method):
    """Vectors beside the text, and adapters that hang on the maps that are replaced."""
    settings = {"model": "smollm2-135m", "method": method, "batch_size": 1, "sequence_length": 128, "precision": "bf16"}
    whole, packed = (exact(spec := resolve(RunSpec(**settings, quantization=q))) for q in ("none", "nf4"))
    assert packed.peak.bytes["frozen_weights"] < 0.6 * whole.peak.bytes["frozen_weights"]
    assert predict(spec).allocated == pytest.approx(packed.allocated, rel=0.03)


def test_another_model_in_the_same_file_is_another_model(tmp_path):
    found = []
    for layers in (2, 6):
        (path := tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2"] | {"num_hidden_layers": layers}))
        spec = resolve(RunSpec(model=str(path), batch_size=1, sequence_length=32))
        found.append((exact(spec).allocated, predict(spec).allocated))
    assert found[1][0] > found[0][0] and found[1][1] > found[0][1]


def traced(model, **settings):
    defaults = {"batch_size": 2, "sequence_length": 64, "rank": 4}
    found = trace(resolve(RunSpec(model=model, **defaults | settings)))
    assert all(n >= 0 for moment in found.moments for n in moment.bytes.values())
    assert all(set(moment.bytes) == set(KINDS) for moment in found.moments)
    assert found.reserved >= max(m.total for m in found.moments)
    return found


def peak(model, **settings):
    return max(m.total for m in traced(model, **settings).moments)


def test_more_of_anything_takes_more(tiny_model):
    model = str(tiny_model)
    base = peak(model)
    assert peak(model, batch_size=4) > base and peak(model, sequence_length=128) > base and peak(model, rank=32) > base
    assert peak(model, gradient_checkpointing=True, sequence_length=128) < peak(model, sequence_length=128)
    assert peak(model, optimizer="sgd", method="full") < peak(model, optimizer="adamw", method="full")


def test_what_is_steady_is_what_the_closed_form_says(tiny_model):
    """After a step, weights and states: 512-byte blocks and rotary tables apart."""
    spec = resolve(RunSpec(model=str(tiny_model), method="full", batch_size=2, sequence_length=64))
    after, report = trace(spec).after, predict(spec)
    assert after["trainable_weights"] == pytest.approx(report.trainable_weights, rel=0.01)
    assert after["optimizer"] == pytest.approx(report.optimizer, rel=0.02)
    assert after["gradients"] == after["logits"] == after["activations"] == 0


def test_a_step_goes_up_and_down_through_the_layers(tiny_model):
    moments = traced(str(tiny_model), method="full").moments
    parts = [m.part for m in moments if m.phase == "forward"]
    assert parts == [-1, 0, 1, 2, 3] and [m.part for m in moments if m.phase == "backward"] == parts[::-1]
    assert [m.phase for m in moments][-1] == "optimizer" and len(moments) == 11


def test_the_logits_of_few_tokens_take_less(tiny_model):
    spec = resolve(RunSpec(model=str(tiny_model), batch_size=4, sequence_length=128))
    every, few = exact(spec), exact(spec, logits=8)
    highest = [max(m.bytes["logits"] for m in report.moments) for report in (few, every)]
    assert few.allocated < every.allocated and highest[0] < highest[1] / 8 and highest[1] >= 4 * 127 * 512 * 4


def test_paged_states_are_outside():
    spec = RunSpec(model="smollm2-135m", method="full", precision="bf16", batch_size=1, sequence_length=32)
    plain, paged = (exact(resolve(spec.but(optimizer=name))) for name in ("adamw-8bit", "paged-adamw-8bit"))
    assert plain.outside == 0 and paged.outside == pytest.approx(2 * paged.trainable_parameters, rel=0.01)
    assert plain.optimizer - paged.optimizer == pytest.approx(paged.outside, rel=0.01)
    assert paged.allocated < plain.allocated


def test_accumulation_keeps_gradients(tiny_model):
    once, twice = (traced(str(tiny_model), method="full", accumulation=n) for n in (1, 4))
    gradients = predict(resolve(RunSpec(model=str(tiny_model), method="full"))).gradients
    first = [next(m for m in t.moments if m.phase == "forward").bytes["gradients"] for t in (once, twice)]
    assert first == [0, pytest.approx(gradients, rel=0.02)]
    assert len(once.moments) == len(twice.moments)
    assert max(m.total for m in twice.moments) > max(m.total for m in once.moments)


@pytest.mark.parametrize(
    "family, method",
    [("gemma3", "lora"), ("gemma3", "prefix"), ("gpt2", "ia3"), ("gpt2", "bitfit"), ("gpt2", "p-tuning"), ("opt", "oft"),
     ("opt", "parallel"), ("opt", "prefix"), ("qwen2", "bitfit"), ("qwen2", "oft"), ("qwen2", "ia3")],
)  # fmt: skip
def test_any_method_of_any_family(family, method, config_files):
    assert peak(config_files[family], method=method, rank=None if method in ("prefix", "ia3") else 4) > 0


@pytest.mark.parametrize(
    "kinds",
    ["aaaa", "a" * 5, "a" * 32, "aaaaab" * 3, "aaaaab" * 12, "aaaaab" * 4 + "aa", "a" * 8 + "b" * 4, "bbbbaaabaaaa", "ab" * 16,
     "abcdefgh" * 4, "a", "", "aabaaabbba" * 2, "aaaaab" * 3 + "AAAAAB" * 3],
)  # fmt: skip
def test_every_layer_is_copied_from_one_like_it(kinds):
    """Also in what it has beside it, two layers to each side: what a layer frees there was made by the same kind."""
    kept, copies = shallow.shorten(list(kinds))
    assert len(copies) == len(kinds) and kept == sorted(set(kept)) and set(copies) <= set(range(len(kept)))
    short = [kinds[i] for i in kept]
    for i, place in enumerate(copies):
        for beside in range(-2, 3):
            there, here = (dict(enumerate(row)).get(at + beside) for row, at in ((kinds, i), (short, place)))
            assert there == here


def test_few_layers_are_kept():
    for kinds, most in (("a" * 32, 5), ("a" * 126, 5), ("aaaaab" * 10, 12), ("ab" * 20, 6)):
        assert len(shallow.shorten(list(kinds))[0]) <= most


def test_a_known_answer_waits_for_nobody_and_is_not_traced_again(tiny_model, monkeypatch):
    monkeypatch.setattr(tracing, "_known", {})
    spec = resolve(RunSpec(model=str(tiny_model), batch_size=2, sequence_length=48))
    first = trace(spec)
    monkeypatch.setattr(tracing, "_trace", None)
    with tracing._one_at_a_time:
        assert trace(resolve(spec.but(learning_rate=0.1, seed=7, steps=3, alpha=1.5))) is first


def test_traces_are_forgotten_in_turn(tiny_model, monkeypatch):
    monkeypatch.setattr(tracing, "_known", {})
    monkeypatch.setattr(tracing, "KNOWN", 2)
    monkeypatch.setattr(tracing, "_trace", lambda spec, *rest: spec.batch_size)
    for batch in (1, 2, 3):
        trace(resolve(RunSpec(model=str(tiny_model), batch_size=batch)))
    assert list(tracing._known.values()) == [2, 3]


def test_a_trace_that_is_forgotten_between_a_look_and_the_next_does_no_harm(tiny_model, monkeypatch):
    class Forgetful(dict):
        """Another thread's trace pushes each out as soon as it has been looked for, or put there."""

        def __contains__(self, key):
            return self.pop(key, None) is not None

        def get(self, key, default=None):
            return self.pop(key, default)

    monkeypatch.setattr(tracing, "_known", Forgetful())
    monkeypatch.setattr(tracing, "_trace", lambda spec, *rest: spec.batch_size)
    spec = resolve(RunSpec(model=str(tiny_model), batch_size=2))
    assert trace(spec) == trace(spec) == trace(spec) == 2


def test_two_at_once_answer_as_each_alone(tiny_model, monkeypatch):
    specs = [resolve(RunSpec(model=str(tiny_model), batch_size=n, sequence_length=24)) for n in (1, 2)]
    alone = [trace(s) for s in specs]
    monkeypatch.setattr(tracing, "_known", {})
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, trace(specs[i]))) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: alone[0], 1: alone[1]}


def test_the_command_line_prints_the_peak(tiny_model, capsys):
    command = f"memory --exact --batch-size 2 --sequence-length 64 --model {tiny_model} --json".split()
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["source"] == "trace"
    assert document["peak_allocated_bytes"] == max(moment["bytes"] for moment in document["timeline"])
    assert sum(document["components"][kind] for kind in KINDS) == document["peak_allocated_bytes"]
    assert document["process_bytes"] > document["peak_reserved_bytes"] >= document["peak_allocated_bytes"]
    assert main(command[:-1]) == 0
    assert "by a trace of it on fake tensors" in capsys.readouterr().out


def test_what_cannot_be_traced_says_so(capsys):
    for settings, said in (
        ({"model": "100B", "method": "full"}, "bare count has no layers"), ({"model": "bert-base", "method": "full"}, "only models that write text"),
        ({"model": "100B"}, "bare count has no layers"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=said):
            exact(resolve(RunSpec(**settings)))
    assert main(["memory", "--exact", "--convention", "8n"]) == 2
    assert "leave the convention out" in capsys.readouterr().err


def test_the_peak_of_our_own_engine_is_that_of_its_recordings():
    """With the fused operations, where every run predicts its own; copies of a small adapter come and go beside it."""
    for name in ("speed-h100", "speed-1.7b-h100", "speed-8b-nf4-h100"):
        rows = json.loads((MEASURED / f"{name}.json").read_text())["rows"]
        runs = [run for row in rows if row["name"] in ("peftlab", "peftlab, bf16 adapters") for run in row["runs"]]
        assert runs
        for run in runs:
            assert run["predicted_peak_bytes"] == pytest.approx(run["peak_bytes"], rel=0.025)


@pytest.mark.parametrize("name", ["speed-1.7b-h100", "speed-8b-nf4-h100"])
def test_a_run_of_random_weights_is_predicted_as_it_was(name):
    document = json.loads((MEASURED / f"{name}.json").read_text())
    (said,) = {run["predicted_peak_bytes"] for run in document["rows"][0]["runs"]}
    spec = resolve(RunSpec.from_dict(document["spec"]).but(gpu="h100-80gb"))
    assert exact(spec, quick=True).allocated + workspace(spec.gpu) == pytest.approx(said, rel=5e-3)


@pytest.mark.real
def test_the_prediction_of_a_recording_is_still_made():
    from peftlab.base import weights
    from peftlab.data import tasks
    from peftlab.run.batches import Batches, encode

    document = json.loads((MEASURED / "train-intent-h200.json").read_text())
    spec = RunSpec.from_dict(document["spec"])
    base, task = weights.load(resolve(RunSpec())), tasks.find(spec.task)
    batches = Batches(encode(base.tokenizer, task, task.train), spec.batch_size, 1, 0, 0)
    width = max(batches.widths)
    said = document["events"][-1]["predicted_peak_bytes"]
    found = exact(resolve(spec.but(sequence_length=width)), logits=width - batches.starts[width], quick=True)
    assert found.allocated + workspace(spec.gpu) == pytest.approx(said, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "qlora", "full", "houlsby", "prompt"])
def test_any_method_is_traced_with_fused_operations(method, tiny_model, toy_task):
    spec = resolve(small(tiny_model, method, precision="bf16", batch_size=4, sequence_length=128))
    plain, quick = exact(spec), exact(spec, quick=True)
    assert quick.frozen_weights == plain.frozen_weights and quick.allocated > 0
    if method == "lora":
        assert quick.allocated < plain.allocated
