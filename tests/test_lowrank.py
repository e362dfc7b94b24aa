"""The mathematics against numpy and by hand."""

import math

import numpy as np
import pytest
import torch
from tiny import basis, rand

from peftlab import SpecError
from peftlab.compare import lowrank


def test_the_spectrum_of_a_diagonal_and_of_zero_is_known():
    s = lowrank.spectrum(torch.diag(torch.tensor([3.0, -4.0, 0.0])))
    assert s.values == pytest.approx((4, 3)) and s.rank == 2 and s.norm == pytest.approx(5)
    assert [s.energy(r) for r in (0, 1, 2, 9)] == pytest.approx([0, 0.64, 1, 1])
    assert [s.rank_for(share) for share in (0, 0.5, 0.639, 0.641, 1)] == [0, 1, 1, 2, 2]
    zero = lowrank.spectrum(torch.zeros(4, 3))
    assert zero.values == () and zero.rank_for(1) == 0 and zero.energy(0) == 1 and zero.norm == 0
    assert lowrank.best(torch.zeros(4, 3), 1)[1] == 0


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_rounding_is_no_direction(shape):
    product = rand(shape[0], 8) @ rand(8, shape[1], seed=1)
    s = lowrank.spectrum(product)
    assert s.rank == 8 == s.rank_for(1)
    assert s.values == pytest.approx(np.linalg.svd(product.numpy(), compute_uv=False)[:8], rel=1e-5)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda: lowrank.Spectrum((1.0,)).rank_for(-0.1), "share=-0.1.* between 0 and 1"),
        (lambda: lowrank.Spectrum((1.0,)).rank_for(1.1), "between 0 and 1"),
        (lambda: lowrank.Spectrum((1.0,)).rank_for(math.nan), "between 0 and 1"),
        (lambda: lowrank.spectrum(torch.tensor([[1.0, math.nan]])), "not finite"),
        (lambda: lowrank.best(rand(12, 20), -1), "12 × 20 has ranks from 0 to 12"),
        (lambda: lowrank.best(rand(12, 20), 13), "12 × 20 has ranks from 0 to 12"),
        (lambda: lowrank.similarity(basis(9, 2), basis(8, 2)), "of 9 and 8 dimensions"),
        (lambda: lowrank.Overlap((), 32).random(33, 1), "from 1 to 32"),
        (lambda: lowrank.amplification(rand(3, 3), torch.eye(3)[:, :1] @ torch.eye(3)[:1], 2), "the update has 1"),
        (lambda: lowrank.directions(rand(4, 4), 0), "k=0: there is no direction to keep"),
    ],
)
def test_what_a_matrix_does_not_have_is_refused(wrong, words):
    with pytest.raises(SpecError, match=words):
        wrong()


@pytest.mark.parametrize("rank", [0, 5, 12])
def test_the_best_approximation_misses_the_tails_energy_and_none_misses_less(rank):
    m = rand(12, 20)
    near, error = lowrank.best(m, rank)
    u, s, vh = np.linalg.svd(m.numpy(), full_matrices=False)
    assert near.numpy() == pytest.approx((u[:, :rank] * s[:rank]) @ vh[:rank], abs=1e-5)
    assert error == pytest.approx(float((m - near).norm() / m.norm()), abs=1e-6)
    assert error**2 == pytest.approx(1 - lowrank.spectrum(m).energy(rank), abs=1e-6)
    for seed in range(5):  # the best with other right singular vectors is W V Vᵀ
        v = torch.linalg.qr(torch.from_numpy(vh[:rank]).T + 0.1 * rand(20, rank, seed=seed))[0]
        assert float((m - m @ v @ v.T).norm() / m.norm()) >= error - 1e-6


def test_similarity_is_the_papers_formula():
    a, b = basis(30, 6), basis(30, 4, seed=1)
    grid = lowrank.similarity(a, b).numpy()
    for i in range(1, 7):
        for j in range(1, 5):
            expected = np.linalg.norm(a[:, :i].numpy().T @ b[:, :j].numpy()) ** 2 / min(i, j)
            assert grid[i - 1, j - 1] == pytest.approx(expected, abs=1e-6)


def test_the_random_baselines_are_what_random_directions_show():
    n, p, q = 32, 8, 12
    mean = sum(lowrank.similarity(basis(n, p, seed=2 * s), basis(n, q, seed=2 * s + 1)) for s in range(200)) / 200
    for i, j in ((8, 12), (8, 8), (4, 12), (6, 9)):
        assert float(mean[i - 1, j - 1]) == pytest.approx(lowrank.Overlap((), n).random(i, j), rel=0.05)
    w, r = rand(24, 40) * torch.linspace(0.1, 3, 40), 5
    seen = [float((basis(24, r, seed=2 * s).T @ w @ basis(40, r, seed=2 * s + 1)).square().sum()) for s in range(300)]
    assert lowrank.amplification(w, rand(24, 40, seed=9), r).on_random == pytest.approx(np.mean(seen) ** 0.5, rel=0.05)


def test_amplification_of_a_matrix_made_by_hand():
    w, delta = torch.diag(torch.tensor([5.0, 4, 2, 0])), torch.diag(torch.tensor([0.0, 0, -6, 0]))
    a = lowrank.amplification(w, delta, 1)
    assert (a.directions, a.update, a.on_update, a.on_weight) == pytest.approx((1, 6, 2, 5))
    assert a.factor == pytest.approx(3) and a.factor_of_random == pytest.approx(6 / (math.sqrt(45) / 4))
    assert lowrank.amplification(w, torch.diag(torch.tensor([0.0, 0, 0, 1])), 1).factor is None


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_amplification_is_the_papers_formula(shape):
    w, delta = rand(*shape), rand(*shape, seed=1)
    a = lowrank.amplification(w, delta, 3)
    for matrix, seen in ((delta, a.on_update), (w, a.on_weight)):
        u, _, vh = np.linalg.svd(matrix.numpy())
        assert seen == pytest.approx(np.linalg.norm(u[:, :3].T @ w.numpy() @ vh[:3].T), rel=1e-4)
    assert a.factor == pytest.approx(np.linalg.norm(delta) / a.on_update)


def test_a_direction_that_the_base_cannot_write_is_an_intruder_and_a_scaled_one_is_none():
    w, delta = torch.zeros(8, 3), torch.zeros(8, 3)
    w[:3] = torch.diag(torch.tensor([9.0, 6, 3]))
    delta[7, 2] = 7  # third input: with the 3 there, a vector of length √58 at cosine 3/√58 to e3
    found = lowrank.intruders(w, w + delta, threshold=0.5)
    assert found.cosines == pytest.approx([1, 3 / math.sqrt(58), 1]) and found.directions == (1,)
    assert lowrank.intruders(w, w + delta, k=2, threshold=0.3).directions == ()
    same = lowrank.intruders(rand(30, 20), -1.7 * rand(30, 20))
    assert same.directions == () and same.cosines == pytest.approx([1] * 10, abs=1e-4)


def test_kept_directions_are_the_singular_vectors():
    m = rand(50, 4) * torch.tensor([9.0, 5, 3, 1]) @ basis(70, 4).T
    m[3] *= 30  # a spike, as language models have: int8 leaves the rest of the vector few steps
    kept, f = lowrank.directions(m, 16), lowrank.factors(m)
    for side, vectors in (("left", f.u), ("right", f.v)):
        again = kept.vectors(side)
        assert again.shape == (len(vectors), 4) and again.norm(dim=0).numpy() == pytest.approx(np.ones(4))
        assert (again * vectors[:, :4]).sum(0).numpy() == pytest.approx(np.ones(4), abs=5e-3)
    assert lowrank.directions(m, 2).right == lowrank.directions(f, 2).right and lowrank.directions(m, 2).count == 2


def test_overlap_of_kept_directions_with_its_baseline():
    shared, b = basis(60, 2), basis(48, 4)
    one, other = (
        lowrank.directions(b[:, :2] @ shared.T),
        lowrank.directions(b[:, 2:] * torch.tensor([3.0, 1]) @ shared.T),
    )
    read, written = lowrank.overlap(one, other), lowrank.overlap(one, other, "left")
    assert read.n == 60 and written.n == 48
    assert read.grid[1][1] == pytest.approx(1, abs=1e-3) and written.grid[1][1] == pytest.approx(0, abs=1e-3)
    assert read.random(1, 2) == 2 / 60 and written.random(2, 2) == 2 / 48
