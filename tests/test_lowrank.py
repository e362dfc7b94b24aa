"""The mathematics against numpy and by hand."""

import math

import numpy as np
import pytest
import torch
from tiny import basis, rand

from peftlab import SpecError
from peftlab.compare import lowrank

# spectra


def test_the_spectrum_of_a_diagonal_is_known():
    s = lowrank.spectrum(torch.diag(torch.tensor([3.0, -4.0, 0.0])))
    assert s.values == pytest.approx((4, 3)) and s.rank == 2 and s.norm == pytest.approx(5)
    assert [s.energy(r) for r in (0, 1, 2, 9)] == pytest.approx([0, 0.64, 1, 1])
    assert [s.rank_for(share) for share in (0, 0.5, 0.639, 0.641, 1)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(SpecError, match="between 0 and 1"):
        lowrank.Spectrum((1.0,)).rank_for(share)


def test_a_zero_matrix_has_no_direction_and_loses_nothing():
    s = lowrank.spectrum(torch.zeros(4, 3))
    assert s.values == () and s.rank_for(1) == 0 and s.energy(0) == 1 and s.norm == 0
    assert lowrank.best(torch.zeros(4, 3), 1)[1] == 0


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_rounding_is_no_direction(shape):
    product = rand(shape[0], 8) @ rand(8, shape[1], seed=1)
    s = lowrank.spectrum(product)
    assert s.rank == 8 == s.rank_for(1)
    assert s.values == pytest.approx(np.linalg.svd(product.numpy(), compute_uv=False)[:8], rel=1e-5)


def test_it_computes_in_fp32_and_in_fp64_where_given_it():
    tiny = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    assert lowrank.spectrum(tiny).values == pytest.approx((1, 1e-9)) and lowrank.spectrum(tiny.float()).rank == 1
    half = rand(6, 4).bfloat16()
    assert lowrank.spectrum(half).values == lowrank.spectrum(half.float()).values


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(SpecError, match="not finite"):
        lowrank.spectrum(torch.tensor([[1.0, math.nan]]))


# the best approximation


@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_the_best_approximation_misses_the_tails_energy_and_none_misses_less(rank):
    m = rand(12, 20)
    near, error = lowrank.best(m, rank)
    u, s, vh = np.linalg.svd(m.numpy(), full_matrices=False)
    assert near.numpy() == pytest.approx((u[:, :rank] * s[:rank]) @ vh[:rank], abs=1e-5)
    assert error == pytest.approx(math.sqrt((s[rank:] ** 2).sum() / (s**2).sum()), abs=1e-6)
    assert error == pytest.approx(float((m - near).norm() / m.norm()), abs=1e-6)
    assert error**2 == pytest.approx(1 - lowrank.spectrum(m).energy(rank), abs=1e-6)
    for seed in range(5):  # the best with other right singular vectors is W V Vᵀ
        v = torch.linalg.qr(torch.from_numpy(vh[:rank]).T + 0.1 * rand(20, rank, seed=seed))[0]
        assert float((m - m @ v @ v.T).norm() / m.norm()) >= error - 1e-6


@pytest.mark.parametrize("rank", [-1, 13])
def test_a_rank_that_the_matrix_cannot_have_is_refused(rank):
    with pytest.raises(SpecError, match="12 × 20 has ranks from 0 to 12"):
        lowrank.best(rand(12, 20), rank)


# subspaces


def test_similarity_is_the_papers_formula():
    a, b = basis(30, 6), basis(30, 4, seed=1)
    grid = lowrank.similarity(a, b).numpy()
    for i in range(1, 7):
        for j in range(1, 5):
            expected = np.linalg.norm(a[:, :i].numpy().T @ b[:, :j].numpy()) ** 2 / min(i, j)
            assert grid[i - 1, j - 1] == pytest.approx(expected, abs=1e-6)


def test_similarity_of_subspaces_that_are_known():
    axes = torch.eye(9)
    assert lowrank.similarity(axes[:, :4], axes[:, :4]).numpy() == pytest.approx(np.ones((4, 4)))
    assert lowrank.similarity(axes[:, :4], axes[:, 4:7]).numpy() == pytest.approx(np.zeros((4, 3)))
    crossed = lowrank.similarity(axes[:, [0, 1]], axes[:, [1, 5, 0]])  # e1 e2 against e2 e6 e1
    assert crossed.numpy() == pytest.approx(np.array([[0, 0, 1], [1, 0.5, 1]]))


def test_similarity_is_of_one_space():
    with pytest.raises(SpecError, match="of 9 and 8 dimensions"):
        lowrank.similarity(basis(9, 2), basis(8, 2))


def test_the_random_baseline_is_what_random_subspaces_show():
    n, p, q = 32, 8, 12
    same_space = lowrank.Overlap((), n)
    mean = sum(lowrank.similarity(basis(n, p, seed=2 * s), basis(n, q, seed=2 * s + 1)) for s in range(200)) / 200
    for i, j in ((8, 12), (8, 8), (4, 12), (6, 9)):
        assert float(mean[i - 1, j - 1]) == pytest.approx(same_space.random(i, j), rel=0.05)
    assert same_space.random(n, 3) == 1  # the whole space has every subspace in it
    with pytest.raises(SpecError, match="from 1 to 32"):
        same_space.random(33, 1)


# amplification


def test_amplification_of_a_matrix_made_by_hand():
    w, delta = torch.diag(torch.tensor([5.0, 4, 2, 1])), torch.zeros(4, 4)
    delta[2, 2] = -6
    a = lowrank.amplification(w, delta, 1)
    assert (a.directions, a.update, a.on_update, a.on_weight) == pytest.approx((1, 6, 2, 5))
    assert a.factor == pytest.approx(3)
    assert a.on_random == pytest.approx(math.sqrt(46) / 4) and a.factor_of_random == pytest.approx(24 / math.sqrt(46))
    delta[3, 3] = 3
    a = lowrank.amplification(w, delta, 2)
    assert a.on_update == pytest.approx(math.sqrt(5)) and a.on_weight == pytest.approx(math.sqrt(41))
    assert a.factor == pytest.approx(math.sqrt(45 / 5))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_amplification_is_the_papers_formula(shape):
    w, delta = rand(*shape), rand(*shape, seed=1)
    a = lowrank.amplification(w, delta, 3)
    for matrix, seen in ((delta, a.on_update), (w, a.on_weight)):
        u, _, vh = np.linalg.svd(matrix.numpy())
        assert seen == pytest.approx(np.linalg.norm(u[:, :3].T @ w.numpy() @ vh[:3].T), rel=1e-4)
    assert a.factor == pytest.approx(np.linalg.norm(delta) / a.on_update)


def test_where_the_base_does_nothing_there_is_no_factor():
    w, delta = torch.diag(torch.tensor([5.0, 0, 0])), torch.diag(torch.tensor([0.0, 2, 0]))
    assert lowrank.amplification(w, delta, 1).factor is None
    with pytest.raises(SpecError, match="directions=2: the update has 1"):
        lowrank.amplification(w, delta, 2)


def test_amplification_at_random_is_what_random_directions_show():
    w, r = rand(24, 40) * torch.linspace(0.1, 3, 40), 5
    seen = [float((basis(24, r, seed=2 * s).T @ w @ basis(40, r, seed=2 * s + 1)).square().sum()) for s in range(300)]
    assert lowrank.amplification(w, rand(24, 40, seed=9), r).on_random == pytest.approx(np.mean(seen) ** 0.5, rel=0.05)


# intruders


def test_a_matrix_that_is_only_scaled_has_no_intruder():
    w = rand(30, 20)
    found = lowrank.intruders(w, -1.7 * w)
    assert found.directions == () and found.cosines == pytest.approx([1] * 10, abs=1e-4)


def test_a_large_new_direction_is_an_intruder():
    w = rand(24, 24)
    u = lowrank.factors(w).u.sum(1) / 24**0.5  # as far from every left singular vector as can be: cosine 1/√24
    found = lowrank.intruders(w, w + 500 * torch.outer(u, basis(24, 1)[:, 0]), k=3)
    assert found.cosines[0] == pytest.approx(24**-0.5, abs=0.02) and len(found.cosines) == 3
    assert 0 in found.directions


def test_a_direction_that_the_base_cannot_write_has_cosine_zero_and_the_others_stay():
    w = torch.zeros(8, 3)
    w[:3] = torch.diag(torch.tensor([9.0, 6, 3]))
    delta = torch.zeros(8, 3)
    delta[7, 2] = 7  # third input: with the 3 there, a vector of length √58 at cosine 3/√58 to e3
    found = lowrank.intruders(w, w + delta, threshold=0.5)
    assert found.cosines == pytest.approx([1, 3 / math.sqrt(58), 1]) and found.directions == (1,)
    assert lowrank.intruders(w, w + delta, threshold=0.3).directions == ()


# directions that are kept


def test_kept_directions_are_the_singular_vectors():
    m = rand(50, 4) * torch.tensor([9.0, 5, 3, 1]) @ basis(70, 4).T
    m[3] *= 30  # a spike, as language models have: int8 leaves the rest of the vector few steps
    kept, f = lowrank.directions(m, 16), lowrank.factors(m)
    assert kept.count == 4
    for side, vectors in (("left", f.u), ("right", f.v)):
        again = kept.vectors(side)
        assert again.shape == (len(vectors), 4) and again.norm(dim=0).numpy() == pytest.approx(np.ones(4))
        assert (again * vectors[:, :4]).sum(0).numpy() == pytest.approx(np.ones(4), abs=5e-3)
    assert lowrank.directions(m, 2).right == lowrank.directions(f, 2).right and lowrank.directions(m, 2).count == 2


def test_no_direction_is_not_kept():
    with pytest.raises(SpecError, match="k=0: there is no direction to keep"):
        lowrank.directions(rand(4, 4), 0)


def test_overlap_of_kept_directions_with_its_baseline():
    shared, b = basis(60, 2), basis(48, 5)
    one = b[:, :2] @ shared.T
    other = (
        torch.outer(b[:, 2], shared[:, 0]) * 3
        + torch.outer(b[:, 3], shared[:, 1])
        + torch.outer(b[:, 4], -shared[:, 0])
    )
    one, other = lowrank.directions(one), lowrank.directions(other)
    read, written = lowrank.overlap(one, other), lowrank.overlap(one, other, "left")
    assert read.n == 60 and written.n == 48
    assert read.grid[1][1] == pytest.approx(1, abs=1e-3) and written.grid[1][1] == pytest.approx(0, abs=1e-3)
    assert read.random(1, 2) == 2 / 60 and written.random(2, 2) == 2 / 48
