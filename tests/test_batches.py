"""Training rows as tensors: every row once, little padding, labels where the answers are."""

import itertools
import math
import random

import pytest

from peftlab.run.batches import IGNORED, Batches, Pair, widths


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
