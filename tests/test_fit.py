"""What fits where: every answer is held against the prediction that it stands for, and against its neighbour that must not fit."""

from itertools import combinations, takewhile

import pytest

from peftlab import RunSpec, SpecError, predict, resolve
from peftlab.base.models import MODELS
from peftlab.catalog.gpus import GPUS
from peftlab.memory import cheapest_changes, closed_form, exact, fits, gpu_grid, largest, largest_model, storage
from peftlab.memory.fit import CHANGES, CLUSTER, MOST_PASSES
from peftlab.spec import SETTINGS

BILLION = 10**9
ON = {"gpu": "h100-80gb"}
RUNS = [RunSpec(**run, **ON) for run in (
    {"model": "llama-3.1-8b", "rank": 16},
    {"model": "llama-3.1-8b", "method": "full"},
    {"model": "gemma-3-270m", "method": "full", "precision": "bf16", "batch_size": 4, "sequence_length": 512},
    {"model": "llama-3.1-70b", "method": "lora", "batch_size": 16, "sequence_length": 4096},
    {"model": "llama-3.1-8b", "method": "qlora", "batch_size": 64, "sequence_length": 8192},
    {"model": "mixtral-8x7b", "method": "full"},
)]  # fmt: skip
EACH_RUN = pytest.mark.parametrize("spec", RUNS, ids=lambda s: f"{s.model} {s.method or 'lora'}")


def process(spec):
    try:
        return predict(resolve(spec)).process
    except SpecError:
        return float("inf")


def test_fits():
    found = fits(30 * BILLION)
    assert [f.gpu.key for f in found] == list(GPUS)
    for fit in found:
        assert (fit.n_gpus == 1) == (fit.gpu.memory_bytes >= 30 * BILLION)
        assert (fit.n_gpus - 1) * fit.gpu.memory_bytes < 30 * BILLION <= fit.n_gpus * fit.gpu.memory_bytes
    sizes = [f.gpu.memory_bytes for f in found]
    assert sizes == sorted(sizes)


@EACH_RUN
def test_the_grid_is_what_predict_says(spec):
    report = predict(resolve(spec))
    frugal = spec.but(gradient_checkpointing=True)
    runs = {(n, less): frugal if less else spec for n in CLUSTER for less in (0, 1)}
    shared = {key: process(run.but(n_gpus=key[0], sharding="fsdp")) for key, run in runs.items()}
    for fit in gpu_grid(report):
        room = fit.gpu.memory_bytes
        assert fit.share == pytest.approx(report.process / room)
        if report.process <= room:
            assert (fit.n_gpus, fit.checkpointed) == (1, False)
        elif process(frugal) <= room:
            assert (fit.n_gpus, fit.checkpointed) == (1, True)
        elif fit.n_gpus:
            assert shared[fit.n_gpus, fit.checkpointed] <= room
            assert not any(shared[n, fit.checkpointed] <= room for n in CLUSTER if n < fit.n_gpus)
            assert not (fit.checkpointed and any(shared[n, 0] <= room for n in CLUSTER))
        else:
            assert min(shared.values()) > room


def test_the_grid_has_every_answer():
    found = [fit for spec in RUNS for fit in gpu_grid(predict(resolve(spec)))]
    assert {f.gpu.key for f in found} == set(GPUS) and len(found) == len(GPUS) * len(RUNS)
    kinds = {(min(f.n_gpus, 2), f.checkpointed) for f in found}
    assert kinds == {(1, False), (1, True), (2, False), (2, True), (0, False)}


def test_the_grid_of_what_has_no_step_or_was_traced(tiny_model):
    report = predict(resolve(RunSpec(model="100B", method="full")), "12n")
    assert gpu_grid(report) == fits(report.states)
    report = exact(resolve(RunSpec(model=str(tiny_model), batch_size=2, sequence_length=64)))
    assert all(f.n_gpus == 1 and f.share == report.process / f.gpu.memory_bytes for f in gpu_grid(report))


@EACH_RUN
@pytest.mark.parametrize("setting", ["batch_size", "sequence_length"])
def test_the_largest_fits_and_one_more_does_not(spec, setting):
    form, about = closed_form(resolve(spec)), SETTINGS[setting]
    for gpu in GPUS.values():
        found = largest(form, setting, gpu.memory_bytes)
        if not found:
            assert process(spec.but(**{setting: int(about.low)})) > gpu.memory_bytes
            continue
        assert about.low <= found <= about.high
        assert process(spec.but(**{setting: found})) <= gpu.memory_bytes
        assert found == about.high or process(spec.but(**{setting: found + 1})) > gpu.memory_bytes


@pytest.mark.parametrize("settings", [{}, {"method": "full"}, {"method": "qlora"}, {"method": "bitfit"}], ids=str)
@pytest.mark.parametrize("gpu", ["t4", "a100-40gb", "b200"])
def test_the_largest_model_fits_and_no_larger_one_does(settings, gpu):
    spec, room = RunSpec(batch_size=1, sequence_length=512, **ON, **settings), GPUS[gpu].memory_bytes
    found = largest_model(resolve(spec), room)
    assert found and process(spec.but(model=found)) <= room
    larger = [m for m in MODELS.values() if m.is_causal and (m.total_parameters or 0) > MODELS[found].total_parameters]
    assert all(process(spec.but(model=m.key)) > room for m in larger)


def test_what_nothing_fits():
    form = closed_form(resolve(RUNS[0]))
    assert largest(form, "batch_size", 10**6) == largest(form, "sequence_length", 10**6) == 0
    assert largest_model(resolve(RunSpec(**ON)), 10**8) is None
    assert cheapest_changes(resolve(RunSpec(model="gpt3-175b", method="full", **ON)), GPUS["t4"].memory_bytes) is None


CHANGED = [
    (RunSpec(model="llama-3.1-8b", rank=16, batch_size=8, sequence_length=1024, **ON), "rtx-4090"),
    (RunSpec(model="llama-3.1-8b", method="full", **ON), "h100-80gb"),
    (RunSpec(model="llama-3.1-8b", method="full", **ON), "rtx-4090"),
    (RunSpec(model="gemma-3-270m", method="full", batch_size=16, sequence_length=2048, **ON), "rtx-4090"),
    (RunSpec(model="llama-3.1-70b", rank=16, batch_size=4, sequence_length=1024, **ON), "h100-80gb"),
    (RunSpec(model="smollm2-1.7b", method="full", precision="bf16", batch_size=1, sequence_length=128, **ON), "t4"),
    (RunSpec(model="smollm2-1.7b", method="houlsby", batch_size=2, sequence_length=2048, **ON), "t4"),
    (RunSpec(model="llama-3.1-8b", method="qlora", rank=512, batch_size=1, sequence_length=128, **ON), "t4"),
]


def test_the_cheapest_changes_do_and_fewer_do_not():
    """They keep the other settings, and each change is somebody's cheapest."""
    seen = set()
    for asked, gpu in CHANGED:
        spec, room = resolve(asked), GPUS[gpu].memory_bytes
        assert process(spec) > room
        found, changed = cheapest_changes(spec, room)
        assert process(changed) <= room
        moved = {k for c in found for k in c.apply(spec)}
        if not moved & {"method", "quantization"}:  # which bring settings of their own
            assert {k for k, v in changed.to_dict().items() if spec.to_dict().get(k) != v} <= moved
        assert changed.batch_size * changed.accumulation == spec.batch_size * spec.accumulation
        every = (chosen for n in range(1, len(found) + 1) for chosen in combinations(CHANGES, n))
        for chosen in takewhile(found.__ne__, every):
            if all(changes := [c.apply(spec) for c in chosen]):
                assert process(RunSpec(**spec.to_dict() | {k: v for c in changes for k, v in c.items()})) > room
        seen |= set(found)
    assert seen == set(CHANGES)


def test_storage_is_16_bit():
    disk = storage(predict(resolve(RunSpec(model="100B")), "8n", 500_000_000), 50)
    assert (disk.tasks, disk.full, disk.adapters, disk.base) == (50, 10 * 10**12, 50 * BILLION, 200 * BILLION)
    disk = storage(predict(resolve(RunSpec(model="llama-2-7b", rank=8, target_modules="q_proj,v_proj"))), 3)
    assert (disk.full, disk.adapters, disk.base) == (6 * 6_738_415_616, 6 * 4_194_304, 2 * 6_738_415_616)


@pytest.mark.parametrize("batch, accumulation, gpu", [(2000, 1, "rtx-4090"), (70, 1, "rtx-4090"), (40, 2, "t4")])
def test_a_batch_of_too_many_passes_is_made_smaller_by_as_little_as_fits(batch, accumulation, gpu):
    settings = {"batch_size": batch, "accumulation": accumulation, "sequence_length": 512}
    spec, room = resolve(RunSpec(model="smollm2-360m", precision="bf16", **settings, **ON)), GPUS[gpu].memory_bytes
    assert process(spec) > room
    (change,), changed = cheapest_changes(spec, room)
    size = changed.batch_size
    assert change.apply(spec) == {"batch_size": size} and change.words == f"batch size {size}"
    assert changed.accumulation == accumulation and size & (size - 1) == 0
    assert process(changed) <= room and (2 * size >= batch or process(spec.but(batch_size=2 * size)) > room)


def test_a_batch_is_kept_by_passes_up_to_a_limit():
    spec = RunSpec(model="llama-3.1-8b", rank=16, sequence_length=1024, **ON)
    room = GPUS["rtx-4090"].memory_bytes
    kept, smaller = (cheapest_changes(resolve(spec.but(batch_size=n)), room)[1] for n in (MOST_PASSES, MOST_PASSES + 1))
    assert (kept.batch_size, kept.accumulation) == (1, MOST_PASSES)
    assert smaller.accumulation == 1 and smaller.batch_size < MOST_PASSES
    with_others, _ = cheapest_changes(resolve(spec.but(batch_size=2000, optimizer="adamw")), GPUS["t4"].memory_bytes)
    assert with_others[0].words.startswith("batch size ") and len(with_others) > 1
