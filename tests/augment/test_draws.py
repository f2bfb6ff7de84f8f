"""Random numbers by counter: uniform, independent, and the same wherever they are drawn."""

import torch

from sslcells.augment._draws import Draws

N = 20_000


def draws(seed=0, step=0, views=1):
    return Draws(seed, step, torch.arange(N), views)


def test_uniform():
    u = draws().uniform()
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - N / 50) ** 2 / (N / 50)).sum() < 90  # chi-square, 49 degrees of freedom: p < 4e-4
    assert u.min() >= 0
    assert u.max() < 1


def test_normal():
    n = draws().normal()
    assert abs(n.mean()) < 0.03
    assert abs(n.std() - 1) < 0.03
    assert n.isfinite().all()


def test_columns_images_views_steps_and_seeds_are_independent():
    d = draws(views=2)
    first, second = d.uniform(), d.uniform()
    streams = [first[:N], second[:N], first[N:], first[: N - 1].roll(1), draws(step=1).uniform(), draws(1).uniform()]
    streams[3] = torch.cat([streams[3], first[:1]])
    correlation = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0).abs().max()
    assert correlation < 5 / N**0.5


def test_a_number_depends_on_seed_step_image_and_view_alone():
    images = torch.tensor([7, 123456789012, 3])
    whole = Draws(5, 9, images, 2)
    alone = Draws(5, 9, images[1:2], 2)
    for _ in range(3):
        a, b = whole.uniform(), alone.uniform()
        assert torch.equal(a[[1, 4]], b)


def test_order_is_a_permutation_each_of_them_equally_often():
    order = draws().order(3)
    assert (order.sort(1).values == torch.arange(3)).all()
    code = order[:, 0] * 9 + order[:, 1] * 3 + order[:, 2]
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == 6
    assert (counts - N / 6).abs().max() < 5 * (N * 5 / 36) ** 0.5


def test_known_numbers():
    """A change of these would break the replay of old runs."""
    assert [round(x, 6) for x in Draws(1, 2, torch.tensor([3, 4]), 1).uniform().tolist()] == KNOWN


KNOWN = [0.861032, 0.114789]
