"""Which gear a run gets and why; on a GPU, that the graph computes what the eager gear does."""

import pytest
import torch
from tiny import run_of, small, steps

from peftlab import RunSpec, resolve
from peftlab.methods import METHODS
from peftlab.run import train
from peftlab.run.batches import Batch
from peftlab.run.gears import CaptureError, Eager, Graph, why_eager
from peftlab.show import run_card

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA GPU")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"method": "adalora"}, "AdaLoRA asks for numbers between steps"),
        ({"optimizer": "adamw-8bit"}, "the optimizer adamw-8bit counts its steps in Python"),
        ({"optimizer_precision": "fp32"}, "counts its steps"),
        ({"quantization": "int8"}, "outliers"),
        ({"method": "qlora"}, ""),
        ({"method": "full", "optimizer": "sgd"}, ""),
        ({}, ""),
    ],
)
def test_why_a_step_cannot_be_one_graph(settings, said):
    spec = resolve(RunSpec(**settings))
    assert said in why_eager(spec, "cuda") and bool(said) == bool(why_eager(spec, "cuda"))
    assert why_eager(spec, "cpu") == "no CUDA GPU here"


def test_the_start_says_the_gear_and_words_follow_one_that_changed(toy_spec, tmp_path):
    start = next(e for e in train(resolve(toy_spec), tmp_path) if e["type"] == "start")
    if not torch.cuda.is_available():
        assert (start["gear"], start["why_eager"]) == ("eager", "no CUDA GPU here")
        assert run_card.gear([start]) == "steps launched one operation at a time (no CUDA GPU here)"
    graph = {"type": "start", "gear": "graph", "why_eager": ""}
    assert run_card.gear([graph]) == "each step one CUDA graph"
    changed = {"type": "gear", "gear": "eager", "why_eager": "a <sync>"}
    assert run_card.gear([graph, changed]).endswith("(a &lt;sync&gt;)")


def test_a_step_that_cannot_be_captured_is_taken_eagerly(tiny_model, toy_task, tmp_path):
    """Its losses are those of the eager gear, and the reason is told once."""

    class Failing(Eager):
        name = "graph"
        calls = 0

        def run(self, pieces, rate):
            self.calls += 1
            if self.calls > 2:
                raise CaptureError("a number was asked for")
            return super().run(pieces, rate)

    whole = steps(run_of(small(tiny_model, "lora"), tmp_path / "a"), 5)
    run = run_of(small(tiny_model, "lora"), tmp_path / "b")
    run.gear = Failing(run.gear.step, "")
    stream, told = iter(run.batches), []
    for _ in range(5):
        told += run.launch(next(stream))
    losses = [event["loss"] for event in run.fetch(0.0)]
    assert losses == pytest.approx(whole, rel=1e-5)
    assert [e["why_eager"] for e in told] == ["a number was asked for"]
    assert run.gear.name == "eager"


SETTINGS = [{"accumulation": 2}, {"dropout": 0.1}, {"gradient_checkpointing": True}]


@needs_cuda
@pytest.mark.parametrize("settings", [*({"method": m} for m in METHODS if m != "bitfit"), *SETTINGS], ids=str)
def test_the_graphs_losses_are_the_eager_gears(settings, tiny_model, toy_task, tmp_path, monkeypatch):
    if "dropout" in settings:
        monkeypatch.setattr(Batch, "trimmed", lambda self: self)  # or it would draw for other positions
    spec = small(tiny_model, **{"method": "lora", "steps": 20, "batch_size": 2, **settings})
    eager, graph = run_of(spec, tmp_path / "a", eager=True), run_of(spec, tmp_path / "b")
    assert isinstance(graph.gear, Graph) == (spec.method != "adalora")
    assert steps(graph, 20) == pytest.approx(steps(eager, 20), rel=1e-3, abs=1e-4)


@needs_cuda
def test_queued_steps_keep_their_own_rates(tiny_model, toy_task, tmp_path):
    """Launched all at once, as against one by one with a wait after each."""
    spec = small(tiny_model, "lora", precision="fp32", steps=40, batch_size=2)
    waited, queued = run_of(spec, tmp_path / "a"), run_of(spec, tmp_path / "b")
    for pieces, _ in zip(queued.batches, range(40), strict=False):
        list(queued.launch(pieces))
    assert [e["loss"] for e in queued.fetch(0.0)] == pytest.approx(steps(waited, 40), rel=1e-4)
