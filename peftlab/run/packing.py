"""The rows of a batch as one sequence, in which the beginning that they share stands once.

Every row of a task begins with the same instruction, and what a token attends to is the same in each row, so it need not be
read more than once, and nothing is padded. Losses and gradients are those of the rows
side by side, up to rounding. For a CPU, where a step takes as long as its arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from ..fused import attention
from .batches import IGNORED, Batch

if TYPE_CHECKING:
    from torch import Tensor

CLOSE = 0.05
"""How far logits may be off, as a share of their spread, to be the same up to the rounding of bf16."""


@dataclass(frozen=True)
class Packed:
    ids: Tensor
    """1 × length, int64."""
    positions: Tensor
    """1 × length: of each token in its own row."""
    mask: Tensor
    """1 × 1 × length × length, bool: which tokens each token attends to."""
    predicting: Tensor
    """The places whose next token is to be learned: logits are needed there alone."""
    labels: Tensor
    """1 × places: those next tokens."""
    answers: int
    tokens: int
    """That are read, in all rows: what is shared counts in each, as in Batch."""

    def inputs(self) -> dict[str, Any]:
        """What the model is called with."""
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": self.mask,
                "logits_to_keep": self.predicting}  # fmt: skip

    def learned(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """(what came `out` where a token is predicted, those tokens)"""
        return out, self.labels


def pack(batch: Batch) -> Packed:
    """Of a batch, on its device."""
    import torch

    ids, labels = batch.data.tolist()
    ends = [max(i for i, label in enumerate(row) if label != IGNORED) + 1 for row in labels]
    alike = (batch.data[0] == batch.data[0, 0]).all(0).cumprod(0)
    shared = min(int(alike.sum()), batch.start)  # the first token to be predicted follows a token of its own row
    starts = [shared]
    for end in ends:
        starts.append(starts[-1] + end - shared)
    row_of = torch.zeros(starts[-1], dtype=torch.int64)
    for number, (begin, end) in enumerate(pairwise(starts), 1):
        row_of[begin:end] = number
    place = torch.arange(starts[-1])
    mask = (place[:, None] >= place) & ((row_of[:, None] == row_of) | (row_of == 0))
    positions = [*range(shared), *chain.from_iterable(range(shared, end) for end in ends)]
    tokens = [*ids[0][:shared], *chain.from_iterable(row[shared:end] for row, end in zip(ids, ends, strict=True))]
    learned = [
        (begin + at - 1 - shared, row[at])
        for row, begin, end in zip(labels, starts, ends, strict=False)
        for at in range(shared + 1, end)
        if row[at] != IGNORED
    ]
    width = max(ends)
    side = torch.zeros(len(ends), width, dtype=torch.int64)
    for line, begin, end in zip(side, starts, ends, strict=False):
        line[:shared], line[shared:end] = torch.arange(shared), torch.arange(begin, begin + end - shared)
    back = torch.zeros(starts[-1], dtype=torch.int64)
    for number, (begin, end) in enumerate(zip(starts, ends, strict=False)):
        back[begin : begin + end - shared] = torch.arange(number * width + shared, number * width + end)
    back[:shared] = torch.arange(shared)
    device = batch.data.device
    mask = mask[None, None].to(device)
    setattr(mask, attention.ROWS, (side.to(device), back.to(device)))
    predicting, next_tokens = (torch.tensor(column, device=device) for column in zip(*learned, strict=True))
    return Packed(
        torch.tensor([tokens], device=device), torch.tensor([positions], device=device), mask,
        predicting, next_tokens[None], batch.answers, batch.tokens,
    )  # fmt: skip


def why_not(model: Any, longest: int) -> str:
    """Why a model in training cannot read its rows packed; empty where it can. It is tried on two short rows.

    `longest` is the most tokens of a row: what a token attends to may depend on how far away it is.
    """
    import torch

    from .. import seam

    nearest = min(chain.from_iterable(map(seam.windows, seam.configs_of(model))), default=longest)
    if nearest < longest:
        return f"tokens attend to {nearest} others at most"
    was, tried = model.training, _example(model.config.vocab_size, next(model.parameters()).device)
    model.eval()
    try:
        with torch.no_grad():
            apart = model(**tried.inputs(), use_cache=False).logits
            packed = pack(tried)
            together = model(**packed.inputs(), use_cache=False).logits[0]
    except Exception as error:  # anybody's architecture, in transformers' code
        return f"this model takes no mask of its own: {type(error).__name__}"
    finally:
        model.train(was)
    apart, labels = tried.learned(apart)
    apart = apart[labels != IGNORED]
    same = apart.shape == together.shape and (apart - together).abs().max() <= CLOSE * apart.std()
    return "" if same else "this model's rows are not what they are side by side"


def _example(words: int, device: Any) -> Batch:
    import torch

    def row(numbers: Sequence[int]) -> Iterator[int]:
        return (number % words for number in numbers)

    ids = [[*row((5, 11, 3, 7, 2, 9))], [*row((5, 11, 8, 4, 4, 1))]]
    labels = [[IGNORED] * 3 + ids[0][3:], [IGNORED] * 3 + ids[1][3:5] + [IGNORED]]
    return Batch(torch.tensor([ids, labels], device=device), 2, 5, 11)
