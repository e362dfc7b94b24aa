"""The closed form of a step: that its lines are its numbers, and that the trace agrees."""

import random
import time

import pytest

from peftlab import RunSpec, SpecError, resolve
from peftlab.base.models import MODELS
from peftlab.memory.activations import derivation, moments
from peftlab.memory.report import KINDS
from peftlab.methods import METHODS

H100 = "h100-80gb"
DECODERS = [key for key, entry in MODELS.items() if entry.config and entry.is_causal and not entry.shape_of]


def spec_of(model="llama-3.1-8b", method="lora", **settings):
    usual = {"precision": "bf16", "batch_size": 2, "sequence_length": 512, "gpu": H100}
    return resolve(RunSpec(model=model, method=method, **usual | settings))


def at(spec):
    return spec.batch_size, spec.sequence_length, spec.rank or 1


def peak(spec):
    return max(sum(size.value(*at(spec)) for size in kinds.values()) for kinds in moments(spec).values())


def line(spec, name):
    return next(part for part in derivation(spec) if part.name == name)


def random_specs(n, seed=0):
    """Settings that resolve and suit the model, from all over the space."""
    draw, found = random.Random(seed), []
    while len(found) < n:
        try:
            spec = spec_of(
                draw.choice(DECODERS),
                draw.choice(list(METHODS)),
                batch_size=draw.randint(1, 8),
                sequence_length=draw.choice([64, 300, 512, 900]),
                precision=draw.choice(["bf16", "fp16", "fp32", "amp"]),
                gradient_checkpointing=draw.random() < 0.4,
                attention=draw.choice(["sdpa", "sdpa", "eager"]),
                optimizer=draw.choice(["adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "lion", "sgd"]),
                adapter_precision=draw.choice(["bf16", "fp32"]),
                accumulation=draw.choice([1, 4]),
                hold_outputs=draw.random() < 0.2,
                dropout=draw.choice([None, 0.1]),
            )
            moments(spec)
            found.append(spec)
        except SpecError:
            continue
    return found


SPECS = random_specs(150)


def test_the_lines_are_the_numbers():
    for spec in SPECS:
        parts = derivation(spec)
        assert {part.kind for part in parts} <= set(KINDS)
        for moment, kinds in moments(spec).items():
            for kind, size in kinds.items():
                alive = [p.size.value(*at(spec)) for p in parts if moment in p.moments and p.kind == kind]
                assert size.value(*at(spec)) == pytest.approx(sum(alive))


def test_no_coefficient_is_negative_so_that_more_never_takes_less():
    for spec in SPECS:
        for part in derivation(spec):
            assert min(part.size.terms.values()) >= 0, (spec, part)


def test_numbers_are_written_as_they_are_counted():
    """What stands in a line's numbers, read as arithmetic, is its size."""
    for spec in SPECS:
        b, s, r = at(spec)
        for part in derivation(spec):
            if "N " in part.numbers:  # the number of parameters, which the rank changes
                continue
            text = part.numbers.replace(",", "").replace("×", "*")
            value = eval(text, {"B": b, "S": s, "r": r})
            assert value == pytest.approx(part.size.value(b, s, r), rel=2e-3), part


def test_each_method_has_what_it_keeps():
    """A method that has modules of its own keeps something of them; one that trains the base's parameters does not."""
    alone = {"prompt", "p-tuning", "prefix", "ln"}
    for method in METHODS.values():
        assert bool(method.keeps) != (method.in_place or method.key in alone), method.key


FULL = 16 * 4096 + 4 * 4096 + 4 * 1024 + 8 * 14336 + 4 * 32 + 8
FROZEN = 8 * 4096 + 4 * 4096 + 4 * 1024 + 6 * 14336 + 4 * 32 + 8
"""shared/reference/FACTS.md, section 2: bytes a token and layer of a Llama in bf16, here of Llama 3.1 8B."""


def layers(spec):
    """Bytes that the layers keep at the end of the forward pass."""
    names = ("norms", "attention", "feed-forward", "inputs of linear maps", "LoRA")
    return sum(p.size.value(*at(spec)) for p in derivation(spec) if p.name in names)


def test_a_llama_by_hand():
    tokens = 2 * 512
    assert layers(spec_of(method="full")) == 32 * tokens * FULL
    adapted = 4 * (5 * 4096 + 4096 + 14336) + 7 * 4 * 16  # q, k, v, gate, up; o; down
    assert layers(spec_of(rank=16)) == 32 * tokens * (FROZEN + adapted)
    only = spec_of(rank=16, target_modules="query,value")
    assert layers(only) == 32 * tokens * (FROZEN + 4 * 2 * 4096 + 2 * 4 * 16)


def test_an_adapter_of_the_bases_format_copies_nothing():
    """Queries, keys and values read one tensor, gate and up another; attention keeps o's input anyway."""
    spec = spec_of(rank=16, adapter_precision="bf16")
    assert layers(spec) == 32 * 1024 * (FROZEN + 2 * (4096 + 4096 + 14336) + 7 * 2 * 16)


def test_nothing_is_kept_below_the_lowest_trained_layer():
    assert line(spec_of(layers="last:4"), "norms").numbers.startswith("4 × B × S")
    checkpointed = spec_of(layers="last:4", gradient_checkpointing=True)
    assert line(checkpointed, "layers' inputs").numbers == "2 × 32 × B × S × 4,096"


def test_logits_by_hand():
    spec = spec_of()
    assert line(spec, "logits at the loss").size.value(*at(spec)) == 12 * 1024 * 128_256
    assert line(spec, "logits at the loss").symbols == "12 × B × S × V"


def test_weights_are_those_of_the_count():
    from peftlab.memory.closed_form import predict_states

    for settings in ({}, {"method": "full"}, {"method": "qlora"}, {"method": "head"}, {"quantization": "int8"}):
        spec, found = spec_of(**settings), {}
        report = predict_states(spec)
        for part in derivation(spec):
            found[part.kind] = found.get(part.kind, 0) + ("optimizer" in part.moments) * part.size.value(*at(spec))
        assert found["trainable_weights"] == report.trainable_weights
        assert found.get("frozen_weights", 0) == pytest.approx(report.frozen_weights, abs=1)


def test_a_window_that_the_text_fills_takes_a_mask():
    short, long = spec_of("gemma-3-1b", sequence_length=256), spec_of("gemma-3-1b", sequence_length=1024)
    assert not any("masked" in p.name for p in derivation(short))
    assert line(long, "masked attention, squared").numbers == "2 × 22 × B × S × S"


def test_virtual_tokens_lengthen_the_text_but_not_the_loss():
    spec = spec_of(method="prompt", virtual_tokens=20)
    assert "(S + 20)" in line(spec, "norms").numbers and "(S + 20)" not in line(spec, "logits at the loss").numbers


def test_it_is_quick():
    specs = [spec_of("llama-3.1-70b", "dora", batch_size=b) for b in range(1, 21)]
    moments(specs[0])
    start = time.perf_counter()
    for spec in specs[1:]:
        moments(spec)
    assert (time.perf_counter() - start) / 19 < 0.02


AGAINST = [
    ("qwen3-0.6b", "full", {}),
    ("gpt2", "lora", {"batch_size": 4}),
    ("opt-350m", "houlsby", {}),
    ("gemma-3-270m", "ia3", {"sequence_length": 1024}),
    ("llama-3.2-1b", "dora", {"gradient_checkpointing": True}),
    ("smollm2-360m", "qlora", {}),
    ("smollm2-135m", "full", {"precision": "amp"}),
    ("olmoe-1b-7b", "lora", {}),
]


@pytest.mark.parametrize("model, method, settings", AGAINST)
def test_the_trace_agrees(model, method, settings):
    from peftlab.memory import exact

    spec = spec_of(model, method, **settings)
    assert peak(spec) == pytest.approx(exact(spec).allocated, rel=0.04)
