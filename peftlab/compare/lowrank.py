"""The mathematics of low-rank updates: W is a linear map's weight, d_out × d_in; ΔW is what an adapter adds to it.

The functions take 2-D tensors of any type and compute in fp32; or `Factors`, so that nothing is decomposed twice. They raise
SpecError for a rank or a size that the matrix does not have, and for numbers that are not finite.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from ..errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A matrix d_out × d_in as U diag(s) Vᵀ, its singular value decomposition."""

    u: Tensor
    """Left singular vectors, d_out × min(d_out, d_in), orthonormal columns."""
    s: Tensor
    """Singular values, descending."""
    v: Tensor
    """Right singular vectors, d_in × min(d_out, d_in), orthonormal columns."""

    @property
    def rank(self) -> int:
        """Singular values above 100 roundings of the largest, 1.2e-5 of it in fp32."""
        import torch

        return int((self.s > 100 * torch.finfo(self.s.dtype).eps * self.s[0]).sum())


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix. Its energy is the square of its Frobenius norm: the sum of their squares."""

    values: tuple[float, ...]
    """Descending, > 0: those that are rounding are left out, so that their number is the matrix's rank."""

    @property
    def rank(self) -> int:
        return len(self.values)

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.hypot(*self.values)

    def energy(self, rank: int) -> float:
        """Share, 0–1, of the energy in the first `rank` directions; 1 for the zero matrix, which loses nothing."""
        total = math.fsum(s * s for s in self.values)
        return math.fsum(s * s for s in self.values[: max(0, rank)]) / total if total else 1.0

    def rank_for(self, share: float) -> int:
        """Fewest directions that keep `share`, 0–1, of the energy."""
        if not 0 <= share <= 1:
            raise SpecError(f"share={share}: a share of the energy is between 0 and 1; try 0.9")
        sums = list(accumulate((s * s for s in self.values), initial=0.0))
        return next(r for r, kept in enumerate(sums) if kept >= share * sums[-1])


@dataclass(frozen=True)
class Amplification:
    """How much louder ΔW is than W in the directions that ΔW changes. Hu et al. 2021, section 7.3, table 7."""

    directions: int
    """r: how many singular directions U, V were taken, ≥ 1."""
    update: float
    """‖ΔW‖_F."""
    on_update: float
    """‖UᵀWV‖_F with U, V the top directions of ΔW: what W does there."""
    on_weight: float
    """‖UᵀWV‖_F with U, V the top directions of W itself, where it is largest."""
    on_random: float
    """Root mean square of ‖UᵀWV‖_F over random U, V."""

    @property
    def factor(self) -> float | None:
        """The paper's amplification factor, ‖ΔW‖_F / ‖UᵀWV‖_F; None where W does nothing there."""
        return self.update / self.on_update if self.on_update else None

    @property
    def factor_of_random(self) -> float | None:
        return self.update / self.on_random if self.on_random else None


@dataclass(frozen=True)
class Intruders:
    """Which of a tuned matrix's top directions the base has nothing like. Shuttleworth et al. 2024."""

    cosines: tuple[float, ...]
    """For each top left singular vector of W + ΔW, its largest |cosine| with any left singular vector of W, 0–1."""
    threshold: float
    """A direction whose cosine is below this is an intruder."""

    @property
    def directions(self) -> tuple[int, ...]:
        """The intruders' numbers, from 0 for the largest singular value."""
        return tuple(i for i, cosine in enumerate(self.cosines) if cosine < self.threshold)


@dataclass(frozen=True)
class Directions:
    """The top singular vectors of ΔW, each as int8 in units of its largest number, made a unit vector when it is read."""

    count: int
    left: str
    right: str
    """base64 of count × d_out and of count × d_in int8."""

    def vectors(self, side: str) -> Tensor:
        """n × count, unit columns: the `left` singular vectors (n = d_out), or the `right` ones (n = d_in)."""
        import torch

        data = bytearray(base64.b64decode(self.left if side == "left" else self.right))
        rows = torch.frombuffer(data, dtype=torch.int8).reshape(self.count, -1).float()
        return torch.nn.functional.normalize(rows, dim=1).T


@dataclass(frozen=True)
class Overlap:
    """How much of one update's subspace is in another's, at each pair of ranks."""

    grid: tuple[tuple[float, ...], ...]
    """φ(i, j) at row i − 1 and column j − 1, 0–1."""
    n: int
    """Dimensions of the space that both are in."""

    def random(self, i: int, j: int) -> float:
        """The expectation of φ(i, j) for two independent uniformly random subspaces of ℝⁿ: max(i, j) / n.

        ‖A_iᵀ B_j‖²_F = tr(A_i A_iᵀ B_j B_jᵀ), and the mean of B_j B_jᵀ over all rotations is j/n times the identity: i·j/n.
        """
        if not (1 <= i <= self.n and 1 <= j <= self.n):
            raise SpecError(f"i={i}, j={j}: subspaces of {self.n} dimensions have from 1 to {self.n}")
        return max(i, j) / self.n


def factors(matrix: Tensor | Factors) -> Factors:
    """The singular value decomposition of a matrix. Factors are returned as they are."""
    import torch

    if isinstance(matrix, Factors):
        return matrix
    m = matrix.detach().float()
    if not m.isfinite().all():
        raise SpecError("the matrix has numbers that are not finite: train again at a lower learning rate")
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return Factors(u, s, vh.T)


def spectrum(matrix: Tensor | Factors) -> Spectrum:
    """The singular values above rounding, largest first. Raises SpecError for numbers that are not finite."""
    f = factors(matrix)
    return Spectrum(tuple(f.s[: f.rank].tolist()))


def best(matrix: Tensor | Factors, rank: int) -> tuple[Tensor, float]:
    """The nearest matrix of `rank`, d_out × d_in, and its distance over ‖matrix‖_F. Eckart & Young 1936."""
    f = factors(matrix)
    if not 0 <= rank <= len(f.s):
        raise SpecError(f"rank={rank}: {len(f.u)} × {len(f.v)} has ranks from 0 to {len(f.s)}; try {len(f.s)}")
    near = (f.u[:, :rank] * f.s[:rank]) @ f.v[:, :rank].T
    return near, float(f.s[rank:].norm()) / (float(f.s.norm()) or 1.0)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """φ(i, j) = ‖A_iᵀ B_j‖²_F / min(i, j), where A_i is the first i columns of `a` and B_j the first j of `b`.

    `a` is n × p and `b` n × q, each with orthonormal columns; the result is p × q with φ(i, j) at [i − 1, j − 1]. φ is 1
    where the smaller subspace lies in the larger, 0 where they are orthogonal. Hu et al. 2021, section 7.2, appendix G.
    """
    if len(a) != len(b):
        raise SpecError(f"subspaces of {len(a)} and {len(b)} dimensions: compare the same matrix, the same side")
    sums = (a.T @ b).square().cumsum(0).cumsum(1)
    i, j = (sums.new_ones(size).cumsum(0) for size in sums.shape)
    return sums / i[:, None].minimum(j)


def amplification(weight: Tensor | Factors, delta: Tensor | Factors, directions: int) -> Amplification:
    """Compares ‖ΔW‖_F with what W does in the top `directions` of ΔW, in its own, and in random ones.

    At random ‖UᵀWV‖²_F is r²‖W‖²_F/(d_out·d_in) on average, by the argument of `Overlap.random` on each side. With
    the paper's ‖W‖_F = 61.95 and 12,288 that is 0.02 at r = 4 and 0.33 at r = 64, as table 7 has from samples.
    """
    w, d = factors(weight), factors(delta)
    if not 1 <= directions <= d.rank:
        raise SpecError(f"directions={directions}: the update has {d.rank}; take from 1 to that many")
    u, v = d.u[:, :directions], d.v[:, :directions]
    return Amplification(
        directions=directions,
        update=float(d.s.norm()),
        on_update=float(((u.T @ w.u * w.s) @ (w.v.T @ v)).norm()),
        on_weight=float(w.s[:directions].norm()),
        on_random=directions * float(w.s.norm()) / math.sqrt(len(w.u) * len(w.v)),
    )


def intruders(weight: Tensor | Factors, tuned: Tensor | Factors, k: int = 10, threshold: float = 0.5) -> Intruders:
    """Compares the top `k` left singular vectors of `tuned`, W + ΔW, with all of W's. The paper varies k and threshold."""
    w, t = factors(weight), factors(tuned)
    cosines = (w.u.T @ t.u[:, :k]).abs().amax(0).clamp(max=1)
    return Intruders(tuple(cosines.tolist()), threshold)


def directions(delta: Tensor | Factors, k: int = 16) -> Directions:
    """The top `k` ≥ 1 singular vectors of an update on both sides; all of them where it has fewer."""
    import torch

    if k < 1:
        raise SpecError(f"k={k}: there is no direction to keep; try 16")
    d = factors(delta)
    count = min(k, d.rank)

    def encoded(vectors: Tensor) -> str:
        rows = vectors[:, :count].T
        codes = (rows / rows.abs().amax(1, keepdim=True) * 127).round().to(torch.int8)
        return base64.b64encode(codes.cpu().contiguous().numpy().tobytes()).decode()

    return Directions(count, encoded(d.u), encoded(d.v))


def overlap(a: Directions, b: Directions, side: str = "right") -> Overlap:
    """φ between two updates of one matrix; the paper has it of right singular vectors, what an update reads."""
    of_a, of_b = a.vectors(side), b.vectors(side)
    return Overlap(tuple(tuple(row) for row in similarity(of_a, of_b).tolist()), len(of_a))
