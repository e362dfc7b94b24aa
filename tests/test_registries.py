"""One entry in a registry is enough: it then shows in the command line, in the page, and in what runs."""

import json
from dataclasses import replace

import pytest
from tiny import LLAMA, TOY

from peftlab import RunSpec, predict, resolve, tasks
from peftlab.__main__ import main
from peftlab.catalog import gpus, models
from peftlab.catalog.gpus import GPU
from peftlab.catalog.models import BaseModel
from peftlab.memory import fits

CHIP = GPU("toy-gpu", "Toy GPU", 1.0, 10**9, 100.0, None, "Toy", 2026, "here")
MODEL = BaseModel("toy-model", "Toy Model", 195_008, "nobody/toy", config=LLAMA)


@pytest.fixture
def entries(monkeypatch):
    monkeypatch.setitem(gpus.GPUS, "toy-gpu", CHIP)
    monkeypatch.setitem(models.MODELS, "toy-model", MODEL)
    monkeypatch.setitem(tasks.TASKS, "toy", TOY)


@pytest.mark.parametrize("command, key", [("models", "toy-model"), ("gpus", "toy-gpu"), ("tasks", "toy")])
def test_the_command_line_lists_it(entries, capsys, command, key):
    assert main([command, "--json"]) == 0
    assert key in [e["key"] for e in json.loads(capsys.readouterr().out)]


def test_a_model_is_counted_and_predicted(entries, capsys):
    assert main(["params", "--model", "toy-model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == 26_880
    assert predict(RunSpec(model="toy-model", method="full"), "12n").states == 12 * 195_008


def test_a_gpu_is_compared_with(entries):
    assert next(f for f in fits(2 * 10**9) if f.gpu.key == "toy-gpu").n_gpus == 2
    assert resolve(RunSpec(gpu="toy-gpu")).gpu == "toy-gpu"


def test_a_task_is_the_runs_own(entries):
    spec = resolve(RunSpec(task="toy"))
    assert (spec.steps, spec.batch_size, spec.sequence_length) == (4, 2, 96)


def choices(build, *args):
    """Every choice of every component that a tab builds, as the browser gets them."""
    import gradio as gr

    with gr.Blocks() as demo:
        build(*args)
    found = set()
    for component in demo.get_config_file()["components"]:
        for choice in component.get("props", {}).get("choices") or []:
            found.add(choice[1] if isinstance(choice, (list, tuple)) else choice)
    return found


def test_the_memory_tab_offers_them(entries):
    import gradio as gr

    from demos import memory_calculator, page

    with gr.Blocks():
        state = gr.State(page.OPENING)
    assert {"toy-model", "toy-gpu"} <= choices(lambda: memory_calculator.build(state))


def test_the_live_tab_offers_them(entries):
    import gradio as gr

    from demos import live_finetune, page

    offered = choices(lambda: live_finetune.build(gr.State(page.OPENING), gr.BrowserState([])))
    assert {"toy-model", "toy"} <= offered


def test_the_lora_tab_offers_the_model(entries):
    import gradio as gr

    from demos import lora_visualizer, page

    assert "toy-model" in choices(lambda: lora_visualizer.build(gr.State(page.OPENING)))


def test_a_model_too_large_or_no_writer_is_not_offered_live(entries, monkeypatch):
    from demos import live_finetune

    monkeypatch.setitem(models.MODELS, "toy-large", replace(MODEL, key="toy-large", total_parameters=10**11))
    offered = {key for _, key in live_finetune.runnable()}
    assert "toy-model" in offered and not {"toy-large", "bert-base", "gpt3-175b"} & offered
