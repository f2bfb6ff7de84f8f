"""The optimizer and its schedule."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sslcells import methods, models, optim
from sslcells.config import ConfigError, Model, Optim
from sslcells.methods.simclr import Config as Simclr


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
    assert rates[54] > 0.55 > rates[55]
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "warmup", "rates"),
    [
        (1, 0, [1]),  # the only step
        (1, 1, [1]),
        (2, 0, [1, 0.1]),
        (2, 1, [1, 0.1]),
        (3, 3, [1 / 3, 2 / 3, 1]),  # all is warm-up
        (3, 2, [0.5, 1, 0.1]),
        (3, 0, [1, 0.55, 0.1]),
        (4, 1, [1, 1, 0.55, 0.1]),
    ],
)
def test_the_last_step_has_min_lr(steps, warmup, rates):
    config = Optim(lr=1.0, min_lr=0.1)
    assert [optim.learning_rate(config, step, steps, warmup) for step in range(steps)] == pytest.approx(rates)


def relative_steps(name, gradient, **options):
    """Of a matrix and a vector of 0.5s: length of the first step over the parameter's, at a learning rate of 0.1."""
    net = network()
    optimizer = optim.build(Optim(name=name, lr=0.1, momentum=0, **options), net)
    moved = []
    for p in net.parameters():
        nn.init.constant_(p, 0.5)
        p.grad = torch.full_like(p, gradient)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        moved.append(((p - old).norm() / old.norm()).item())
    return moved[0], moved[1]


@pytest.mark.parametrize(("name", "trust"), [("lars", 0.001), ("lamb", 1.0), ("lambw", 1.0), ("lambc", 1.0)])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-9])
def test_trust_ratios_do_not_depend_on_weight_decay(name, trust, weight_decay):
    """LARS moves a matrix by lr · trust · its length, LAMB by lr · its length, whatever the gradient's."""
    for gradient in (0.01, 1.0, 100.0):
        args = {"max_grad_norm": None} if name.startswith("lamb") else {}
        matrix, vector = relative_steps(name, gradient, weight_decay=weight_decay, args=args)
        if name != "lambc":
            assert matrix == pytest.approx(0.1 * trust, rel=1e-3)
        assert vector == pytest.approx(0.1 * 2 * (gradient if name == "lars" else 1), rel=1e-3)  # as SGD and Adam


def test_what_is_adapted_can_be_said():
    for said in (True, False):
        groups = optim.build(Optim(name="lars", weight_decay=0, args={"always_adapt": said}), network()).param_groups
        assert [group["always_adapt"] for group in groups] == [said]


def test_what_timm_takes_no_weight_decay_of_is_spared():
    vit = models.build(Model(backbone="test_vit", args={"img_size": 32}), 3)
    named = vit.no_weight_decay()
    assert "pos_embed" in named
    assert "cls_token" in named
    method = methods.build(Simclr(), models.width(vit, 3, 32), None)
    learner = methods.Learner(vit, method)
    for encoder_scale in (1.0, 0.1):
        config = Optim(weight_decay=0.1, encoder_scale=encoder_scale)
        groups = optim.build(config, learner, [[*learner.backbone.parameters()]]).param_groups
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        spared = {name for name, p in learner.backbone.named_parameters() if decay[id(p)] == 0 and p.ndim > 1}
        assert spared == {name for name, p in vit.named_parameters() if name in named}


def test_set_learning_rate():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr_scale": 0.5}], 1.0)
    optim.set_learning_rate(optimizer, 0.2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
