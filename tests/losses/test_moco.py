"""MoCo's loss: N ranks = one process in float64, and a double loop over queries and keys."""

import pytest
import torch
from gloo import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslcells import ranks
from sslcells.losses import MoCoLoss, torch_engine

IMAGES, D, T = 6, 5, 0.3
QUEUE = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def printed(q, k, queue):
    """arXiv 1911.05722, eq. 1, one query after the other."""
    unit = lambda z: z / z.norm(dim=1, keepdim=True)  # noqa: E731
    q, k, queue = unit(q), unit(k.detach()), unit(queue)
    losses = []
    for i in range(len(q)):
        logits = torch.stack([q[i] @ other / T for other in [*k, *queue]])
        losses.append(logits.logsumexp(0) - logits[i])
    return sum(losses) / len(losses)


def network():
    torch.manual_seed(3)
    return nn.Linear(4, D).double()


def pairs(world):
    return torch.randn(2, world * IMAGES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(world))


def step(queue):
    patch = pytest.MonkeyPatch()
    patch.setattr(torch_engine, "tile_size", lambda refs: 4)
    world, rank = ranks.world(), ranks.rank()
    net = DistributedDataParallel(network())
    x = pairs(world)[:, rank * IMAGES : (rank + 1) * IMAGES]
    try:
        loss = MoCoLoss(T)(net(x[0]), net.module(x[1]), queue)
        loss.backward()
    finally:
        patch.undo()
    return ranks.gather(loss[None]).mean().item(), net.module.weight.grad


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("queue", [None, QUEUE])
def test_ranks_equal_the_paper_on_one_process(world, queue):
    net, x = network(), pairs(world)
    loss = printed(net(x[0]), net(x[1]), QUEUE[:0] if queue is None else queue)
    (want,) = torch.autograd.grad(loss, net.weight)
    for value, grad in on_ranks(world, step, queue):
        assert value == pytest.approx(loss.item(), rel=1e-12)
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-13)


def test_stats_and_mistakes():
    loss, k = MoCoLoss(), torch.eye(D)
    loss(k, k)
    assert loss.stats["accuracy"] == 1
    assert loss.stats["positive_similarity"] == 1
    with pytest.raises(ValueError, match=r"\(4, 5\) and \(3, 5\)"):
        loss(torch.zeros(4, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"queue must be \(Q, 5\)"):
        loss(k, k, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="temperature=0"):
        MoCoLoss(0)
