import importlib
import math

import pytest
import torch
from torch.nn import functional as F

from sslcells.evaluation.health import alignment, effective_rank, health, row_std, uniformity

# By name: the package exports the function of the same name.
module = importlib.import_module("sslcells.evaluation.health")


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_effective_rank_counts_the_dimensions_in_use():
    assert effective_rank(torch.eye(12).repeat(5, 1)) == pytest.approx(12)
    assert 31 < effective_rank(rows(8000, 32)) <= 32
    assert effective_rank(rows(4000, 8) @ rows(8, 64)) < 8
    assert effective_rank(torch.linspace(1, 5, 50)[:, None] * rows(1, 16)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(5, 3)) == 1


def test_effective_rank_is_that_of_the_singular_values_uncentred():
    z = rows(40, 60) + 2
    share = torch.linalg.svdvals(F.normalize(z.double(), dim=1))
    share = share / share.sum()
    # The Gram matrix has 20 further eigenvalues that are 0 up to rounding.
    assert effective_rank(z) == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-4)


def test_row_std_is_one_when_spread_and_zero_when_collapsed():
    assert row_std(rows(5000, 64) * 7) == pytest.approx(1, abs=0.02)
    assert row_std(torch.ones(50, 64) * torch.arange(1, 51)[:, None]) == pytest.approx(0, abs=1e-6)


def test_alignment_of_known_angles():
    z = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert alignment(z, 5 * z) == pytest.approx(0)
    assert alignment(z, -z) == pytest.approx(4)
    assert alignment(z, torch.tensor([[0.0, 1.0], [3.0, 0.0]])) == pytest.approx(1)  # mean of 2 and 0


def test_uniformity_is_the_naive_mean_over_pairs(monkeypatch):
    z = rows(37, 6)
    unit = F.normalize(z.double(), dim=1)
    potentials = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(37) for j in range(i)]
    expected = math.log(sum(potentials) / len(potentials))
    assert uniformity(z) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(module, "_CHUNK", 5)
    assert uniformity(z) == pytest.approx(expected, rel=1e-9)


def test_uniformity_of_collapsed_and_spread_rows():
    assert uniformity(torch.ones(30, 5)) == pytest.approx(0, abs=1e-9)
    assert uniformity(rows(1000, 512)) == pytest.approx(-4, abs=0.05)


def test_large_sets_are_thinned_out_the_same_every_time(monkeypatch):
    z0, z1 = rows(3000, 8), rows(3000, 8) + 0.1 * rows(3000, 8, seed=1)
    whole, close = uniformity(z0), alignment(z0, z1)
    monkeypatch.setattr(module, "_PAIR_ROWS", 1000)
    monkeypatch.setattr(module, "_SPECTRUM_ROWS", 1000)
    assert uniformity(z0) == uniformity(z0) != whole
    assert uniformity(z0) == pytest.approx(whole, abs=0.05)
    # Both views keep the same images.
    assert alignment(z0, z1) == pytest.approx(close, rel=0.2)


def test_health_collects_all_figures():
    z = rows(50, 8)
    assert health(z) == {"effective_rank": effective_rank(z), "row_std": row_std(z), "uniformity": uniformity(z)}
    assert health(z, z[:9], z[1:10])["alignment"] == alignment(z[:9], z[1:10])


def test_nan_rows_give_nan_not_an_end():
    assert all(math.isnan(value) for value in health(torch.full((5, 3), math.nan)).values())
