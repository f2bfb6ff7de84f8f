"""The losses of distillation: their formulas from whole matrices, and one gradient on any number of ranks."""

import pytest
import torch
from gloo import on_ranks
from torch.nn import functional as F

from sslcells import ranks
from sslcells.losses import FeatureDistillationLoss, SimilarityDistillationLoss

LOSSES = {
    "cosine": lambda: FeatureDistillationLoss("cosine"),
    "mse": lambda: FeatureDistillationLoss("mse"),
    "similarity": SimilarityDistillationLoss,
}


def rows(kind, count=12, dtype=torch.float64):
    """Rows (A, 5) and features (A, 5), or (A, 7) where widths may differ, none of them near mean 0."""
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(count, 5, dtype=dtype, generator=generator)
    return z, 3 * torch.rand(count, 7 if kind == "similarity" else 5, dtype=dtype, generator=generator) + 1


def naive(kind, z, t):
    if kind == "cosine":
        return 1 - F.cosine_similarity(z, t).mean()
    if kind == "mse":
        return (z - t).square().sum() / (t - t.mean(0)).square().sum()
    centre = torch.eye(len(z), dtype=z.dtype) - 1 / len(z)
    k, m = (centre @ F.normalize(x) @ F.normalize(x).T @ centre for x in (z, t))  # (A, A), whole
    return 1 - (k * m).sum() / (k.norm() * m.norm())


@pytest.mark.parametrize("kind", LOSSES)
def test_it_is_its_formula_with_the_whole_matrix(kind):
    z, t = rows(kind)
    z.requires_grad_()
    t.requires_grad_()
    ours, theirs = LOSSES[kind]()(z, t), naive(kind, z, t.detach())
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    grads = torch.autograd.grad(ours, z, retain_graph=True)[0], torch.autograd.grad(theirs, z)[0]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    ours.backward()
    assert t.grad is None  # the teacher learns nothing


def part(kind, sizes):
    """The loss of this rank's rows, of a batch that is shared out in parts of these sizes, and their gradient."""
    z, t = (x.split(sizes)[ranks.rank()].clone() for x in rows(kind))
    z.requires_grad_()
    loss = LOSSES[kind]()(z, t)
    loss.backward()
    return loss.item(), z.grad / ranks.world()  # DDP's mean


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("sizes", [[6, 6], [3, 3, 3, 3], [1, 5, 4, 2]])
def test_one_gradient_on_any_number_of_ranks(kind, sizes):
    whole, grad = part(kind, [12])
    on_each = on_ranks(len(sizes), part, kind, sizes)
    assert {value for value, _ in on_each} == {on_each[0][0]}
    assert on_each[0][0] == pytest.approx(whole, abs=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in on_each]), grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_float32_of_rows_far_from_zero(kind):
    """Differences of large sums would lose their digits."""
    z, t = (x + 100 for x in rows(kind))
    loss = LOSSES[kind]()(z.float(), t.float())
    assert loss.item() == pytest.approx(naive(kind, z, t).item(), rel=1e-2, abs=1e-6)


def test_similarities_do_not_depend_on_axes_scale_or_width():
    _, t = rows("similarity")
    turn = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
    z = 5 * torch.cat([t, 0 * t[:, :2]], 1) @ turn
    assert SimilarityDistillationLoss()(z, t).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
def test_equal_rows_give_a_finite_gradient(kind):
    z, t = torch.ones(4, 3, requires_grad=True), torch.ones(4, 3)
    loss = LOSSES[kind]()(z, t)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "shapes"), [("cosine", ((3, 4), (3, 5))), ("mse", ((3, 4), (2, 4))), ("similarity", ((3, 4), (2, 4)))]
)
def test_shapes_that_do_not_fit(kind, shapes):
    with pytest.raises(ValueError, match=r"they are \(3, 4\) and"):
        LOSSES[kind]()(*(torch.rand(s) for s in shapes))


def test_an_unknown_distance():
    with pytest.raises(ValueError, match="neither cosine nor mse"):
        FeatureDistillationLoss("l1")
