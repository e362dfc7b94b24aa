"""Training rows as tensors: every row once, little padding, labels where the answers are.

Packed, that each token sees its own row, and that losses and gradients are those of rows side by side.
"""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, fresh, moved, run_of, small

from peftlab import seam
from peftlab.methods import METHODS
from peftlab.run import batches
from peftlab.run.batches import IGNORED, Batches, Pair, pack, why_not_packed, widths

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a run packs its rows on a CPU only")


def pairs(lengths, prompt=3):
    """Rows of these lengths whose tokens tell which row they are from."""
    return [Pair([i] * prompt, [i] * (n - prompt)) for i, n in enumerate(lengths, 1)]


def rows(batch):
    """The rows of a batch: (prompt, answer) without padding."""
    found = []
    for row, label in zip(*batch.data.tolist(), strict=True):
        learned = [i for i, token in enumerate(label) if token != IGNORED]
        first, end = learned[0], learned[-1] + 1
        assert label[first:end] == row[first:end] and set(row[end:]) <= {0}
        found.append((row[:first], row[first:end]))
    return found


@pytest.mark.parametrize("size, pieces", [(1, 1), (4, 1), (2, 3), (7, 1)])
def test_every_row_comes_once_an_epoch_but_for_what_waits(size, pieces):
    lengths = random.Random(0).choices(range(4, 40), k=50)
    made = Batches(pairs(lengths), size, pieces, seed=3, pad=0)
    seen = []
    for step in itertools.islice(made, 200):
        assert len(step) == pieces and len({batch.shape for batch in step}) == 1
        for batch in step:
            found, narrow = rows(batch), batch.trimmed()
            assert len(found) == size and batch.start == 2 == narrow.start and rows(narrow) == found
            assert narrow.data.shape[2] == max(len(p) + len(a) for p, a in found)
            assert (batch.tokens, batch.answers) == (
                sum(len(p) + len(a) for p, a in found),
                sum(len(a) for _, a in found),
            )
            for prompt, answer in found:
                assert len(prompt + answer) == lengths[prompt[0] - 1] and set(prompt) == set(answer)
                seen.append(prompt[0])
    counts = [seen.count(i) for i in range(1, 51)]
    waiting = size * pieces * len(made.widths)
    assert max(counts) - min(counts) <= 1 + waiting // 10 and min(counts) >= 1


def test_order_hangs_on_the_seed_and_a_batch_may_be_larger_than_the_task():
    def first(seed):
        return rows(next(iter(Batches(pairs([6] * 64), 80, 1, seed, pad=0)))[0])

    assert first(1) == first(1) != first(2)
    assert len(first(1)) == 80 and len({prompt[0] for prompt, _ in first(1)}) == 64


def padding(lengths, found):
    return sum(min(w for w in found if w >= n) - n for n in lengths) / sum(lengths)


@pytest.mark.parametrize("limit", [math.inf, 0.5, 0.1, 0.02, 0.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_widths_are_the_fewest_that_keep_padding_low(limit, seed):
    """Against every choice of widths."""
    draw = random.Random(seed)
    lengths = draw.choices(range(5, 14), k=draw.randint(1, 30))
    found = widths(lengths, limit)
    assert found == sorted(set(found)) and found[-1] == max(lengths)
    assert padding(lengths, found) <= limit
    for fewer in itertools.combinations(sorted(set(lengths))[:-1], len(found) - 2) if len(found) > 1 else ():
        assert padding(lengths, [*fewer, max(lengths)]) > limit


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
    assert len(ids) <= sum(map(len, rows))


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
        for pieces in itertools.islice(run.batches, 3):
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
    assert "packed rows" in why_not_packed(model, 20)
    monkeypatch.setattr(batches, "pack", lambda one: replace(own(one), mask=own(one).mask[0]))
    assert "takes no mask of its own" in why_not_packed(model, 20)
    assert model.training == fresh("llama").training


@on_a_cpu
def test_dropout_is_told(tiny_model, toy_task, tmp_path):
    run = run_of(small(tiny_model, "lora", dropout=0.1), tmp_path)
    assert not run.gear.packs and "rows side by side (dropout draws for each)" in run.fused.kept
