"""Differential: our losses beside pytorch-metric-learning's, value and gradient, in float64 on many random sets.

Random sizes, widths, numbers of classes, margins and temperatures, with singletons, duplicates, opposite rows and rows
of any norm. What their formula has and ours has not is said where a test makes up for it.
"""

import random

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers

from sslcells.losses import BatchAllTripletLoss, BatchHardTripletLoss, NTXentLoss, PairLoss, SupConLoss

SEEDS = range(15)
TOLERANCE = 1e-9

COSINE, EUCLIDEAN = distances.CosineSimilarity(), distances.LpDistance()
SQUARED = distances.LpDistance(power=2)
THEIR_DISTANCE = {"euclidean": EUCLIDEAN, "sqeuclidean": SQUARED, "cosine": COSINE}


def drawn(seed, twice=True):
    """Rows (N, D) and labels: classes of uneven size, some of one row; some rows the same, or opposite."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count, width, classes = draw.randint(4, 40), draw.choice([2, 3, 8, 33]), draw.randint(2, 12)
    z = torch.randn(count, width, generator=generator, dtype=torch.float64) * 10 ** draw.uniform(-3, 3)
    label = (torch.rand(count, generator=generator).square() * classes).long()
    label[:2], label[2] = 0, 1
    label[-1] = 99  # a singleton
    if twice:
        z[count // 2] = z[0]
        z[count - 1] = -z[1]
    return z.requires_grad_(), label, draw


def same(ours, theirs, z):
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    scale = z.detach().norm(dim=1, keepdim=True)  # a gradient grows as the row gets shorter
    got, want = (scale * torch.autograd.grad(x, z)[0] for x in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_nt_xent(seed):
    """Their positives are all rows of a class, so that the images are the classes."""
    z, _, draw = drawn(seed)
    half, temperature = len(z) // 2, draw.choice([1.0, 0.2, 0.07])
    z = z[: 2 * half].detach().requires_grad_()
    ours = NTXentLoss(temperature)(*z.chunk(2))
    same(ours, losses.NTXentLoss(temperature=temperature)(z, torch.arange(half).repeat(2)), z)


@pytest.mark.parametrize("seed", SEEDS)
def test_supcon(seed):
    """Theirs leaves out of the mean anchors with a loss of 0, which have no positive or underflow to it."""
    z, label, draw = drawn(seed)
    temperature = draw.choice([1.0, 0.2, 0.07])
    same(SupConLoss(temperature)(z, label), losses.SupConLoss(temperature=temperature)(z, label), z)


@pytest.mark.parametrize("distance", THEIR_DISTANCE)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_batch_hard(seed, distance, soft):
    """The mean over all anchors; no two rows are the same, of which theirs may choose another, or has no gradient."""
    z, label, draw = drawn(seed, twice=False)
    margin = draw.choice([0.05, 0.2, 1.0])
    measure = THEIR_DISTANCE[distance]
    theirs = losses.TripletMarginLoss(
        0.0 if soft else margin, distance=measure, smooth_loss=soft, reducer=reducers.MeanReducer()
    )
    chosen = miners.BatchHardMiner(distance=measure)(z, label)
    same(BatchHardTripletLoss(margin, distance, soft)(z, label), theirs(z, label, chosen), z)


@pytest.mark.parametrize("distance", THEIR_DISTANCE)
@pytest.mark.parametrize("seed", SEEDS)
def test_batch_all(seed, distance):
    z, label, draw = drawn(seed, twice=distance != "euclidean")
    margin = draw.choice([0.05, 0.2, 1.0])
    theirs = losses.TripletMarginLoss(margin, distance=THEIR_DISTANCE[distance])
    same(BatchAllTripletLoss(margin, distance)(z, label), theirs(z, label), z)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("seed", SEEDS)
def test_hinges_of_pairs(seed, distance):
    z, label, draw = drawn(seed, twice=distance != "euclidean")
    margin, positive_margin = draw.choice([0.5, 1.0, 1.5]), draw.choice([0.0, 0.3])
    theirs = losses.ContrastiveLoss(positive_margin, margin, distance=THEIR_DISTANCE[distance])
    same(PairLoss(margin, positive_margin, squared=False, distance=distance)(z, label), theirs(z, label), z)


class HalfSquares(reducers.AvgNonZeroReducer):
    """Of hinges, which theirs has, equation 4's halves of their squares."""

    def element_reduction_helper(self, each, embeddings):
        return super().element_reduction_helper(each.square() / 2, embeddings)


@pytest.mark.parametrize("seed", SEEDS)
def test_squares_of_pairs(seed):
    z, label, draw = drawn(seed, twice=False)
    margin = draw.choice([0.5, 1.0, 1.5])
    theirs = losses.ContrastiveLoss(0, margin, reducer=HalfSquares(), distance=EUCLIDEAN)
    same(PairLoss(margin)(z, label), theirs(z, label), z)


@pytest.mark.parametrize("loss", [NTXentLoss(0.2), SupConLoss(0.2), BatchHardTripletLoss(), PairLoss()])
def test_a_difference_is_seen(loss):
    """The tests above can fail: another temperature or margin is another number."""
    z, label, _ = drawn(1)
    z = z[: len(z) // 2 * 2]
    ours = loss(*z.chunk(2)) if isinstance(loss, NTXentLoss) else loss(z, label[: len(z)])
    theirs = {
        NTXentLoss: lambda: losses.NTXentLoss(temperature=0.2001)(z, torch.arange(len(z) // 2).repeat(2)),
        SupConLoss: lambda: losses.SupConLoss(temperature=0.2001)(z, label[: len(z)]),
        BatchHardTripletLoss: lambda: losses.TripletMarginLoss(0.2001, reducer=reducers.MeanReducer())(
            z, label[: len(z)], miners.BatchHardMiner()(z, label[: len(z)])
        ),
        PairLoss: lambda: losses.ContrastiveLoss(0, 1.001, reducer=HalfSquares())(z, label[: len(z)]),
    }[type(loss)]()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
