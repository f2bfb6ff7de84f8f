"""Features: each image once, in order, the same on any number of ranks."""

import pytest
import torch
from gloo import on_ranks
from torch import nn

from sslcells.config import load
from sslcells.data import open_splits
from sslcells.evaluation.encode import encode, spread


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5), nn.BatchNorm1d(5), nn.Dropout(0.9))


def extracted(indices):
    images = open_splits(load(None, ["data.train=23", "data.size=16"]).data)["train"]
    net = encoder()
    z = encode(images, net, lambda pixels, image: pixels.float(), torch.device("cpu"), 4, 0, indices).z
    assert net.training
    return z


@pytest.mark.slow
def test_the_same_on_any_number_of_ranks():
    indices = [*range(20, 3, -2), 5]
    whole = extracted(indices)
    assert whole.shape == (10, 5)
    for world in (2, 3, 4):
        for z in on_ranks(world, extracted, indices):
            torch.testing.assert_close(z, whole)


@pytest.mark.slow
def test_more_ranks_than_images():
    assert [z.shape for z in on_ranks(3, extracted, [7])] == [(1, 5)] * 3


def test_eval_mode_and_order():
    whole = extracted(list(range(23)))
    assert torch.allclose(extracted([11, 3]), whole[[11, 3]], atol=1e-4)


def test_spread_keeps_every_class_of_a_periodic_split():
    index = spread(1000, 50)
    assert index == sorted(set(index))
    assert {i % 5 for i in index} == set(range(5)), "every twentieth image would all be of class 0"
    assert spread(7, None) == spread(7, 9) == list(range(7))
