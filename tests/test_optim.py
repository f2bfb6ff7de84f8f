"""The optimizer and its schedule."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sslcells import optim
from sslcells.config import ConfigError, Optim


def network():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb"])
def test_optimizers_lower_a_loss_and_spare_biases_weight_decay(name):
    torch.manual_seed(0)
    net = network()
    optimizer = optim.build(Optim(name=name, lr=0.05, weight_decay=0.1), net)
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {1: 0.0, 2: 0.1}
    x, y = torch.randn(32, 4), torch.randn(32, 4)
    losses = []
    for _ in range(20):
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"name": "adamv"}, "did you mean adam"), ({"args": {"bettas": 1}}, "bettas")],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        optim.build(Optim(**options), network())


def test_schedule():
    config = Optim(lr=1.0, min_lr=0.1)
    rates = [optim.learning_rate(config, step, 100, 10) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert optim.learning_rate(config, 0, 1, 0) == 1.0


def test_set_learning_rate():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr_scale": 0.5}], 1.0)
    optim.set_learning_rate(optimizer, 0.2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
