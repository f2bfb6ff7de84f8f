"""Sinkhorn–Knopp: the paper's scaling with loops, N ranks = one process, and what it does with odd scores."""

import math

import pytest
import torch
from gloo import on_ranks

from sslcells import ranks
from sslcells.losses import sinkhorn

K, TEMPERATURE = 5, 0.07
BOUNDS = [(0, 12), (0, 6, 12), (0, 5, 12), (0, 0, 12), (0, 3, 6, 9, 12)]


def scores(shift=0.0):
    generator = torch.Generator().manual_seed(2)
    return 2 * torch.rand(12, K, dtype=torch.float64, generator=generator) - 1 + shift


def printed(table, iterations):
    """arXiv 2006.09882, appendix A.1: the matrix (K, B) is scaled to row sums 1/K, then to column sums 1/B."""
    q = [[math.exp(table[b, k] / TEMPERATURE) for b in range(len(table))] for k in range(K)]
    for _ in range(iterations):
        q = [[x / (K * sum(row)) for x in row] for row in q]
        sums = [sum(q[k][b] for k in range(K)) for b in range(len(table))]
        q = [[x / (len(table) * sums[b]) for b, x in enumerate(row)] for row in q]
    return torch.tensor(q, dtype=torch.float64).T * len(table)


def assigned(bounds, table, iterations):
    return sinkhorn(table[bounds[ranks.rank()] : bounds[ranks.rank() + 1]], TEMPERATURE, iterations)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("iterations", [1, 3])
def test_ranks_equal_the_paper_on_one_process(bounds, iterations):
    """Also where the ranks bring different numbers of rows, or none."""
    whole = torch.cat(on_ranks(len(bounds) - 1, assigned, bounds, scores(), iterations))
    torch.testing.assert_close(whole, printed(scores(), iterations), rtol=1e-12, atol=1e-15)


def test_rows_sum_to_1_and_many_iterations_use_all_prototypes_equally():
    q = sinkhorn(scores(), TEMPERATURE, 300)
    torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(q.sum(0), torch.full((K,), 12 / K, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_scores_far_from_0_neither_overflow_nor_vanish(shift):
    torch.testing.assert_close(sinkhorn(scores(shift), TEMPERATURE), sinkhorn(scores(), TEMPERATURE), rtol=1e-6, atol=0)


def test_a_prototype_that_no_row_can_take_gets_none():
    table = scores()
    table[:, 2] -= 1000
    q = sinkhorn(table, TEMPERATURE)
    assert (q[:, 2] == 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=torch.float64))


def test_half_precision_comes_back_in_float32_without_gradient():
    q = sinkhorn(scores().bfloat16().requires_grad_(), TEMPERATURE)
    assert (q.dtype, q.requires_grad) == (torch.float32, False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_shows_on_every_rank(bad):
    table = scores()
    table[11, 0] = bad
    for q in on_ranks(2, assigned, (0, 6, 12), table, 3):
        assert q.isnan().all()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\(12,\)"):
        sinkhorn(torch.zeros(12))
    with pytest.raises(ValueError, match="temperature=0 must"):
        sinkhorn(torch.zeros(12, 2), 0)
    with pytest.raises(ValueError, match="iterations=0 at"):
        sinkhorn(torch.zeros(12, 2), iterations=0)
