"""The rows of a batch as one sequence, in which the beginning that they share stands once.

Every row of a task begins with the same instruction, whose tokens attend to the same in each row, so they are read only once,
and nothing is padded. Losses and gradients are those of the rows side by side, up to rounding. This is for a CPU, where a
step takes as long as its arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, device

from ..fused import attention
from .batches import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLOSE = 0.05
"""Logits that differ by less than this share of their spread are the same up to the rounding of bf16."""


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
    answers: int
    tokens: int
    """How many tokens the rows have: what is shared counts in each, as in Batch."""

    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": self.mask,
                "logits_to_keep": self.predicting}  # fmt: skip

    def learned(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """(the model's output where a token is predicted, those tokens)"""
        return out, self.labels


def pack(batch: Batch) -> Packed:
    """Packs the rows of a batch, on its device. The mask also says which tokens make which row, for `fused.attention`."""
    device, (ids, labels) = batch.data.device, batch.data.cpu()
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
    mask = ((order[:, None] >= order) & ((row_of[:, None] == row_of) | (row_of < 0)))[None, None].to(device)
    side = torch.zeros(own.shape, dtype=torch.int64)  # where each token of each row stands in the sequence
    side[:, :shared], side[own] = place[:shared], order[shared:]
    back = torch.cat((place[:shared], row * len(place) + at))  # the inverse
    setattr(mask, attention.ROWS, (side.to(device), back.to(device)))
    rows, places = learned.nonzero(as_tuple=True)
    tokens, predicting = torch.cat((ids[0, :shared], ids[own])), side[rows, places - 1]
    return Packed(
        tokens[None].to(device), positions[None].to(device), mask, predicting.to(device), labels[learned][None].to(device),
        batch.answers, batch.tokens,
    )  # fmt: skip


def why_not(model: PreTrainedModel, longest: int) -> str:
    """Why a model in training cannot read its rows packed; empty where it can. It is tried on two short rows.

    `longest` is the most tokens of a row: what a token attends to may depend on how far away it is.
    """
    from .. import seam

    nearest = min(chain.from_iterable(map(seam.windows, seam.configs_of(model))), default=longest)
    if nearest < longest:
        return f"tokens attend to {nearest} others at most"
    was, tried = model.training, _example(model.config.vocab_size, model.device)
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


def _example(words: int, device: device) -> Batch:
    """Two rows of six tokens that begin alike, whose numbers are below `words`."""

    def row(numbers: Sequence[int]) -> Iterator[int]:
        return (number % words for number in numbers)

    ids = [[*row((5, 11, 3, 7, 2, 9))], [*row((5, 11, 8, 4, 4, 1))]]
    labels = [[IGNORED] * 3 + ids[0][3:], [IGNORED] * 3 + ids[1][3:5] + [IGNORED]]
    return Batch(torch.tensor([ids, labels], device=device), 2, 5, 11)
