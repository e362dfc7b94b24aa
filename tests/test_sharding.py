from functools import partial

import pytest

from peftlab import RunSpec, SpecError, predict, resolve
from peftlab.memory import fits
from peftlab.memory.lines import BATCH, LENGTH, RANK, constant
from peftlab.memory.report import KINDS
from peftlab.memory.sharding import PHASES, STATES, STRATEGIES, Tensors
from peftlab.memory.sharding import plan as planned
from peftlab.spec import SETTINGS

BILLION = 10**9
LORA = RunSpec(model="llama-3.1-8b", precision="bf16", rank=16, batch_size=1, sequence_length=1024)
FULL = LORA.but(method="full", rank=None)
ADAPTER = 4 * 41_943_040
"""Bytes of LORA's trained parameters, in fp32."""
OUTSIDE = 2 * (2 * 128_256 * 4096 + 4096)
"""Bytes of what Llama 3.1 8B has outside its layers: more than a layer's 436 MB."""


def value(size, spec=LORA):
    return size.value(spec.batch_size or 1, spec.sequence_length or 1, spec.rank or 1)


def plan(moments, spec):
    return planned(moments, resolve(spec))


def step(frozen, trainable, gradients, optimizer):
    """A step's moments, gradients being there from the backward pass on."""
    states = {"frozen_weights": frozen, "trainable_weights": trainable, "optimizer": optimizer, "gradients": 0}
    moments = {
        "forward": states | {"activations": 10 * BILLION, "logits": BILLION, "workspace": 1000},
        "backward 3": states | {"activations": 10 * BILLION, "logits": 2 * BILLION, "gradients": gradients},
        "optimizer": states | {"temporaries": gradients, "gradients": gradients},
    }
    return {name: {kind: constant(size) for kind, size in kinds.items()} for name, kinds in moments.items()}


def of(spec):
    """The moments of a spec, its states as predicted."""
    report = predict(resolve(spec))
    return step(report.frozen_weights, report.trainable_weights, report.gradients, report.optimizer)


def test_figure_1_of_zero():
    n = 7.5 * BILLION
    for sharding, gigabytes in (("ddp", 120), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9), ("fsdp", 1.9)):
        held = plan(step(0, 2 * n, 2 * n, 12 * n), FULL.but(n_gpus=64, sharding=sharding)).moments["optimizer"]
        assert sum(value(held[kind]) for kind in STATES) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_the_lectures_800_gb_take_ten_gpus_of_80_gb_and_twice_that_in_mixed_precision():
    needs = [predict(resolve(RunSpec(model="100B", method="full")), key).states for key in ("8n", "16n-mixed")]
    assert [-(-size // (80 * BILLION)) for size in needs] == [10, 20]
    assert [next(f.n_gpus for f in fits(size) if f.gpu.key == "h100-80gb") for size in needs] == [10, 19]


OPTIMIZER = {"optimizer", "temporaries"}
ALL = {*STATES, "temporaries"}


@pytest.mark.parametrize(
    "sharding, offload, divided, moved",
    [
        ("ddp", "none", set(), set()), ("zero1", "none", OPTIMIZER, set()), ("zero2", "none", OPTIMIZER | {"gradients"}, set()),
        ("zero3", "none", ALL, set()), ("fsdp", "none", ALL, set()), ("zero1", "optimizer", OPTIMIZER, OPTIMIZER),
        ("zero2", "optimizer", OPTIMIZER | {"gradients"}, OPTIMIZER | {"gradients"}),
        ("zero3", "optimizer", ALL, OPTIMIZER | {"gradients"}), ("zero3", "parameters", ALL, ALL), ("fsdp", "parameters", ALL, ALL),
    ],
)  # fmt: skip
def test_what_is_divided_and_what_moves(sharding, offload, divided, moved):
    """Also that activations stay, that one GPU sends nothing, and that the CPU takes the step of an optimizer that it has."""
    moments = of(FULL)
    for n in (1, 4):
        found = plan(moments, FULL.but(n_gpus=n, sharding=sharding, offload=offload))
        for name, kinds in moments.items():
            for kind, size in kinds.items():
                left = 0 if kind in moved else value(size) / (n if kind in divided else 1)
                assert value(found.moments[name][kind]) == left
        assert value(found.in_cpu) == pytest.approx(sum(value(moments["optimizer"][k]) for k in moved & {*STATES}) / n)
        assert (value(found.sent) > 0) == (n > 1)


def test_a_polynomial_stays_one():
    moments = {
        "backward": {"frozen_weights": constant(8e9), "gradients": RANK * 4, "activations": BATCH * LENGTH * 100}
    }
    found = plan(moments, LORA.but(n_gpus=4, sharding="zero2"))
    held = found.moments["backward"]
    assert held["gradients"].value(1, 1, 8) == 8 and held["activations"].value(3, 5, 1) == 1500
    assert found.sent.value(1, 1, 16) == 2 * ADAPTER * 3 / 4


BUCKET = {"reduce_bucket_size = 500 million × 2 bytes = 1 GB": BILLION}
SMALL = RunSpec(model="smollm2-135m", method="full", precision="bf16", n_gpus=8, sharding="zero3")
LINEAR = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


@pytest.mark.parametrize(
    "spec, phases, buffers",
    [
        (LORA.but(n_gpus=2, sharding="ddp"), PHASES, {"all gradients once more, in buckets = 168 MB": ADAPTER}),
        (FULL.but(n_gpus=2, sharding="zero2"), ["forward", "optimizer"], {}),
        (FULL.but(n_gpus=2, sharding="zero2"), ["backward"], BUCKET),
        (FULL.but(n_gpus=4, sharding="zero2", offload="optimizer"), ["backward"],
         BUCKET | {"a gradient on its way to CPU memory, at most a layer's = 1.05 GB": 2 * 128_256 * 4096}),
        (FULL.but(n_gpus=8, sharding="zero3"), ["forward", "backward"], BUCKET |
         {"stage3_max_live_parameters + largest layer = 1,000 million × 2 bytes + 2.1 GB = 4.1 GB": 2 * BILLION + OUTSIDE}),
        (FULL.but(n_gpus=8, sharding="zero3"), ["optimizer"], BUCKET),
        (SMALL, ["backward"], BUCKET | {"all weights, gathered = 269 MB": 2 * 134_515_008}),
        (LORA.but(n_gpus=8, sharding="fsdp"), ["forward"],
         {"3 × largest layer = 3 × 2.1 GB: received, copied out, and the one before": 3 * OUTSIDE}),
        (LORA.but(n_gpus=8, sharding="fsdp"), ["backward"],
         {"2 × largest layer = 2 × 2.1 GB: at work, and the next": 2 * OUTSIDE,
          "2 × a layer's gradients = 2 × 5.24 MB: made, and being sent": 2 * ADAPTER / 32}),
        (LORA.but(method="qlora", n_gpus=4, sharding="fsdp"), ["optimizer"],
         {"3/4 of NF4's scales, which every GPU has whole = 3/4 × 111 MB": 3 / 4 * LINEAR * (1 / 64 + 4 / (64 * 256))}),
        (LORA.but(method="qlora", n_gpus=4, sharding="fsdp", double_quantization=False), ["optimizer"],
         {"3/4 of NF4's scales, which every GPU has whole = 3/4 × 436 MB": 3 / 4 * LINEAR * 4 / 64}),
    ],
)  # fmt: skip
def test_buffers(spec, phases, buffers):
    found = plan(of(spec), spec)
    for phase in phases:
        assert {b.derivation: value(b.size) for b in found.buffers if phase in b.phases} == pytest.approx(buffers)
        held = next(kinds for name, kinds in found.moments.items() if name.startswith(phase))
        assert value(held["communication"]) == pytest.approx(sum(buffers.values()))
    assert all(b.source for b in found.buffers) and found.note == STRATEGIES[spec.sharding].note


def test_what_fsdp_holds_is_what_torch_tracks():
    """PyTorch's own tracker over its own FSDP2, on blocks of one size, four ranks of which this is one."""
    tracked = pytest.importorskip("torch.distributed._tools.fsdp2_mem_tracker")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    width, layers, n = 64, 8, 4
    layer, linear = 2 * width * width * 4, partial(torch.nn.Linear, width, width, bias=False)
    dist.init_process_group("fake", rank=0, world_size=n, store=fake.FakeStore())
    try:
        mesh = dist.init_device_mesh("cpu", (n,))
        for method, phase in (("lora", "forward"), ("full", "backward")):
            model = torch.nn.Sequential(*(torch.nn.Sequential(linear(), linear()) for _ in range(layers)))
            model[:-1].requires_grad_(method == "full")  # frozen, so that forward is the peak
            for block in (*model, model):
                fully_shard(block, mesh=mesh)
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

            trained = constant(layer * (method == "full"))
            run = Tensors(resolve(LORA), layer, constant(layers * layer), trained * layers, trained)
            ours = sum(value(b.size) for b in STRATEGIES["fsdp"].buffers(run) if phase in b.phases)
            assert ours == pytest.approx(buffers, rel=0.02)
    finally:
        dist.destroy_process_group()


def test_accumulation_leaves_fsdps_gradients_whole_and_not_zeros():
    moments = of(FULL)
    for sharding, share in (("fsdp", 1), ("zero2", 1 / 4), ("zero3", 1 / 4)):
        found = plan(moments, FULL.but(n_gpus=4, sharding=sharding, accumulation=2)).moments["optimizer"]
        assert value(found["gradients"]) == value(moments["optimizer"]["gradients"]) * share


@pytest.mark.parametrize(
    "sharding, accumulation, weights, gradients",
    [
        ("ddp", 1, 0, 2), ("zero1", 1, 0, 2), ("zero2", 1, 0, 2), ("zero3", 1, 2, 1), ("fsdp", 1, 2, 1),
        ("ddp", 4, 0, 2), ("zero2", 4, 0, 5), ("zero3", 4, 8, 4), ("fsdp", 4, 8, 1),
    ],
)  # fmt: skip
def test_what_a_gpu_sends(sharding, accumulation, weights, gradients):
    """2Ψ, and 3Ψ where weights are divided: ZeRO, section 7. With LoRA the frozen weights are most of it."""
    for spec in (FULL, LORA):
        report = predict(resolve(spec))
        found = plan(of(spec), spec.but(n_gpus=8, sharding=sharding, accumulation=accumulation))
        assert value(found.sent) == pytest.approx((weights * report.weights + gradients * report.gradients) * 7 / 8)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_gpus": 2}, "sharding=none: 2 GPUs would train as many models; set it to ddp"),
        ({"offload": "optimizer", "sharding": "ddp"}, "offload=optimizer: sharding=ddp.*zero1 or zero2 or zero3$"),
        ({"offload": "parameters", "sharding": "zero2"}, "offload=parameters: .*zero3 or fsdp, or offload to optimizer"),
        ({"quantization": "int8", "sharding": "zero3"}, "sharding=zero3: int8.*set it to zero2, or quantization to nf4"),
    ],
)  # fmt: skip
def test_refusals(settings, words):
    with pytest.raises(SpecError, match=words):
        plan(of(LORA), LORA.but(**settings))


def test_what_is_divided_here_is_what_a_run_can_set_and_a_report_has():
    assert tuple(STRATEGIES) == SETTINGS["sharding"].choices
    assert {o for s in STRATEGIES.values() for o in s.offloads} == set(SETTINGS["offload"].choices) - {"none"}
    assert {*STATES, "temporaries", "communication"} < {*KINDS}
