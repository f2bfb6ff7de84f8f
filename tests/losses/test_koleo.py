"""KoLeo: the paper's sum with loops, N ranks = one process, and rows that are equal, alone or not finite."""

import math

import pytest
import torch
from gloo import on_ranks
from torch.nn.parallel import DistributedDataParallel

from sslcells import ranks
from sslcells.losses import KoLeoLoss


def rows(count=12):
    return 3 * torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def printed(z):
    """arXiv 2304.07193, section 4: −1/n Σ log of the smallest distance to another row, of unit rows."""
    z = z / z.norm(dim=1, keepdim=True)
    nearest = [min((a - b).norm() for j, b in enumerate(z) if j != i) for i, a in enumerate(z)]
    return -sum(d.log() for d in nearest) / len(z)


def test_the_papers_sum_and_its_gradient():
    z, same = rows().requires_grad_(), rows().requires_grad_()
    loss, expected = KoLeoLoss(epsilon=1e-9)(z), printed(same)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        *torch.autograd.grad(loss, z), *torch.autograd.grad(expected, same), rtol=1e-8, atol=1e-10
    )


def on_a_rank():
    torch.manual_seed(0)
    network = torch.nn.Linear(5, 4).double()
    part = 12 // ranks.world()
    start = ranks.rank() * part
    wrapped = DistributedDataParallel(network) if ranks.world() > 1 else network
    loss = KoLeoLoss()(wrapped(rows()[start : start + part]))
    loss.backward()
    return loss.item(), [p.grad for p in network.parameters()]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one(world):
    value, expected = on_a_rank()
    for loss, grads in on_ranks(world, on_a_rank):
        assert loss == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-12)


def test_equal_rows_and_a_single_one():
    z = torch.ones(3, 5, requires_grad=True)
    loss = KoLeoLoss(epsilon=1e-4)(z)
    assert loss.item() == pytest.approx(-math.log(1e-4))
    loss.backward()
    assert z.grad.isfinite().all()
    assert KoLeoLoss()(rows(1)).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_shows(bad):
    z = rows()
    z[4, 2] = bad
    assert KoLeoLoss()(z).isnan()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="epsilon=0 must be above 0"):
        KoLeoLoss(epsilon=0)
    with pytest.raises(ValueError, match=r"rows must be \(N, D\)"):
        KoLeoLoss()(torch.zeros(3))
