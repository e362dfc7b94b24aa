import re

import pytest

from peftlab import RunSpec, SpecError, count, predict, resolve
from peftlab.memory import fits
from peftlab.memory.polynomial import BATCH, LENGTH, RANK, Polynomial, constant
from peftlab.memory.sharding import plan as planned
from peftlab.memory.strategies import PHASES, STATES, STRATEGIES

BILLION = 10**9
KINDS = (*STATES, "temporaries", "activations", "logits", "workspace")
SHARED = [s for s in STRATEGIES if s != "none"]
LORA = RunSpec(model="llama-3.1-8b", precision="bf16", rank=16, batch_size=1, sequence_length=1024)
FULL = LORA.but(method="full", rank=None)
LAYER = 436_224_000
"""Bytes of a layer of Llama 3.1 8B in bf16."""


def value(size, spec=LORA):
    spec = resolve(spec)
    return size.value(spec.batch_size, spec.sequence_length, spec.rank or 1)


def plan(moments, spec, largest_layer, trainable):
    return planned(moments, resolve(spec), largest_layer, trainable)


def shard(*args):
    return plan(*args).moments


def step(frozen, trainable, gradients, optimizer, activations=10 * BILLION):
    """A step's moments, gradients being there from the backward pass on."""
    states = {"frozen_weights": frozen, "trainable_weights": trainable, "optimizer": optimizer, "gradients": 0}
    moments = {
        "forward": states | {"activations": activations, "logits": BILLION, "workspace": 1000},
        "backward 3": states | {"activations": activations, "logits": 2 * BILLION, "gradients": gradients},
        "optimizer": states | {"temporaries": gradients, "gradients": gradients},
        "after": states,
    }
    return {name: {kind: constant(size) for kind, size in kinds.items()} for name, kinds in moments.items()}


def of(spec):
    """(moments, trainable) of a spec, its states as predicted."""
    report = predict(resolve(spec))
    moments = step(report.frozen_weights, report.trainable_weights, report.gradients, report.optimizer)
    return moments, constant(report.trainable_parameters)


def states(held, spec=LORA):
    return sum(value(held[kind], spec) for kind in STATES)


def test_figure_1_of_zero():
    n = 7.5 * BILLION
    moments = step(0, 2 * n, 2 * n, 12 * n)
    spec = RunSpec(model="7.5B", method="full", n_gpus=64)
    for sharding, gigabytes in (("ddp", 120), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9), ("fsdp", 1.9)):
        held = shard(moments, spec.but(sharding=sharding), 0, constant(n))["optimizer"]
        assert states(held, spec) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_the_lectures_800_gb_take_ten_gpus_of_80_gb_and_twice_that_in_mixed_precision():
    """'8–16 high-end GPUs (80GB each)': too few below ten, and none left for activations at ten."""
    spec = RunSpec(model="100B", method="full")
    needs = {key: predict(resolve(spec), key).states for key in ("8n", "16n-mixed")}
    assert [-(-size // (80 * BILLION)) for size in needs.values()] == [10, 20]
    assert [next(f.n_gpus for f in fits(size) if f.gpu.key == "h100-80gb") for size in needs.values()] == [10, 19]
    moments = step(0, 2e11, 2e11, 4e11)
    for n_gpus, gigabytes in ((8, 100), (10, 80), (16, 50)):
        held = shard(moments, spec.but(n_gpus=n_gpus, sharding="zero3"), 0, constant(1e11))["optimizer"]
        assert states(held, spec) == pytest.approx(gigabytes * BILLION)


@pytest.mark.parametrize("spec", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("sharding", STRATEGIES)
def test_one_gpu_has_everything(sharding, spec):
    moments, trainable = of(spec)
    found = plan(moments, spec.but(n_gpus=1, sharding=sharding), LAYER, trainable)
    for name, kinds in moments.items():
        for kind, size in kinds.items():
            assert value(found.moments[name][kind]) == value(size)
    assert value(found.sent) == value(found.in_cpu) == 0


@pytest.mark.parametrize("sharding", SHARED)
def test_more_gpus_never_hold_more(sharding):
    moments, trainable = of(FULL)
    for name in moments:
        sums = []
        for n in (1, 2, 4, 64):
            held = shard(moments, FULL.but(n_gpus=n, sharding=sharding), LAYER, trainable)[name]
            sums.append(sum(value(size) for kind, size in held.items() if kind != "communication"))
        assert sums == sorted(sums, reverse=True)
        assert (sums[0] > sums[-1]) == (sharding != "ddp")


@pytest.mark.parametrize("sharding", SHARED)
def test_every_gpu_has_its_own_batch(sharding):
    moments, trainable = of(LORA)
    found = shard(moments, LORA.but(n_gpus=8, sharding=sharding), LAYER, trainable)
    for kind in ("activations", "logits", "workspace"):
        assert found["forward"][kind] == moments["forward"][kind] * 1


def test_the_optimizers_temporary_tensors_are_divided_with_it():
    moments, trainable = of(FULL)
    whole = value(moments["optimizer"]["temporaries"])
    for sharding, share in (("ddp", 1), ("zero1", 1 / 4), ("fsdp", 1 / 4)):
        found = shard(moments, FULL.but(n_gpus=4, sharding=sharding), LAYER, trainable)
        assert value(found["optimizer"]["temporaries"]) == whole * share


def test_a_polynomial_stays_one():
    moments = {
        "backward": {"frozen_weights": constant(8e9), "gradients": RANK * 4, "activations": BATCH * LENGTH * 100}
    }
    found = plan(moments, LORA.but(n_gpus=4, sharding="zero2"), LAYER, RANK * 7)
    held = found.moments["backward"]
    assert held["gradients"].value(1, 1, 8) == 8 and held["activations"].value(3, 5, 1) == 1500
    assert found.sent.value(1, 1, 10) == 2 * 7 * 10 * 4 * 3 / 4  # fp32 adapters


def during(found, phase):
    return {b.derivation: value(b.size) for b in found.buffers if phase in b.phases}


def test_ddp_keeps_its_gradients_twice():
    moments, trainable = of(LORA)
    found = plan(moments, LORA.but(n_gpus=2, sharding="ddp"), LAYER, trainable)
    gradients = 4 * count(resolve(LORA)).trainable_parameters
    for phase in PHASES:
        assert during(found, phase) == {"all gradients once more, in buckets = 168 MB": gradients}
    assert value(found.sent) == 2 * gradients * 1 / 2


def test_zeros_bucket_is_there_while_gradients_are_reduced():
    moments, trainable = of(FULL)
    found = plan(moments, FULL.but(n_gpus=2, sharding="zero2"), LAYER, trainable)
    assert during(found, "forward") == during(found, "optimizer") == {}
    assert during(found, "backward") == {"reduce_bucket_size = 500 million × 2 bytes = 1 GB": BILLION}
    assert value(found.moments["backward 3"]["communication"]) == BILLION


def test_stage_3_gathers_up_to_a_limit_and_small_models_whole():
    moments, trainable = of(FULL)
    large = plan(moments, FULL.but(n_gpus=8, sharding="zero3"), LAYER, trainable)
    derivation = "stage3_max_live_parameters + largest layer = 1,000 million × 2 bytes + 436 MB = 2.44 GB"
    assert during(large, "forward")[derivation] == 2 * BILLION + LAYER
    assert list(during(large, "optimizer").values()) == [BILLION]
    spec = RunSpec(model="smollm2-135m", method="full", precision="bf16", n_gpus=8, sharding="zero3")
    small = plan(*of(spec)[:1], spec, 7_080_192, of(spec)[1])
    assert during(small, "backward")["all weights, gathered = 269 MB"] == 2 * 134_515_008


def test_fsdp_gathers_layers():
    moments, trainable = of(LORA)
    found = plan(moments, LORA.but(n_gpus=8, sharding="fsdp"), LAYER, trainable)
    assert during(found, "forward") == {
        "3 × largest layer = 3 × 436 MB: received, copied out, and the one before": 3 * LAYER
    }
    gradients = 4 * count(resolve(LORA)).trainable_parameters / 32
    assert during(found, "backward") == {
        "2 × largest layer = 2 × 436 MB: at work, and the next": 2 * LAYER,
        "2 × a layer's gradients = 2 × 5.24 MB: made, and being sent": pytest.approx(2 * gradients),
    }


def test_what_fsdp_holds_is_what_torch_tracks():
    """PyTorch's own tracker over its own FSDP2, on blocks of one size, four ranks of which this is one."""
    tracked = pytest.importorskip("torch.distributed._tools.fsdp2_mem_tracker")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    width, layers, n = 64, 8, 4
    layer = 2 * width * width * 4
    dist.init_process_group("fake", rank=0, world_size=n, store=fake.FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (n,))
        for method, phase in (("lora", "forward"), ("full", "backward")):
            blocks = [
                torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in "ab")) for _ in range(layers)
            ]
            model = torch.nn.Sequential(*blocks)
            model[:-1].requires_grad_(method == "full")  # frozen, so that forward is the peak
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            tracker = tracked.FSDPMemTracker(model, optimizer)
            with tracker:
                for _ in range(2):
                    model(torch.ones(1, width)).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            (peak,) = tracker.get_tracker_snapshot("peak").values()
            held = {getattr(kind, "value", kind): size for kind, size in peak.items()}
            buffers = sum(held[kind] for kind in ("Unsharded Param", "All Gather", "Reduce Scatter", "Temp"))
            assert held["Sharded Param"] == layers * layer / n

            frozen, trainable = (0, layers * layer) if method == "full" else (layers * layer, 0)
            spec = RunSpec(model="64K", method=method, precision="fp32", n_gpus=n, sharding="fsdp")
            found = shard(step(frozen, trainable, trainable, 0), spec, layer, constant(trainable / 4))
            ours = found[next(name for name in found if name.startswith(phase))]["communication"]
            assert value(ours, spec) == pytest.approx(buffers, rel=0.02)
    finally:
        dist.destroy_process_group()


def test_accumulation_leaves_fsdps_gradients_whole_and_not_zeros():
    moments, trainable = of(FULL)
    whole = value(moments["optimizer"]["gradients"])
    for sharding, share in (("fsdp", 1), ("zero2", 1 / 4), ("zero3", 1 / 4)):
        spec = FULL.but(n_gpus=4, sharding=sharding, accumulation=2)
        assert value(shard(moments, spec, LAYER, trainable)["optimizer"]["gradients"]) == whole * share


@pytest.mark.parametrize(
    "sharding, accumulation, weights, gradients",
    [
        ("ddp", 1, 0, 2), ("zero1", 1, 0, 2), ("zero2", 1, 0, 2), ("zero3", 1, 2, 1), ("fsdp", 1, 2, 1),
        ("ddp", 4, 0, 2), ("zero1", 4, 0, 2), ("zero2", 4, 0, 5), ("zero3", 4, 8, 4), ("fsdp", 4, 8, 1),
    ],
)  # fmt: skip
def test_what_a_gpu_sends(sharding, accumulation, weights, gradients):
    """2Ψ, and 3Ψ where weights are divided: ZeRO, section 7. With LoRA the frozen weights are most of it."""
    for spec in (FULL, LORA):
        moments, trainable = of(spec)
        report = predict(resolve(spec))
        found = plan(moments, spec.but(n_gpus=8, sharding=sharding, accumulation=accumulation), LAYER, trainable)
        expected = weights * report.weights + gradients * report.gradients
        assert value(found.sent) == pytest.approx(expected * 7 / 8)


@pytest.mark.parametrize(
    "sharding, offload, moved",
    [
        ("zero1", "optimizer", {"optimizer"}),
        ("zero2", "optimizer", {"optimizer", "gradients"}),
        ("zero3", "optimizer", {"optimizer", "gradients"}),
        ("zero3", "parameters", set(STATES)),
        ("fsdp", "parameters", set(STATES)),
    ],
)
def test_offloading(sharding, offload, moved):
    moments, trainable = of(FULL)
    stay = plan(moments, FULL.but(n_gpus=4, sharding=sharding), LAYER, trainable)
    gone = plan(moments, FULL.but(n_gpus=4, sharding=sharding, offload=offload), LAYER, trainable)
    for kind in STATES:
        here, there = (value(p.moments["optimizer"][kind]) for p in (stay, gone))
        assert there == (0 if kind in moved else here)
    assert value(gone.in_cpu) == pytest.approx(sum(value(stay.moments["optimizer"][kind]) for kind in moved))
    assert value(gone.moments["optimizer"]["temporaries"]) == 0  # the CPU takes the step
    assert value(stay.in_cpu) == 0


def test_offloaded_gradients_pass_through_a_buffer():
    moments, trainable = of(FULL)
    found = plan(moments, FULL.but(n_gpus=4, sharding="zero2", offload="optimizer"), LAYER, trainable)
    passing = "a gradient on its way to CPU memory, at most a layer's = 1.05 GB"
    assert during(found, "backward")[passing] == pytest.approx(2 * 128_256 * 4096)


def test_nf4s_scales_stay_whole():
    spec = LORA.but(method="qlora")
    moments, trainable = of(spec)
    found = plan(moments, spec.but(n_gpus=4, sharding="fsdp"), LAYER, trainable)
    linear = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    (scales,) = [value(b.size) for b in found.buffers if "NF4" in b.derivation]
    assert scales == pytest.approx(3 / 4 * linear * (1 / 64 + 4 / (64 * 256)))
    plain = plan(moments, spec.but(n_gpus=4, sharding="fsdp", double_quantization=False), LAYER, trainable)
    (more,) = [value(b.size) for b in plain.buffers if "NF4" in b.derivation]
    assert more == pytest.approx(3 / 4 * linear * 4 / 64)
    divided = plan(moments, spec.but(n_gpus=4, sharding="zero2"), LAYER, trainable).buffers
    assert not any("NF4" in b.derivation for b in divided)


@pytest.mark.parametrize("sharding", SHARED)
def test_every_buffer_says_how_it_was_found_and_where(sharding):
    moments, trainable = of(FULL)
    found = plan(moments, FULL.but(n_gpus=2, sharding=sharding), LAYER, trainable)
    assert found.note == STRATEGIES[sharding].note and "." in found.note
    for buffer in found.buffers:
        assert re.search(r" = .*[kMG]B", buffer.derivation) and buffer.source
        assert isinstance(buffer.size, Polynomial) and value(buffer.size) > 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_gpus": 2}, "sharding=none: 2 GPUs would train as many models; set it to ddp"),
        ({"offload": "optimizer"}, "offload=optimizer: sharding=none.*zero1 or zero2 or zero3$"),
        ({"offload": "optimizer", "sharding": "ddp"}, "offload=optimizer: sharding=ddp.*zero1"),
        ({"offload": "optimizer", "sharding": "fsdp"}, "offload=optimizer: sharding=fsdp.*or offload to parameters"),
        (
            {"offload": "parameters", "sharding": "zero2"},
            "offload=parameters: .*zero3 or fsdp, or offload to optimizer",
        ),
        (
            {"quantization": "int8", "sharding": "zero3"},
            "sharding=zero3: int8.*set it to zero2, or quantization to nf4",
        ),
        ({"quantization": "int8", "sharding": "fsdp"}, "sharding=fsdp: int8.*set it to zero2"),
    ],
)
def test_refusals(settings, words):
    with pytest.raises(SpecError, match=words):
        shard(*of(LORA)[:1], LORA.but(**settings), LAYER, constant(1))


@pytest.mark.parametrize(
    "quantization, sharding", [("int8", "zero2"), ("int8", "ddp"), ("nf4", "zero3"), ("nf4", "fsdp")]
)
def test_what_does_work_with_a_quantized_base(quantization, sharding):
    moments, trainable = of(LORA)
    assert shard(moments, LORA.but(quantization=quantization, n_gpus=2, sharding=sharding), LAYER, trainable)


def test_every_choice_of_sharding_and_offload_is_known():
    from peftlab.spec import SETTINGS

    assert tuple(STRATEGIES) == SETTINGS["sharding"].choices
    assert {o for s in STRATEGIES.values() for o in s.offloads} == set(SETTINGS["offload"].choices) - {"none"}


def test_kinds_are_those_of_a_report():
    from peftlab.memory.report import KINDS as reported

    assert set(KINDS) | {"communication"} == set(reported)
