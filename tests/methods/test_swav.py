"""SwAV: the paper's loss with loops, its queue, and N ranks = one process in float64."""

import math

import pytest
import torch
from gloo import on_ranks
from test_contract import Images
from torch.nn import functional as F

from sslcells import methods, ranks
from sslcells.data import Batch
from sslcells.methods.swav import Config

B, F_WIDTH, D, K, TAU, EPSILON = 8, 6, 5, 7, 0.2, 0.1


def build(**options):
    torch.manual_seed(0)
    given = {"hidden": 8, "dimension": D, "prototypes": K, "norm": "layer", "temperature": TAU, "epsilon": EPSILON}
    return methods.build(Config(**{**given, "freeze": 0.0, **options}), F_WIDTH, Images()).double()


def batch(count):
    image = torch.arange(count)
    return Batch(torch.zeros(count, 1, 1, 1), image, image, image, 0 * image, 0 * image)


def features(views=2):
    return torch.randn(views, B, F_WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assigned(scores):
    """arXiv 2006.09882, appendix A.1: three iterations on exp(scores / ε), prototypes first."""
    q = (scores / EPSILON).exp()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def printed(method, z, queue=None):
    """Eq. 2 for unit rows (V, B, D): the mean over pairs of a full-size view and another view, and over images."""
    directions = F.normalize(method.prototypes.weight, dim=1)
    pairs = []
    for t in range(2):
        known = z[t] if queue is None else torch.cat([z[t], F.normalize(queue[t], dim=1)])
        q = assigned((known @ directions.T).detach())[: z.shape[1]]
        for s in range(len(z)):
            if s != t:
                p = (z[s] @ directions.T / TAU).exp()
                pairs.append(-(q * (p / p.sum(1, keepdim=True)).log()).sum(1).mean())
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("local", [0, 2])
def test_the_loss_is_the_papers_and_its_rows_join_the_queue(local):
    method = build(queue=2 * B + 3, queue_from=0.5, local_views=local)
    first, x = method.queue.clone(), features(2 + local)
    for progress, used in ((0.0, False), (0.5, True)):
        z = method(x.flatten(0, 1), progress)
        unit = F.normalize(z, dim=1).view(2 + local, B, D)
        queue = torch.cat([unit[:2].detach(), first[:, : B + 3]], 1) if used else None
        loss, figures = method.loss(methods.Outputs(z), batch(B), progress)
        want = printed(method, unit, queue)
        weights = list(method.parameters())
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        ours = torch.autograd.grad(loss, weights, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(want, weights))
        assert 1 <= figures["prototypes_used"] <= K
    torch.testing.assert_close(method.queue[:, :B], unit[:2].detach())
    torch.testing.assert_close(method.queue[:, B : 2 * B], unit[:2].detach())
    torch.testing.assert_close(method.queue[:, 2 * B :], first[:, :3])


def test_frozen_prototypes_have_no_gradient_and_are_free_later():
    method = build(freeze=0.5)
    for progress, frozen in ((0.4, True), (0.5, False)):
        method.zero_grad()
        method.loss(methods.Outputs(method(features().flatten(0, 1), progress)), batch(B), progress)[0].backward()
        assert (method.prototypes.weight.grad == 0).all() == frozen


def on_a_rank(options):
    method, part = build(**options), B // ranks.world()
    x = features()[:, ranks.rank() * part : (ranks.rank() + 1) * part]
    loss, _ = method.loss(methods.Outputs(method(x.flatten(0, 1), 0.5)), batch(part), 0.5)
    loss.backward()
    grad = torch.cat([p.grad.flatten() for p in method.parameters()])
    return loss.detach(), ranks.total(grad) / ranks.world(), method.queue


@pytest.mark.parametrize("options", [{}, {"queue": 11, "queue_from": 0.0}])
def test_ranks_equal_one_process(options):
    value, grad, queue = on_a_rank(options)
    for world in (2, 4):
        answers = on_ranks(world, on_a_rank, options)
        assert math.isclose(sum(a for a, _, _ in answers) / world, value, rel_tol=1e-12)
        for _, theirs, kept in answers:
            assert (theirs - grad).norm() / grad.norm() < 1e-10
            torch.testing.assert_close(kept, queue, rtol=1e-12, atol=0)
