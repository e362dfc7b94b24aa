"""A trace unrolled from a few layers is, moment by moment, the trace of the whole model."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, LLAMA
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from peftlab import RunSpec, resolve
from peftlab.memory import trace
from peftlab.memory.allocator import MIB
from peftlab.memory.report import KINDS
from peftlab.memory.tape import BEFORE, GIVE, NAME, WORKSPACE, Entry, Player, Recorder, unroll

DEPTH = 12
MOE = {"num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
DEEP = {family: CONFIGS[family] for family in ("llama", "gpt2", "opt", "qwen2")} | {
    "gemma3": CONFIGS["gemma3"] | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2},
    "qwen3": LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},
    "olmoe": LLAMA | {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe"} | MOE,
}
CASES = [
    *(("llama", {"method": method}) for method in ("full", "lora", "ia3", "head", "last-block", "prefix", "houlsby")),
    ("gemma3", {"method": "full"}),
    ("gemma3", {"method": "ia3", "gradient_checkpointing": True}),
    ("gemma3", {"method": "ia3", "layers": "last:4"}),
    ("gpt2", {"method": "dora"}),
    ("gpt2", {"method": "full", "optimizer": "adamw-8bit"}),
    ("opt", {"method": "full", "gradient_checkpointing": True}),
    ("qwen2", {"method": "ln", "precision": "amp"}),
    ("qwen3", {"method": "ln", "gradient_checkpointing": True}),
    ("olmoe", {"method": "full"}),
    ("olmoe", {"method": "ln", "gradient_checkpointing": True}),
    ("llama", {"method": "ia3", "layers": "0-3,7", "gradient_checkpointing": True}),
    ("llama", {"method": "ln", "accumulation": 3}),
    ("llama", {"quantization": "nf4", "layers": "last:4"}),
    *(("llama", {"method": "ln", "optimizer": o}) for o in ("paged-adamw-8bit", "lion", "sgd", "sgd-momentum")),
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Family → a config.json of 12 layers."""
    paths = {}
    for name, config in DEEP.items():
        file = tmp_path_factory.mktemp(name) / "config.json"
        file.write_text(json.dumps(config | {"n_layer" if "n_layer" in config else "num_hidden_layers": DEPTH}))
        paths[name] = str(file)
    return paths


def both(monkeypatch, **settings):
    """The trace of a shallow copy, unrolled, and that of all layers."""
    usual = {"method": "lora", "precision": "bf16", "batch_size": 2, "sequence_length": 40, "gpu": "h100-80gb"}
    spec = resolve(RunSpec(**usual | settings))
    monkeypatch.setattr(trace, "_known", {})
    short = trace.trace(spec)
    monkeypatch.setattr(trace, "_known", {})
    monkeypatch.setattr(trace.shallow, "shorten", lambda kinds: ([*range(len(kinds))], [*range(len(kinds))]))
    return short, trace.trace(spec)


@pytest.mark.parametrize("family, settings", CASES, ids=str)
def test_unrolled_is_the_whole(family, settings, deep, monkeypatch):
    short, whole = both(monkeypatch, model=deep[family], **settings)
    assert [(m.phase, m.part) for m in short.moments] == [(m.phase, m.part) for m in whole.moments]
    assert short == whole


def test_adafactors_temporaries_are_nearly_those_of_the_whole(deep, monkeypatch):
    """Its updates live from one parameter to the next, and the last of a shallow model is not the last of a deep one."""
    short, whole = both(monkeypatch, model=deep["llama"], method="full", optimizer="adafactor")
    assert (short.moments[:-1], short.after, short.reserved) == (whole.moments[:-1], whole.after, whole.reserved)
    ours, theirs = short.moments[-1], whole.moments[-1]
    assert ours.total == pytest.approx(theirs.total, rel=0.02)
    apart = [replace(m, bytes={**m.bytes, "temporaries": 0}) for m in (ours, theirs)]
    assert apart[0] == apart[1]


def test_a_trace_records_few_layers(deep, monkeypatch):
    seen = []
    record = trace._record
    monkeypatch.setattr(trace, "_known", {})
    monkeypatch.setattr(trace, "_record", lambda *args: seen.append(args[2]) or record(*args))
    trace.trace(resolve(RunSpec(model=deep["llama"], batch_size=1, sequence_length=16)))
    assert seen == [[0, 1, 2, 10, 11]]


def entries(*rows):
    return [Entry(key, size, kind, part) for key, size, kind, part in rows]


def test_unrolling_repeats_a_layers_entries():
    """Three layers recorded, the middle one copied: each keeps one tensor forward and frees it backward."""
    forward = entries(("e", 8, "activations", BEFORE), *((f"a{i}", 10 + i, "activations", i) for i in range(3)))
    backward = entries(*((f"a{i}", GIVE, "", i) for i in (2, 1, 0)), ("e", GIVE, "", BEFORE))
    copies, homes = [0, 1, 1, 1, 2], {}
    up = unroll("forward", forward, copies, 3, homes)
    down = unroll("backward", backward, copies, 3, homes)
    assert [(e.size, e.part) for e in up] == [(8, -1), (10, 0), (11, 1), (11, 2), (11, 3), (12, 4)]
    assert len({e.key for e in up}) == 6
    assert [e.key for e in down] == [e.key for e in reversed(up)] and {e.size for e in down} == {GIVE}
    assert [e.part for e in down] == [4, 3, 2, 1, 0, -1]


@pytest.mark.parametrize("later, fresh", [(lambda w: w * 2, True), (lambda w: w.t() * 2, False)])
def test_gradients_are_added_up_where_autograd_adds_them(later, fresh):
    def loss(weight):
        return (weight * 3).sum() + later(weight).sum()  # whose gradient comes first

    real = loss(torch.zeros(64, 32, requires_grad=True))
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        real.backward()
    assert ("aten::add_" in {event.name for event in seen.events()}) == fresh
    with FakeTensorMode(), Recorder(vocabulary=9, depth=1) as recorder:
        fake = loss(weight := torch.zeros(64, 32, requires_grad=True))
        recorder.begin("backward")
        fake.backward()
    sizes: dict = {}
    highest = 0
    for key, size, _, _ in recorder.phases["backward"]:
        sizes[key] = size
        highest = max(highest, sum(sizes.values()))
    assert highest // weight.nbytes == (2 if fresh else 3)


def test_the_player_counts_by_kind_and_keeps_the_highest():
    player = Player(32 * MIB)
    moments = player.play(
        entries(("w", 1000, "activations", -1), ("w", NAME, "frozen_weights", -1), ("x", 600, "activations", 0), ("x", GIVE, "", 0),
                ("y", 100, "logits", 0), ("c", WORKSPACE, "workspace", 1)), "forward",
    )  # fmt: skip
    assert [(m.phase, m.part) for m in moments] == [("forward", -1), ("forward", 0), ("forward", 1)]
    assert [m.total for m in moments] == [1024, 2048, 1024 + 512 + 32 * MIB]
    assert moments[1].bytes["activations"] == 1024 and moments[1].bytes["frozen_weights"] == 1024
    assert set(moments[0].bytes) == set(KINDS)
    assert player.total == sum(player.live.values()) == 1024 + 512 + 32 * MIB
    assert player.allocator.reserved == 2 * MIB + 32 * MIB
