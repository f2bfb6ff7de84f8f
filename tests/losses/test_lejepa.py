"""LeJEPA's loss: the paper's statistic with complex numbers, N ranks = one process, and what it tells apart."""

import cmath
import itertools
import math

import pytest
import torch
from gloo import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslcells import ranks
from sslcells.losses import LeJEPALoss
from sslcells.losses.lejepa import directions

VIEWS, GLOBAL, D, SLICES, KNOTS, SEED = 3, 2, 4, 6, 9, 11
BOUNDS = [(0, 12), (0, 6, 12), (0, 5, 12), (0, 6, 12, 18, 24)]


def epps_pulley(x):
    """N ∫ |φ̂(t) − φ(t)|² φ(t) dt of numbers x by the trapezoidal rule over all knots, arXiv 2511.08544, section 4."""
    knots = [-5 + 10 * i / (KNOTS - 1) for i in range(KNOTS)]
    values = []
    for t in knots:
        found = sum(cmath.exp(1j * t * v) for v in x) / len(x)
        phi = math.exp(-t * t / 2)
        values.append(abs(found - phi) ** 2 * phi)
    return len(x) * sum((a + b) / 2 * 10 / (KNOTS - 1) for a, b in itertools.pairwise(values))


def printed(z, weight):
    """The loss of rows (V, N, D), one view and one direction after the other."""
    rows = directions(D, SLICES, SEED).T
    sigreg = sum(epps_pulley((view @ a).tolist()) for view in z for a in rows) / (len(z) * SLICES)
    centre = z[:GLOBAL].mean(0)
    prediction = sum(((view - centre) ** 2).mean() for view in z) / len(z)
    return (1 - weight) * prediction.item() + weight * sigreg


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, D)).double()


def images(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(VIEWS, count, 4, dtype=torch.float64, generator=generator) + 1


def value_of(net, x):
    return LeJEPALoss(0.3, SLICES, KNOTS)(net(x.flatten(0, 1)).view(VIEWS, -1, D), SEED, GLOBAL)


def step(bounds):
    """On a rank: the loss of its images, and the parameter gradients."""
    net, rank = DistributedDataParallel(network()), ranks.rank()
    loss = value_of(net, images(bounds[-1])[:, bounds[rank] : bounds[rank + 1]])
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("bounds", BOUNDS)
def test_ranks_equal_the_paper_on_one_process(bounds):
    """Also where the ranks bring different numbers of images."""
    net, x = network(), images(bounds[-1])
    loss = value_of(net, x)
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    with torch.no_grad():
        assert loss.item() == pytest.approx(printed(net(x.flatten(0, 1)).view(VIEWS, -1, D), 0.3), rel=1e-12)
    answers = on_ranks(len(bounds) - 1, step, bounds)
    assert len({value for value, _ in answers}) == 1, "the value is the same on every rank"
    for value, grad in answers:
        assert value == pytest.approx(loss.item(), rel=1e-12)
        assert (grad - want).norm() / want.norm() < 1e-10


def test_the_gradient_is_that_of_finite_differences():
    z = torch.randn(VIEWS, 5, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: LeJEPALoss(0.6, SLICES, KNOTS)(rows, SEED, GLOBAL), (z,))


def sigreg(z):
    loss = LeJEPALoss()
    loss(z, SEED)
    return loss.stats["sigreg"].item()


def test_sigreg_is_small_for_normal_rows_alone():
    torch.manual_seed(0)
    normal = torch.randn(2, 512, 16)
    small = sigreg(normal)
    assert small < 2
    others = {
        "collapsed": torch.zeros(2, 512, 16),
        "wide": 2 * normal,
        "moved": normal + 1,
        "of one dimension": normal[..., :1].expand(-1, -1, 16),
        "of two clusters": normal * 0.3 + torch.randint(2, (2, 512, 1)) * 2 - 1,
    }
    for name, z in others.items():
        assert sigreg(z) > 10 * small, name


def test_directions_are_of_the_seed_and_of_length_1():
    assert torch.equal(directions(D, SLICES, 1), directions(D, SLICES, 1))
    assert not torch.equal(directions(D, SLICES, 1), directions(D, SLICES, 2))
    torch.testing.assert_close(directions(D, SLICES, 1).norm(dim=0), torch.ones(SLICES, dtype=torch.float64))


def test_half_precision_is_computed_in_float32():
    z = torch.randn(2, 64, D)
    with torch.autocast("cpu", torch.bfloat16):
        inside = LeJEPALoss()(z, SEED)
    assert inside.dtype == torch.float32
    assert inside.item() == LeJEPALoss()(z, SEED).item()


def one_image(_):
    try:
        LeJEPALoss()(torch.zeros(2, ranks.rank(), D), SEED)
    except ValueError as error:
        return str(error)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"\(V, B, D\).*\(4, 5\)"):
        LeJEPALoss()(torch.zeros(4, 5), SEED)
    with pytest.raises(ValueError, match="weight=2 is not"):
        LeJEPALoss(2)
    with pytest.raises(ValueError, match="knots=4 odd"):
        LeJEPALoss(knots=4)
    assert on_ranks(2, one_image, 0) == ["statistics of 1 image in the global batch: there must be two"] * 2
