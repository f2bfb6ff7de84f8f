"""LeJEPA's method: the views that make the mean, and the directions that a step draws."""

import torch
from test_contract import Images
from test_swav import batch

from sslcells import methods
from sslcells.losses import LeJEPALoss
from sslcells.methods._embedding import drawn_at
from sslcells.methods.lejepa import Config


def value(rows, seed, progress, **options):
    method = methods.build(Config(dimension=6, slices=8, weight=0.4, **options), 8, Images())
    method.seed = seed
    return method.loss(methods.Outputs(rows), batch(4), progress)[0].item()


def test_directions_are_of_the_seed_and_the_step():
    rows = torch.randn(8, 6)
    same = value(rows, 1, 0.25)
    assert value(rows, 1, 0.25) == same
    assert value(rows, 1, 0.25 + 1e-9) != same
    assert value(rows, 2, 0.25) != same


def test_all_views_predict_the_mean_of_the_full_size_ones():
    rows = torch.randn(20, 6)
    ours = value(rows, 0, 0.5, views=3, local_views=2)
    assert ours == LeJEPALoss(0.4, 8)(rows.view(5, 4, 6), drawn_at(0, 0.5), 3).item()
    assert ours != LeJEPALoss(0.4, 8)(rows.view(5, 4, 6), drawn_at(0, 0.5)).item()
