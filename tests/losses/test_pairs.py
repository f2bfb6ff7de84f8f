"""Batch-all triplets and pairs: against double loops in float64, and ranks against one process."""

import pytest
import torch
from gloo import on_ranks
from reference import apart, unit
from test_losses import Largest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslcells import ranks
from sslcells.losses import BatchAllTripletLoss, PairLoss, gather_ids, gather_with_grad, pairs

LABELS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, -1, -1]
SOURCES = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
D = 5
LOSSES = {
    "all": lambda: BatchAllTripletLoss(0.3),
    "all_cosine": lambda: BatchAllTripletLoss(0.1, "cosine"),
    "contrastive": lambda: PairLoss(1.2),
    "hinge": lambda: PairLoss(1.1, 0.2, squared=False),
    "sqeuclidean": lambda: PairLoss(1.5, 0.1, distance="sqeuclidean"),
}


@pytest.fixture(autouse=True, params=[2**21, 30])
def tile(monkeypatch, request):
    """All rows at once, or two at a time."""
    monkeypatch.setattr(pairs, "_TILE", request.param)


def rows(seed=0, n=12, dtype=torch.float64):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def by_loops(loss, z, label, source):
    """What the papers print, triplet by triplet and pair by pair."""
    z, n = unit(z), len(label)
    d = [[apart(z[i], z[j], loss.distance) for j in range(n)] for i in range(n)]
    same = lambda i, j: i != j and label[i] == label[j] >= 0  # noqa: E731
    other = lambda i, j: i != j and not same(i, j) and (source is None or source[i] != source[j])  # noqa: E731
    if isinstance(loss, BatchAllTripletLoss):
        triples = [(i, j, k) for i in range(n) for j in range(n) if same(i, j) for k in range(n) if other(i, k)]
        terms = [[d[i][j] - d[i][k] + loss.margin for i, j, k in triples]]
    else:
        terms = [
            [d[i][j] - loss.positive_margin for i in range(n) for j in range(n) if same(i, j)],
            [loss.margin - d[i][j] for i in range(n) for j in range(n) if other(i, j)],
        ]
    total = z.sum() * 0
    for term in terms:
        active = [x**2 / 2 if getattr(loss, "squared", False) else x for x in term if x > 0]
        total = total + (torch.stack(active).mean() if active else 0)
    return total


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("source", [None, SOURCES])
def test_it_is_the_double_loop(name, source):
    z, loss = rows(), LOSSES[name]()
    got = loss(z, torch.tensor(LABELS), None if source is None else torch.tensor(source))
    want = by_loops(loss, z, LABELS, source)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    for g, w in zip(torch.autograd.grad(got, z), torch.autograd.grad(want, z), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)
    assert all(0 <= v <= 1 for k, v in loss.stats.items() if k.startswith("active"))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["coincide", "singletons", "one class"])
def test_hard_cases_stay_finite(name, case):
    z = torch.ones(6, D) if case == "coincide" else rows(1, 6, torch.float32).detach()
    label = {"coincide": [0, 0, 0, 1, 1, 1], "singletons": range(6), "one class": [0] * 6}[case]
    z = z.requires_grad_()
    loss = LOSSES[name]()(z, torch.tensor(label))
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_known_values():
    """All rows in one point: every triplet's loss is the margin."""
    z = torch.ones(6, 3)
    assert BatchAllTripletLoss(0.37)(z, torch.arange(6) // 2).item() == pytest.approx(0.37)
    assert PairLoss(0.8)(z, torch.arange(6) // 2).item() == pytest.approx(0.32)
    assert PairLoss(0.8, squared=False)(z, torch.arange(6) // 2).item() == pytest.approx(0.8)


def on_a_rank(name, dtype=torch.float64):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, D)).to(dtype)
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    part = 12 // ranks.world()
    own = slice(ranks.rank() * part, (ranks.rank() + 1) * part)
    wrapped = DistributedDataParallel(network) if ranks.world() > 1 else network
    if name == "whole":  # two views, a loss that mixes all rows and looks at their order
        z = gather_with_grad(wrapped(torch.cat([x[own], 2 * x[own]])), views=2)
        weight = torch.linspace(0, 1, 24, dtype=dtype)[:, None] * gather_ids(torch.arange(12)[own], 2)[:, None]
        loss = (z * weight).sum().sin() + (z @ z.T).square().mean()
    else:
        loss = LOSSES[name]()(wrapped(x[own]), torch.tensor(LABELS)[own], torch.tensor(SOURCES)[own])
    loss.backward()
    return loss.item(), [p.grad for p in network.parameters()]


@pytest.mark.parametrize("name", [*LOSSES, "whole"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one(name, world):
    value, grads = on_a_rank(name)
    for got, by_rank in on_ranks(world, on_a_rank, name):
        assert got == pytest.approx(value, rel=1e-11)
        torch.testing.assert_close(by_rank, grads, rtol=1e-9, atol=1e-11)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="margin=-1"):
        BatchAllTripletLoss(-1)
    with pytest.raises(ValueError, match=r"positive_margin=2 is not in 0\.\.margin=1"):
        PairLoss(1, 2)


@pytest.mark.parametrize("name", ["all", "contrastive"])
def test_no_matrix_of_all_pairs_is_kept(name, monkeypatch):
    monkeypatch.setattr(pairs, "_TILE", 1024)
    n = 512
    z = torch.randn(n, D, requires_grad=True)
    with Largest() as largest:
        LOSSES[name]()(z, torch.arange(n) % 16).backward()
    assert largest.numel <= max(1024 + 2, 2 * n * D)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_are_no_pair_with_a_loss(distance, dtype):
    for width in (2, 33, 512):
        z = torch.randn(100, width, dtype=dtype, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
        loss = PairLoss(distance=distance)
        loss(z, torch.arange(100).repeat(2))
        assert loss.stats["active_positives"].item() == 0
