"""A task's rows as tensors: tokenized once, in batches of like length, padded to few widths or packed.

Packed, the rows are one sequence in which the instruction that all begin with is read once. Losses and gradients are those of
rows side by side, up to rounding. It pays on a CPU, where a step takes as long as its arithmetic.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, chain, count, islice
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, device

from .. import seam
from ..data import tasks
from ..data.tasks import Row, Task
from ..fused import attention, trial
from . import graphs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..base import weights

T = TypeVar("T")
PADDING = 0.1
"""The most padding, as a share of the real tokens: rows of other lengths go to batches of another width."""
TASKS_KEPT = 8
"""What is known of a task together with a base is kept for so many tasks."""
IGNORED = -100
"""The label of a token that nothing is learned from, as torch has it."""


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
    """2 × rows × width, int64: token ids, and labels, which are IGNORED outside of answers."""
    start: int
    """The first position that predicts a token of an answer: logits are needed from here on."""
    answers: int
    """How many tokens there are to learn from."""
    tokens: int
    """How many tokens are not padding."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, width, start: batches of one shape take the same arithmetic."""
        return (self.data.shape[1], self.data.shape[2], self.start)

    def to(self, device: device) -> Batch:
        return replace(self, data=self.data.to(device, non_blocking=True))

    def inputs(self) -> dict[str, Tensor]:
        """What `seam.logits` asks the model with."""
        ids = self.data[0]
        # an index: with a slice the head would copy its weight
        last = torch.arange(self.start - ids.shape[1], 0, device=ids.device)
        return {"input_ids": ids, "keep": last}

    def learned(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """(the model's output where a token is predicted, those tokens; IGNORED where nothing is learned)"""
        return out[:, :-1], self.data[1, :, self.start + 1 :]

    def trimmed(self) -> Batch:
        """The same rows, as narrow as the longest allows, for whoever has no use for equal shapes."""
        learned = self.data[1] != IGNORED
        width = int(learned.any(0).nonzero().max()) + 1
        start = int(learned.int().argmax(1).min()) - 1
        return Batch(self.data[:, :, :width], start, self.answers, self.tokens)


def pairs_of(base: weights.Base, task: Task, rows: Sequence[Row]) -> list[Pair]:
    """Training rows of a task as token ids, which are found once for each base, as its tokenizer never changes."""
    known: dict[Task, dict[Row, Pair]] = base.measured.setdefault("pairs", {})
    if (pairs := known.get(task)) is None:
        pairs = known[task] = dict(zip(task.train, encode(base.tokenizer, task, task.train), strict=True))
        forget(known)
    return [pairs[row] for row in rows]


def forget(known: dict[Task, T]) -> None:
    """Leaves what is known of the last TASKS_KEPT tasks."""
    for old in list(known)[:-TASKS_KEPT]:
        known.pop(old, None)


def encode(tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row]) -> list[Pair]:
    return [
        Pair(tasks.prompt_ids(tokenizer, task.instruction, row.prompt), tasks.answer_ids(tokenizer, row.answer))
        for row in rows
    ]


def widths(lengths: Sequence[int], padding: float = PADDING) -> list[int]:
    """The fewest widths, ascending, to which rows of `lengths` can be padded with at most that share of `padding`."""
    counted = sorted(Counter(lengths).items())
    rows = [0, *accumulate(n for _, n in counted)]
    tokens = [0, *accumulate(length * n for length, n in counted)]

    @cache
    def cheapest(end: int, groups: int) -> tuple[float, tuple[int, ...]]:
        """The least padding of the `end` shortest lengths in so many widths, and those widths."""
        if not (end and groups):
            return (0 if end == groups else math.inf), ()
        wide, options = counted[end - 1][0], []
        for begin in range(end):  # from this length on, rows are padded to `wide`
            before, found = cheapest(begin, groups - 1)
            own = wide * (rows[end] - rows[begin]) - (tokens[end] - tokens[begin])
            options.append((before + own, (*found, wide)))
        return min(options, key=lambda option: option[0])

    tried = (cheapest(len(counted), groups) for groups in count(1))
    return next(list(found) for padded, found in tried if padded <= padding * tokens[-1])


class Batches:
    """The batches of each step, without end: every row once in a seeded order, then again in another.

    A step has `pieces` batches (gradient accumulation) of `size` rows, all of one width. `pad` is the token that fills rows
    up; `pinned` batches lie in memory that a GPU can read by itself.
    """

    def __init__(
        self, pairs: Sequence[Pair], size: int, pieces: int, seed: int, pad: int, pinned: bool = False,
        padding: float = PADDING,
    ) -> None:  # fmt: skip
        self.pairs, self.size, self.pieces, self.pad, self.pinned = pairs, size, pieces, pad, pinned
        self.draw = random.Random(seed)
        self.widths = widths([len(pair) for pair in pairs], padding)
        self.waiting: dict[int, list[Pair]] = {width: [] for width in self.widths}
        self.starts = {width: min(len(p.prompt) for p in pairs if self._width(p) == width) - 1 for width in self.widths}

    def _width(self, pair: Pair) -> int:
        return next(width for width in self.widths if len(pair) <= width)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self.after(0)

    def after(self, steps: int) -> Iterator[list[Batch]]:
        """The batches of the steps that follow the next `steps`, which are drawn but not made."""
        for rows, width in islice(self._drawn(), steps, None):
            yield [self._batch(rows[i : i + self.size], width) for i in range(0, len(rows), self.size)]

    def _drawn(self) -> Iterator[tuple[list[Pair], int]]:
        """The rows of each step, and the width of all of them."""
        while True:
            for pair in self.draw.sample(self.pairs, len(self.pairs)):
                width = self._width(pair)
                rows = self.waiting[width]
                rows.append(pair)
                if len(rows) == self.size * self.pieces:
                    self.waiting[width] = []
                    yield rows, width

    def _batch(self, rows: Sequence[Pair], width: int) -> Batch:
        blank = [width - len(row) for row in rows]
        ids = [row.prompt + row.answer + [self.pad] * n for row, n in zip(rows, blank, strict=True)]
        labels = [[IGNORED] * len(row.prompt) + row.answer + [IGNORED] * n for row, n in zip(rows, blank, strict=True)]
        data = torch.tensor([ids, labels])
        answers = sum(len(row.answer) for row in rows)
        return Batch(graphs.pinned(data) if self.pinned else data, self.starts[width], answers, sum(map(len, rows)))


@dataclass(frozen=True)
class Packed:
    ids: Tensor
    """1 × length, int64."""
    positions: Tensor
    """1 × length: the place of each token in its own row."""
    mask: Tensor
    """1 × 1 × length × length, bool: which tokens each token attends to."""
    predicting: Tensor
    """The places whose next token is to be learned: logits are needed there and nowhere else."""
    labels: Tensor
    """1 × places: those next tokens."""

    def inputs(self) -> dict[str, Tensor]:
        """What `seam.logits` asks the model with."""
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": self.mask,
                "keep": self.predicting}  # fmt: skip

    def learned(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """(the model's output where a token is predicted, those tokens)"""
        return out, self.labels


def pack(batch: Batch) -> Packed:
    """Packs the rows of a batch on a CPU. The mask also says which tokens make which row, for `fused.attention`."""
    ids, labels = batch.data
    learned = labels != IGNORED
    ends = (learned * torch.arange(1, learned.shape[1] + 1)).amax(1, keepdim=True)  # padding comes after the answer
    place = torch.arange(int(ends.max()))
    ids, labels, learned = (each[:, : len(place)] for each in (ids, labels, learned))
    alike = (ids == ids[0]).all(0).cumprod(0)
    shared = min(int(alike.sum()), batch.start)  # the first token to be predicted follows a token of its own row
    own = (place >= shared) & (place < ends)
    row, at = own.nonzero(as_tuple=True)
    row_of, positions = torch.cat((torch.full((shared,), -1), row)), torch.cat((place[:shared], at))
    order = torch.arange(len(positions))
    mask = ((order[:, None] >= order) & ((row_of[:, None] == row_of) | (row_of < 0)))[None, None]
    side = torch.zeros(own.shape, dtype=torch.int64)  # where each token of each row stands in the sequence
    side[:, :shared], side[own] = place[:shared], order[shared:]
    back = torch.cat((place[:shared], row * len(place) + at))  # the inverse
    setattr(mask, attention.ROWS, (side, back))
    rows, places = learned.nonzero(as_tuple=True)
    tokens, predicting = torch.cat((ids[0, :shared], ids[own])), side[rows, places - 1]
    return Packed(tokens[None], positions[None], mask, predicting, labels[learned][None])


def why_not_packed(model: PreTrainedModel, longest: int) -> str:
    """Why a model in training on a CPU cannot read rows of up to `longest` tokens packed, as tried on two; empty if it can."""
    nearest = min(chain.from_iterable(map(seam.windows, seam.configs_of(model))), default=longest)
    if nearest < longest:
        return f"tokens attend to {nearest} others at most"
    if not all(seam.takes(model, name) for name in seam.PLACES):
        return "this model is not told where tokens stand"
    if seam.first_position(model):
        return "this model counts positions from another number"
    ids = torch.tensor([[5, 11, 3, 7, 2, 9], [5, 11, 8, 4, 4, 1]]) % model.config.vocab_size
    labels = ids.clone()
    labels[:, :3] = labels[1, 5] = IGNORED
    was, tried = model.training, Batch(torch.stack((ids, labels)), 2, 5, 11)
    model.eval()
    try:
        with torch.no_grad():
            apart = seam.logits(model, **tried.inputs())
            together = seam.logits(model, **pack(tried).inputs())[0]
    except Exception as error:  # anybody's architecture, in transformers' code
        return f"this model takes no mask of its own: {type(error).__name__}"
    finally:
        model.train(was)
    apart, labels = tried.learned(apart)
    apart = apart[labels != IGNORED]
    same = apart.shape == together.shape and (apart - together).abs().max() <= trial.rounding(apart.dtype) * apart.std()
    return "" if same else "its packed rows give other logits than padded ones"
