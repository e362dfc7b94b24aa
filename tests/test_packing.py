"""Rows read as one sequence: which tokens see which, and that losses and gradients are those of rows side by side."""

import random
from dataclasses import replace
from itertools import islice

import pytest
import torch
from tiny import CONFIGS, fresh, moved, run_of, small

from peftlab import seam
from peftlab.methods import METHODS
from peftlab.run import batches
from peftlab.run.batches import Batches, Pair, pack, why_not_packed

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a run packs its rows on a CPU only")


def batch(draw, words):
    """Rows that begin alike, some of them for longer than others, and a width for the longest."""
    start, size = draw.choices(range(words), k=draw.randint(1, 6)), draw.randint(1, 5)
    own = [[draw.choices(range(words), k=draw.randint(*n)) for n in ((0, 6), (1, 5))] for _ in range(size)]
    pairs = [Pair(start + prompt, answer) for prompt, answer in own]
    return next(iter(Batches(pairs, size, 1, 0, pad=0, padding=10.0)))[0].trimmed(), pairs


@pytest.mark.parametrize("seed", range(20))
def test_each_token_sees_its_own_row_up_to_itself(seed):
    draw = random.Random(seed)
    one, pairs = batch(draw, draw.choice((2, 500)))  # of two words, one fills rows up too
    packed = pack(one)
    ids, places, labels = packed.ids[0].tolist(), packed.positions[0].tolist(), packed.labels[0].tolist()
    seen = []
    for at, label in zip(packed.predicting.tolist(), labels, strict=True):
        visible = packed.mask[0, 0, at].nonzero().flatten().tolist()
        assert [places[i] for i in visible] == list(range(len(visible)))
        seen.append(([ids[i] for i in visible], label))
    rows = [pair.prompt + pair.answer for pair in pairs]
    wanted = [(r[:i], r[i]) for r, p in zip(rows, pairs, strict=True) for i in range(len(p.prompt), len(r))]
    assert sorted(seen) == sorted(wanted)
    assert (packed.answers, packed.tokens) == (len(labels), sum(map(len, rows)))
    assert len(ids) <= packed.tokens


def test_what_is_shared_stands_once():
    (one,) = next(iter(Batches([Pair([7, 8, 9, number], [1, 2]) for number in range(4)], 4, 1, 0, pad=0)))
    assert pack(one).ids.shape[1] == 3 + 4 * 3
    assert pack(replace(one, data=one.data[:, :1])).ids[0].tolist() == one.data[0, 0].tolist()


@on_a_cpu
@pytest.mark.parametrize("method", [m for m in METHODS if m != "bitfit"])  # llama has no bias
def test_every_method_learns_the_same_or_says_why_not(method, tiny_model, toy_task, tmp_path):
    runs = [run_of(small(tiny_model, method, batch_size=3), tmp_path / name) for name in ("packed", "apart")]
    runs[1].gear.packs = False
    told = [what for what in runs[0].fused.kept if "side by side" in what]
    assert runs[0].gear.packs != bool(told)
    assert bool(told) == (method in ("prompt", "p-tuning", "prefix"))
    found = []
    for run in runs:
        moved(run.model, 0.02)
        events = []
        for pieces in islice(run.batches, 3):
            list(run.launch(pieces))
            events += run.fetch(0.0)
        found.append([event[number] for event in events for number in ("loss", "gradient_norm")])
        run.close()
    assert found[0] == pytest.approx(found[1], rel=2e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_reads_packed_rows_or_says_why_not(family):
    model = fresh(family)
    assert why_not_packed(model, 20) == ""
    longest = min((window for config in seam.configs_of(model) for window in seam.windows(config)), default=0)
    assert bool(why_not_packed(model, longest + 1)) == bool(longest) == (family == "gemma3")


def test_a_model_whose_rows_come_out_otherwise_is_left_alone(monkeypatch):
    model, own = fresh("llama"), batches.pack
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)  # numbers as large as a trained model's, whose words depend on their order
    assert why_not_packed(model, 20) == ""
    monkeypatch.setattr(batches, "pack", lambda one: replace(own(one), positions=own(one).positions * 0))
    assert "rows are not" in why_not_packed(model, 20)
    monkeypatch.setattr(batches, "pack", lambda one: replace(own(one), mask=own(one).mask[0]))
    assert "takes no mask of its own" in why_not_packed(model, 20)
    assert model.training == fresh("llama").training


@on_a_cpu
def test_dropout_is_told(tiny_model, toy_task, tmp_path):
    run = run_of(small(tiny_model, "lora", dropout=0.1), tmp_path)
    assert not run.gear.packs and "rows side by side (dropout draws for each)" in run.fused.kept
