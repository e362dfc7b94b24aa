"""What is done about a run that diverges: the last sound state of its parameters is kept, and put back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

HOPELESS = 1.5
"""A loss this many times that of guessing tokens at random no longer learns."""
PATIENCE = 3
"""A run ends after so many hopeless steps in a row."""
SNAPSHOTS = 10
"""How many times in a run its parameters are copied."""
SMALL = 64e6
"""Parameters of fewer bytes than this are copied on their own device, which is faster; others go to main memory."""


class Snapshots:
    """Copies of the trained parameters. One counts as sound once the next step's loss, which comes from it, is sound."""

    def __init__(self, trained: Sequence[Tensor], steps: int, vocabulary: int) -> None:
        self.trained, self.guessing = trained, math.log(vocabulary)
        self.device = trained[0].device if sum(p.nbytes for p in trained) < SMALL else "cpu"
        self.every = max(1, steps // SNAPSHOTS)
        self.unproven: deque[tuple[int, list[Tensor]]] = deque()
        self.sound: tuple[int, list[Tensor]] = (0, [])
        self.hopeless = 0

    def take(self, step: int) -> None:
        """Copies the parameters as they are after `step`."""
        copies = [torch.empty_like(p, device=self.device) for p in self.trained]
        torch._foreach_copy_(copies, [p.detach() for p in self.trained])
        self.unproven.append((step, copies))

    def judge(self, done: int, loss: float, norm: float, first: float) -> str:
        """What is wrong with the loss or the gradient that comes after `done` steps, in words; empty where both are sound.

        A loss (nats a token) is hopeless while it is far above both that of guessing and the run's `first` one.
        """
        self.hopeless = self.hopeless + 1 if loss > HOPELESS * max(self.guessing, first) else 0
        if not (math.isfinite(loss) and math.isfinite(norm)) or self.hopeless >= PATIENCE:
            by_loss = not math.isfinite(loss) or self.hopeless
            return f"loss is {loss:.3g}" if by_loss else f"gradient's norm is {norm:.3g}"
        while self.unproven and self.unproven[0][0] <= done:
            snapshot = self.unproven.popleft()
            if not self.hopeless:
                self.sound = snapshot
        return ""

    def restore(self) -> int:
        """Puts the last sound parameters back, and returns the step they come from; 0 where nothing had been learned."""
        step, tensors = self.sound
        with torch.no_grad():
            for parameter, tensor in zip(self.trained, tensors, strict=bool(step)):
                parameter.copy_(tensor)
        return step
