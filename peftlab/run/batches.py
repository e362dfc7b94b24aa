"""A task's rows as tensors: tokenized once, in batches of like length, padded to few widths."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import tasks
from ..data.tasks import Row, Task
from . import graphs

if TYPE_CHECKING:
    from torch import Tensor

PADDING = 0.1
"""Most padding there may be, as a share of the real tokens: rows of other lengths go to batches of another width."""
IGNORED = -100
"""The label of a token that nothing is learned from: torch's own."""


@dataclass(frozen=True)
class Pair:
    """A training row as token ids."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, padded on the right, where causal attention needs no mask."""

    data: Tensor
    """2 × rows × width, int64: token ids, and labels that are IGNORED but for answers."""
    start: int
    """The first position that predicts a token of an answer: logits are needed from here on."""
    answers: int
    """Tokens to learn from."""
    tokens: int
    """That are not padding."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, width, start: batches of one shape take the same arithmetic."""
        return (self.data.shape[1], self.data.shape[2], self.start)

    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        import torch

        ids = self.data[0]
        # As a slice, the head would copy its weight.
        last = torch.arange(self.start - ids.shape[1], 0, device=ids.device)
        return {"input_ids": ids, "logits_to_keep": last}

    def learned(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """(what came `out` where a token is predicted, those tokens; IGNORED where nothing is learned)"""
        return out[:, :-1], self.data[1, :, self.start + 1 :]

    def trimmed(self) -> Batch:
        """As narrow as its own longest row allows, for whoever has no use for equal shapes."""
        learned = self.data[1] != IGNORED
        width = int(learned.any(0).nonzero().max()) + 1
        start = int(learned.int().argmax(1).min()) - 1
        return Batch(self.data[:, :, :width], start, self.answers, self.tokens)


def encode(tokenizer: Any, task: Task, rows: Sequence[Row]) -> list[Pair]:
    return [
        Pair(tasks.prompt_ids(tokenizer, task.instruction, row.prompt), tasks.answer_ids(tokenizer, row.answer))
        for row in rows
    ]


def widths(lengths: Sequence[int], padding: float = PADDING) -> list[int]:
    """The fewest widths, ascending, to which rows of `lengths` can be padded with no more `padding` than that."""
    counted = sorted(Counter(lengths).items())
    most = padding * sum(lengths)
    costs: list[list[float]] = [[0.0] + [float("inf")] * len(counted)]  # of the first i lengths in k widths
    cuts: list[list[int]] = []
    while len(costs) == 1 or costs[-1][-1] > most:
        before, cost, cut = costs[-1], [float("inf")], [0]
        for end in range(1, len(counted) + 1):
            wide = counted[end - 1][0]
            best, padded = (float("inf"), 0), 0
            for begin in range(end - 1, -1, -1):
                padded += counted[begin][1] * (wide - counted[begin][0])
                best = min(best, (before[begin] + padded, begin))
            cost.append(best[0])
            cut.append(best[1])
        costs.append(cost)
        cuts.append(cut)
    found, end = [], len(counted)
    for cut in reversed(cuts):
        found.append(counted[end - 1][0])
        end = cut[end]
    return found[::-1]


class Batches:
    """Steps without end, each of `pieces` batches of one width: every row once in a seeded order, then again in another."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: int,
        pieces: int,
        seed: int,
        pad: int,
        pinned: bool = False,
        padding: float = PADDING,
    ) -> None:
        self.pairs, self.size, self.pieces, self.pad, self.pinned = pairs, size, pieces, pad, pinned
        self.draw = random.Random(seed)
        self.widths = widths([len(pair) for pair in pairs], padding)
        self.waiting: dict[int, list[Pair]] = {width: [] for width in self.widths}
        self.starts = {width: min(len(p.prompt) for p in pairs if self._width(p) == width) - 1 for width in self.widths}

    def _width(self, pair: Pair) -> int:
        return next(width for width in self.widths if len(pair) <= width)

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            for pair in self.draw.sample(self.pairs, len(self.pairs)):
                width = self._width(pair)
                rows = self.waiting[width]
                rows.append(pair)
                if len(rows) == self.size * self.pieces:
                    self.waiting[width] = []
                    yield [self._batch(rows[i : i + self.size], width) for i in range(0, len(rows), self.size)]

    def _batch(self, rows: Sequence[Pair], width: int) -> Batch:
        import torch

        blank = [width - len(row) for row in rows]
        ids = [row.prompt + row.answer + [self.pad] * n for row, n in zip(rows, blank, strict=True)]
        labels = [[IGNORED] * len(row.prompt) + row.answer + [IGNORED] * n for row, n in zip(rows, blank, strict=True)]
        data = torch.tensor([ids, labels])
        answers = sum(len(row.answer) for row in rows)
        return Batch(graphs.pinned(data) if self.pinned else data, self.starts[width], answers, sum(map(len, rows)))
