"""`bench memory`: which steps it takes, how it fills its rows, and what it does without a GPU."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from peftlab import RunSpec, SpecError, hardware
from peftlab.base import models
from peftlab.bench import grid, memory, steps
from peftlab.errors import RunError

ON_CUDA = hardware.here().device == "cuda"
BYTES = {"peak_allocated_bytes": 2_000_000, "peak_reserved_bytes": 4_194_304, "after_bytes": 1_000_000}


@pytest.fixture
def spec(config_files):
    shape = {"batch_size": 2, "sequence_length": 16, "precision": "fp32"}
    return RunSpec(model=config_files["llama"], method="lora", gpu="h200", accumulation=2, **shape)


@pytest.fixture
def here(monkeypatch, spec):
    """Three rows of a tiny model, in threads of this process, on a machine that says it has a GPU."""
    monkeypatch.setattr(memory, "grid", lambda: iter([spec, spec.but(method="ia3"), spec.but(method="full")]))
    monkeypatch.setattr(memory, "graph_grid", lambda: iter([spec]))
    monkeypatch.setattr(memory, "processes", lambda n, begin=None, *given: ThreadPoolExecutor(n, "", begin, given))
    monkeypatch.setattr(memory, "_used_bytes", lambda: 10)
    machine = hardware.Machine("cuda", "a GPU", "h200", 1, None)
    monkeypatch.setattr(memory.hardware, "here", lambda: machine)
    monkeypatch.setattr(steps, "timed", lambda model, spec, gear, device: {"step_seconds": 0.5})


def measured(spec, squeezed=False):
    return BYTES | {"device_used_bytes": 110, "squeezed": squeezed}


@pytest.mark.parametrize("gear", ["eager", "graph"])
def test_a_step_is_timed_in_both_gears(spec, gear, monkeypatch):
    from peftlab import resolve

    monkeypatch.setattr(steps, "LONG_ENOUGH", 0.0)
    found = steps.timed(steps.on_meta(resolve(spec)), resolve(spec), gear, "cuda" if ON_CUDA else "cpu")
    assert 0 < found["launch_seconds"] <= found["step_seconds"] < 5
    assert (found["busy_seconds"] is None) != ON_CUDA


def test_the_graph_gear_refuses_what_no_graph_can_hold(spec):
    from peftlab import resolve

    adalora = resolve(spec.but(method="adalora"))
    with pytest.raises(RunError, match="AdaLoRA asks for numbers between steps|no CUDA GPU here"):
        steps._graph(steps.on_meta(adalora), adalora, "cuda")


def test_bytes_then_seconds_are_recorded_and_kept(here, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(steps, "measure", lambda spec: asked.append(spec.method) or measured(spec))
    out = tmp_path / "memory.json"
    document = memory.record_memory(out, print, at_once=2)
    assert document == json.loads(out.read_text()) and sorted(asked) == ["full", "ia3", "lora"]
    for row in document["rows"]:
        assert row["measured"] == BYTES | {"process_bytes": 100, "step_seconds": 0.5}  # the first ones run alone
        assert row["predicted"]["peak_allocated_bytes"] > 0 and row["gear"] == "eager" and "error" not in row
    (graph,) = document["graph_rows"]
    assert graph["measured"] == {"step_seconds": 0.5} and graph["gear"] == "graph"
    memory.record_memory(out, print)
    assert len(asked) == 3  # nothing is measured twice on the same hardware


def test_a_row_that_found_the_gpu_full_is_measured_again_alone(here, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "ALONE", 0)
    tries = []

    def measure(spec):
        tries.append(spec.method)
        if spec.method == "ia3" and tries.count("ia3") == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(spec, squeezed=spec.method == "full")

    monkeypatch.setattr(steps, "measure", measure)
    document = memory.record_memory(tmp_path / "memory.json", print, at_once=2)
    assert sorted(tries) == ["full", "full", "ia3", "ia3", "lora"]
    assert [row["measured"]["process_bytes"] for row in document["rows"]] == [None, 100, 100]


def test_a_row_that_fails_says_so_and_the_others_go_on(here, tmp_path, monkeypatch):
    def measure(spec):
        if spec.method == "ia3":
            raise RuntimeError("no such kernel")
        return measured(spec)

    def timed(model, spec, gear, device):
        if spec.method == "full":
            raise RuntimeError("no such graph")
        return {"step_seconds": 0.5}

    monkeypatch.setattr(steps, "measure", measure)
    monkeypatch.setattr(steps, "timed", timed)
    lora, ia3, full = memory.record_memory(tmp_path / "memory.json", print)["rows"]
    assert ia3["error"] == "RuntimeError: no such kernel" and "measured" not in ia3
    assert full["untimed"] == "RuntimeError: no such graph" and "step_seconds" not in full["measured"]
    assert lora["measured"]["step_seconds"] == 0.5


def test_without_a_gpu_the_rows_are_predicted_anew_and_stay_measured(here, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "measure", measured)
    out = tmp_path / "memory.json"
    before = memory.record_memory(out, print)
    before["rows"][0]["predicted"]["peak_allocated_bytes"] = 1
    before["rows"][1]["error"] = "its step could not be traced"
    out.write_text(json.dumps(before | {"hardware": "another GPU"}))
    monkeypatch.setattr(memory.hardware, "here", lambda: hardware.Machine("cpu", "a CPU", None, 1, None))
    after = memory.record_memory(out, print)
    assert after["hardware"] == "another GPU" and after["predicted_with"] == hardware.versions()
    assert after["rows"][0]["predicted"]["peak_allocated_bytes"] > 1
    assert [row["measured"] for row in after["rows"]] == [row["measured"] for row in before["rows"]]
    assert not any("error" in row for row in after["rows"])
    with pytest.raises(SpecError, match="this machine has none"):
        memory.record_memory(tmp_path / "none.json", print)


def test_the_grid_has_families_that_the_catalogue_lacks():
    """Their config.json files build the models of their names; every spec is one of its own."""
    specs = [*grid.grid(), *grid.graph_grid()]
    kinds = {models.find(spec.model).config["model_type"] for spec in specs}
    known = {entry.config["model_type"] for entry in models.MODELS.values() if entry.config}
    assert len(kinds - known) >= 20 and len({*grid.grid()}) == len([*grid.grid()])
    assert {file.stem for file in grid.CONFIGS.glob("*.json")} <= {
        file.stem
        for file in grid.CONFIGS.glob("*.json")
        if models.from_config(file.read_text()).key in {s.model for s in specs}
    }
