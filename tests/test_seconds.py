"""A step's seconds: what the trace says it computes, the roofline of each operation, and constants that fit."""

import dataclasses
import random

import pytest
import torch

from peftlab import RunSpec, count, resolve
from peftlab.bench import seconds as fitting
from peftlab.catalog.gpus import GPUS
from peftlab.memory import seconds
from peftlab.memory import trace as tracing
from peftlab.memory.compute import compute
from peftlab.memory.operations import Operations, _bytes
from peftlab.memory.seconds import Operation
from peftlab.memory.trace import trace

CONSTANTS = fitting.START
H200 = GPUS["h200"]


def operations(config_files, family, quick=False, **settings):
    shape = {"precision": "bf16", "sequence_length": 32, "batch_size": 2, "gpu": "h200"}
    spec = resolve(RunSpec(model=config_files[family], **shape | settings))
    return spec, trace(spec, quick=quick).operations


def total(found, what, *kinds):
    return sum(n * getattr(operation, what) for operation, n in found.items() if operation.kind in kinds)


@pytest.mark.parametrize(
    "family, method", [("llama", "full"), ("gpt2", "full"), ("llama", "lora"), ("llama-tied", "head")]
)
def test_the_traced_products_are_those_that_are_counted(config_files, family, method):
    spec, found = operations(config_files, family, method=method)
    computed, counted = (2, 2) if method == "head" else (7, 6)  # the kernel multiplies once more on its way back
    attention = total(found, "flops", "attention") * counted / computed
    assert compute(spec).total / spec.steps == pytest.approx(total(found, "flops", "product") + attention, rel=0.02)


def test_more_layers_and_more_batches_compute_as_much_more(config_files, tmp_path):
    _, once = operations(config_files, "llama", method="lora")
    _, thrice = operations(config_files, "llama", method="lora", accumulation=3)
    assert total(thrice, "flops", "product") == 3 * total(once, "flops", "product")
    assert total(thrice, "moved", "tensor") == total(once, "moved", "tensor")  # the optimizer still takes one step
    small, large = (
        trace(resolve(RunSpec(model=model, method="lora", gpu="h200", batch_size=1, sequence_length=64))).operations
        for model in ("smollm2-135m", "smollm2-360m")
    )
    spec = resolve(RunSpec(model="smollm2-360m", method="lora", gpu="h200", batch_size=1, sequence_length=64))
    assert total(large, "flops", "product", "attention") == pytest.approx(compute(spec).total / spec.steps, rel=0.02)
    assert sum(small.values()) != sum(large.values())  # 30 and 32 layers, of which a few are traced


def test_checkpointing_has_python_call_for_the_forward_pass_again(config_files):
    _, plain = operations(config_files, "llama", method="lora")
    _, again = operations(config_files, "llama", method="lora", gradient_checkpointing=True)
    called = [sum(n for o, n in found.items() if o.driven and o.kind != "tensor") for found in (plain, again)]
    assert 1.7 < called[1] / called[0] < 2.2


def test_a_quantized_map_is_unpacked_before_it_multiplies(config_files):
    _, plain = operations(config_files, "llama", method="lora")
    _, packed = operations(config_files, "llama", method="qlora")
    assert total(packed, "flops", "product") == total(plain, "flops", "product")
    assert total(packed, "moved", "library") > 0 == total(plain, "moved", "library")


def test_repeated_numbers_are_moved_once():
    x = torch.empty(4, 1, 8)
    assert _bytes(x.expand(4, 6, 8)) == _bytes(x) == 4 * 8 * 4


def test_each_operation_takes_the_longer_of_its_products_and_its_bytes():
    product = Operation("forward", "product", 16, 10**13, 10**6, True)
    copy = Operation("forward", "elements", 0, 0, 10**10, True)
    view = Operation("forward", "view", 0, 0, 0, True)
    by_products = 10**13 / (989e12 * CONSTANTS.products) + CONSTANTS.product
    by_bytes = 10**10 / (4.8e12 * CONSTANTS.memory) + CONSTANTS.elements
    assert seconds.busy({product: 1, copy: 2, view: 9}, H200, CONSTANTS) == pytest.approx(by_products + 2 * by_bytes)
    exact = product._replace(bits=32)
    assert seconds.busy({exact: 1}, H200, CONSTANTS) > 10 * by_products  # without tensor cores


def test_the_graph_gear_launches_nothing():
    many = {Operation("forward", "elements", 0, 0, 100, True): 1000, Operation("forward", "view", 0, 0, 0, False): 1000}
    computing, launching = seconds.busy(many, H200, CONSTANTS), seconds.launching(many, CONSTANTS)
    assert launching == pytest.approx(1000 * (CONSTANTS.called + CONSTANTS.derived_view))
    assert seconds.of_step(many, H200, "graph", CONSTANTS) == computing
    assert max(computing, launching) < seconds.of_step(many, H200, "eager", CONSTANTS) < computing + launching


def test_a_fit_finds_the_constants_that_made_the_times(monkeypatch):
    monkeypatch.setattr(fitting, "NEAR_START", 1e-9)
    draw = random.Random(0)
    true = seconds.Constants(**{name: value * draw.uniform(0.5, 1.4) for name, value in vars(CONSTANTS).items()})
    spec = resolve(RunSpec(model="smollm2-135m", gpu="h200"))
    steps = []
    for _ in range(60):
        big = 10 ** draw.uniform(0, 3)
        found = {
            Operation("forward", "product", 16, int(3e9 * big), int(1e5 * big), True): draw.randint(50, 900),
            Operation("forward", "product", 32, int(1e8 * big), int(1e5 * big), False): draw.randint(0, 900),
            Operation("forward", "attention", 16, int(1e9 * big), int(1e5 * big), False): draw.randint(0, 100),
            Operation("forward", "elements", 0, 0, int(2e5 * big), True): draw.randint(100, 5000),
            Operation("forward", "elements", 0, 0, int(1e5 * big), False): draw.randint(100, 9000),
            Operation("forward", "tensor", 0, 0, 10**6, True): draw.randint(0, 9000),
            Operation("forward", "view", 0, 0, 0, False): draw.randint(0, 9000),
        }
        gear = draw.choice(["eager", "graph"])
        took = seconds.of_step(found, H200, gear, true)
        steps.append(fitting.Timed("here", "made", spec, gear, found, took, seconds.busy(found, H200, true), None))
    found, hosts = fitting.fit(steps)
    assert hosts == {"here": 1.0}
    for step in steps:
        assert seconds.of_step(step.operations, H200, step.gear, found) == pytest.approx(step.seconds, rel=0.02)
    assert found.products == pytest.approx(true.products, rel=0.05)


def test_a_fit_tells_a_slower_host_and_the_forward_pass_apart():
    """What autograd records takes longer; a second host launches everything in twice the time."""
    true = dataclasses.replace(CONSTANTS, recorded=2e-5, derived=3e-5)
    spec = resolve(RunSpec(model="smollm2-135m", gpu="h200"))
    steps = []
    for n in range(1, 9):
        found = {
            Operation("forward", "elements", 0, 0, 10, True): 3000 // n,
            Operation("forward", "elements", 0, 0, 10, True, recorded=True): 500 * n,
            Operation("backward", "elements", 0, 0, 10, False): 800 * n,
        }
        for host, file in ((1, "here"), (2, "there")):
            launching = (host * seconds.launching(found, true, *phases) for phases in ((), ("forward",)))
            took, forward = (seconds.joined(seconds.busy(found, H200, true), next(launching)) for _ in range(2))
            steps.append(fitting.Timed(file, "made", spec, "eager", found, took, None, forward if n > 4 else None))
    found, hosts = fitting.fit(steps)
    assert hosts == {"here": 1.0, "there": pytest.approx(2, rel=0.05)}
    assert found.called + found.recorded == pytest.approx(true.called + true.recorded, rel=0.1)
    assert found.recorded > found.called


def test_the_same_steps_elsewhere_are_compared():
    spec = resolve(RunSpec(model="smollm2-135m", gpu="h200"))
    made = [("here", 1.0), ("there", 1.5), ("there", 0.5), ("there", 2.0)]
    steps = [fitting.Timed(file, "made", spec, "eager", {}, took, None, None) for file, took in made]
    assert fitting._elsewhere(steps, {"here"}) == {"steps": 3, "median": 1.5, "least": 0.5, "most": 2.0}
    assert fitting._elsewhere(steps[:1], {"here"}) == {"steps": 0}


@pytest.mark.parametrize("method, least, most", [("lora", 0.8, 1.0), ("last-block", 0.0, 0.5)])
def test_nothing_is_recorded_below_the_lowest_trained_weight(config_files, method, least, most):
    _, found = operations(config_files, "llama", method=method)
    forward = {o: n for o, n in found.items() if o.phase == "forward" and o.kind in ("product", "elements")}
    assert least < sum(n for o, n in forward.items() if o.recorded) / sum(forward.values()) < most


def test_the_engine_reads_its_gradients_and_scales_them(config_files, monkeypatch):
    spec, clipped = operations(config_files, "llama", quick=True, method="lora", rank=3)
    monkeypatch.setattr(Operations, "clips", lambda *_: None)
    monkeypatch.setattr(tracing, "_known", {})
    _, free = operations(config_files, "llama", quick=True, method="lora", rank=3)
    gradients = 4 * count(spec).trainable_parameters
    assert total(clipped, "moved", "tensor") - total(free, "moved", "tensor") == 3 * gradients


def test_the_recorded_fit_says_how_far_off_it_is():
    found = seconds.fitted()
    assert found.steps >= 75 and found.mean <= 0.2 and abs(found.worst) <= 0.4 and "NVIDIA H200" in found.hardware
    assert found.elsewhere is not None and 1 < found.elsewhere < 2
    constants = vars(found.constants)
    assert all(0 < constants[share] <= 1 for share in fitting.SHARES)
    assert all(0 < value < 1e-3 for name, value in constants.items() if name not in fitting.SHARES)


def test_a_gpu_without_bf16_and_offloaded_states_have_no_seconds(config_files):
    spec, found = operations(config_files, "llama", method="lora")
    assert seconds.predicted(spec, found) > seconds.predicted(spec, found, seconds.GRAPH) > 0
    for settings in ({"gpu": "t4"}, {"offload": "optimizer", "sharding": "zero3", "n_gpus": 2}):
        other = resolve(RunSpec.from_dict(spec.to_dict() | settings))
        assert seconds.predicted(other, found) is None
