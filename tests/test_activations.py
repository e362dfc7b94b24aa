"""The closed form of a step: that its lines are its numbers. tests/test_trace.py holds it against traces."""

import random
import re

import pytest

from peftlab import RunSpec, SpecError, resolve
from peftlab.base.models import MODELS
from peftlab.memory import activations
from peftlab.memory.activations import derivation, moments
from peftlab.memory.lines import total
from peftlab.memory.report import KINDS
from peftlab.methods import METHODS

H100 = "h100-80gb"
DECODERS = [key for key, entry in MODELS.items() if entry.config and entry.is_causal and not entry.shape_of]


def spec_of(model="llama-3.1-8b", method="lora", **settings):
    usual = {"precision": "bf16", "batch_size": 2, "sequence_length": 512, "gpu": H100}
    return resolve(RunSpec(model=model, method=method, **usual | settings))


def at(spec):
    return spec.batch_size, spec.sequence_length, spec.rank or 1


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


def test_the_lines_are_the_numbers():
    """And no coefficient is negative, so that more never takes less."""
    for spec in random_specs(150):
        parts, (b, s, r) = derivation(spec), at(spec)
        assert {part.kind for part in parts} <= set(KINDS)
        for moment, kinds in moments(spec).items():
            for kind, size in kinds.items():
                alive = [p.size.value(b, s, r) for p in parts if moment in p.moments and p.kind == kind]
                assert size.value(b, s, r) == pytest.approx(sum(alive))
        for part in parts:
            assert min(part.size.terms.values()) >= 0, (spec, part)
            if "N " not in part.numbers:  # the number of parameters, which the rank changes
                value = eval(part.numbers.replace(",", "").replace("×", "*"), {"B": b, "S": s, "r": r})
                assert value == pytest.approx(part.size.value(b, s, r), rel=2e-3), part


def test_runs_of_other_sizes_share_their_polynomials_and_each_has_its_own():
    """What is kept for one batch, length and rank is what another one's lines add up to, and none is kept that is refused."""
    draw, compared = random.Random(1), 0
    for spec in random_specs(60, seed=1):
        for _ in range(3):
            sizes = {"batch_size": draw.randint(1, 64), "sequence_length": draw.choice([8, 100, 513, 4096, 5000])}
            if spec.rank:
                sizes["rank"] = draw.choice([1, 3, 64, 200])
            given = {n: v for n, v in spec.to_dict().items() if n not in ("alpha", "learning_rate")}
            try:
                other = resolve(RunSpec(**given | sizes))
                parts = derivation(other)
            except SpecError as error:
                with pytest.raises(SpecError, match=re.escape(str(error))):
                    moments(other)
                continue
            for moment, kinds in moments(other).items():
                for kind, size in kinds.items():
                    alive = total(p.size for p in parts if moment in p.moments and p.kind == kind)
                    assert {k: x for k, x in size.terms.items() if x} == pytest.approx(
                        {k: x for k, x in alive.terms.items() if x}
                    ), (other, moment, kind)
            compared += 1
    assert compared > 100 and activations._moments.cache_info().hits > 20


def test_each_method_has_what_it_keeps():
    """A method that has modules of its own keeps something of them; one that trains the base's parameters does not."""
    alone = {"prompt", "p-tuning", "prefix", "ln"}
    for method in METHODS.values():
        assert bool(method.keeps) != (method.in_place or method.key in alone), method.key


FULL = 16 * 4096 + 4 * 4096 + 4 * 1024 + 8 * 14336 + 4 * 32 + 8
FROZEN = 8 * 4096 + 4 * 4096 + 4 * 1024 + 6 * 14336 + 4 * 32 + 8
"""Bytes a token and layer of a Llama in bf16, here of Llama 3.1 8B, counted by hand."""
ADAPTED = 4 * (5 * 4096 + 4096 + 14336) + 7 * 4 * 16  # q, k, v, gate, up; o; down
SHARED = 2 * (4096 + 4096 + 14336) + 7 * 2 * 16  # q, k and v read one tensor, gate and up another; o's is kept anyway


@pytest.mark.parametrize(
    "settings, each",
    [
        ({"method": "full"}, FULL), ({"rank": 16}, FROZEN + ADAPTED), ({"rank": 16, "adapter_precision": "bf16"}, FROZEN + SHARED),
        ({"rank": 16, "target_modules": "query,value"}, FROZEN + 4 * 2 * 4096 + 2 * 4 * 16),
    ],
)  # fmt: skip
def test_a_llama_by_hand(settings, each):
    """What the layers keep at the end of the forward pass."""
    spec = spec_of(**settings)
    names = ("norms", "attention", "feed-forward", "inputs of linear maps", "LoRA")
    assert sum(p.size.value(*at(spec)) for p in derivation(spec) if p.name in names) == 32 * 2 * 512 * each


def test_lines_by_hand():
    assert line(spec_of(layers="last:4"), "norms").numbers.startswith("4 × B × S")
    checkpointed = spec_of(layers="last:4", gradient_checkpointing=True)
    assert line(checkpointed, "layers' inputs").numbers == "2 × 32 × B × S × 4,096"
    assert line(spec_of(), "logits at the loss").size.value(*at(spec_of())) == 12 * 1024 * 128_256
    assert line(spec_of(), "logits at the loss").symbols == "12 × B × S × V"
    short, long = spec_of("gemma-3-1b", sequence_length=256), spec_of("gemma-3-1b", sequence_length=1024)
    assert not any("masked" in p.name for p in derivation(short))  # a window that the text fills takes a mask
    assert line(long, "masked attention, squared").numbers == "2 × 22 × B × S × S"
    virtual = spec_of(method="prompt", virtual_tokens=20)  # they lengthen the text, and peft makes logits for them too
    assert all("(S + 20)" in line(virtual, name).numbers for name in ("norms", "logits at the loss"))
