"""VICReg and Barlow Twins: N ranks = one process in float64, and both as their papers print them."""

import pytest
import torch
from gloo import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslcells import ranks
from sslcells.losses import BarlowTwinsLoss, VICRegLoss

IMAGES, D = 6, 5
LOSSES = {"vicreg": VICRegLoss(25, 20, 2), "barlow": BarlowTwinsLoss(0.3)}


def vicreg(z0, z1):
    """arXiv 2105.04906: eq. 1 to 4 and 6, with loops; eq. 5 divided by D as in algorithm 1."""
    n, d = z0.shape
    total = 25 * sum(((z0[i] - z1[i]) ** 2).sum() for i in range(n)) / (n * d)
    for z in (z0, z1):
        mean = sum(z[i] for i in range(n)) / n
        c = sum(torch.outer(z[i] - mean, z[i] - mean) for i in range(n)) / (n - 1)
        total = total + 20 * sum((1 - (c[j, j] + 1e-4).sqrt()).clamp_min(0) for j in range(d)) / d
        total = total + 2 * sum(c[i, j] ** 2 for i in range(d) for j in range(d) if i != j) / d
    return total


def barlow(z0, z1):
    """arXiv 2103.03230: eq. 1 and 2, with loops, on rows normalised along the batch as in its algorithm 1."""
    n, d = z0.shape
    z0, z1 = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z0, z1))
    c = [[sum(z0[b, i] * z1[b, j] for b in range(n)) / n for j in range(d)] for i in range(d)]
    on = sum((1 - c[i][i]) ** 2 for i in range(d))
    return on + 0.3 * sum(c[i][j] ** 2 for i in range(d) for j in range(d) if i != j)


PRINTED = {"vicreg": vicreg, "barlow": barlow}


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, D)).double()


def images(count):
    return torch.randn(2, count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) + 1


def step(name, bounds):
    """On a rank: the loss of its images, and the parameter gradients."""
    net, rank = DistributedDataParallel(network()), ranks.rank()
    x = images(bounds[-1])[:, bounds[rank] : bounds[rank + 1]]
    loss = LOSSES[name](*net(x.flatten(0, 1)).chunk(2))
    loss.backward()
    return loss.item(), [p.grad for p in net.parameters()]


@pytest.mark.parametrize("bounds", [(0, 12), (0, 6, 12), (0, 5, 12), (0, 6, 12, 18, 24)])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_equal_the_paper_on_one_process(name, bounds):
    """Also where the ranks bring different numbers of images."""
    net = network()
    loss = PRINTED[name](*net(images(bounds[-1]).flatten(0, 1)).chunk(2))
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    answers = on_ranks(len(bounds) - 1, step, name, bounds)
    assert len({value for value, _ in answers}) == 1, "the value is the same on every rank"
    for value, grads in answers:
        assert value == pytest.approx(loss.item(), rel=1e-12)
        assert (torch.cat([g.flatten() for g in grads]) - want).norm() / want.norm() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_far_from_the_origin_and_in_half_precision(name):
    z0, z1 = torch.randn(2, 64, D) + 300
    exact = LOSSES[name](z0.double(), z1.double())
    assert LOSSES[name](z0, z1).item() == pytest.approx(exact.item(), rel=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = LOSSES[name](z0 - 300, z1 - 300)
    assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(LOSSES[name](z0 - 300, z1 - 300).item(), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_collapsed_rows_are_told_by_the_stats_and_give_no_nan(name):
    z = torch.ones(8, D, requires_grad=True)
    loss = LOSSES[name](z, z)
    loss.backward()
    assert z.grad.isfinite().all()
    assert LOSSES[name].stats["std"] < 0.02


def one_image(name):
    """The message for a world with one image, which is rank 1's."""
    rows = torch.zeros(torch.distributed.get_rank(), D)
    try:
        LOSSES[name](rows, rows)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", LOSSES)
def test_one_image_in_the_world_is_too_few_on_every_rank(name):
    assert on_ranks(2, one_image, name) == ["statistics of 1 image in the global batch: there must be two"] * 2


@pytest.mark.parametrize("name", LOSSES)
def test_mistakes_are_named(name):
    with pytest.raises(ValueError, match=r"\(4, 5\) and \(3, 5\)"):
        LOSSES[name](torch.zeros(4, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="1 image"):
        LOSSES[name](torch.zeros(1, 5), torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"=-1 is negative"):
        type(LOSSES[name])(-1)
