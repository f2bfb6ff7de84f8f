"""Differential: methods' losses beside formulas and pytorch-metric-learning's, on many random sets.

Methods compute in float32, so a relative difference of 1e-5 is accepted, of gradients 1e-4 of their largest.
"""

import math
import random

import pytest
import torch
from pytorch_metric_learning import losses
from test_contract import Images
from test_rows_not_finite import FEATURES

from sslcells import methods
from sslcells.config import PLUGINS
from sslcells.data import Batch


def build(name, images=None, **options):
    config = PLUGINS["method"].config(name)(**{"hidden": 8, "norm": "none", **options})
    return methods.build(config, FEATURES, images or Images())


def batch(label):
    image = torch.arange(len(label))
    return Batch(torch.zeros(len(label), 1, 1, 1), label, image, image, 0 * image, 0 * image)


def same(ours, theirs, *leaves):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)
    for got, want in zip(torch.autograd.grad(ours, leaves[0]), torch.autograd.grad(theirs, leaves[1]), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=1e-4 * want.abs().max().item() + 1e-12)


def dino(student, teacher, centre, tau_s, tau_t):
    """Eq. 1 to 3 for lists of views, (B, K) each: the mean over images and over pairs of views that are not the same.

    The paper writes the sum over pairs; its algorithm 1, of two views, halves it.
    """
    pairs = []
    for x, given in enumerate(teacher):
        for other, seen in enumerate(student):
            if other == x:
                continue
            for i in range(len(given)):
                e = [math.exp((g - c) / tau_t) for g, c in zip(given[i].tolist(), centre.tolist(), strict=True)]
                p_t = [v / sum(e) for v in e]
                logits = seen[i] / tau_s
                log_p_s = logits - logits.exp().sum().log()
                pairs.append(-sum(a * b for a, b in zip(p_t, log_p_s, strict=True)))
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(12))
def test_dino(seed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    images, local, count = draw.randint(1, 6), draw.randint(0, 3), draw.randint(2, 9)
    done, warmup, momentum = draw.random(), draw.choice([0.0, 0.3, 1.0]), draw.choice([0.0, 0.5, 0.9])
    method = build(
        "dino", prototypes=count, local_views=local, temperature=0.2, teacher_temperature=0.05,
        final_teacher_temperature=0.09, teacher_warmup=warmup, centre_momentum=momentum,
    )  # fmt: skip
    centre = torch.zeros(count, dtype=torch.float64)
    tau_t = 0.05 + 0.04 * (min(1, done / warmup) if warmup else 1)
    for _ in range(3):  # the centre moves after each
        views = 2 + local
        student = torch.randn(views, images, count, generator=generator, dtype=torch.float64).requires_grad_()
        teacher = torch.randn(2, images, count, generator=generator, dtype=torch.float64) / 4
        rows, given = (x.detach().flatten(0, 1).float() for x in (student, teacher))
        outputs = methods.Outputs(rows.requires_grad_(), given)
        ours, _ = method.loss(outputs, batch(torch.zeros(images, dtype=torch.int64)), done)
        theirs = dino(list(student), list(teacher), centre, 0.2, tau_t)
        (by_student,) = torch.autograd.grad(theirs, student, retain_graph=True)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
        (by_rows,) = torch.autograd.grad(ours, rows)
        torch.testing.assert_close(by_rows.double(), by_student.flatten(0, 1), rtol=1e-4, atol=1e-6)
        centre = momentum * centre + (1 - momentum) * teacher.flatten(0, 1).mean(0)  # eq. 4
        torch.testing.assert_close(method.centre.double(), centre, rtol=1e-5, atol=1e-6)


THEIRS = {
    "arcface": ({"margin": 20.0, "scale": 16.0}, losses.ArcFaceLoss),
    "cosface": ({"margin": 0.2, "scale": 16.0}, losses.CosFaceLoss),
    "sphereface": ({"margin": 3, "scale": 0.5}, losses.SphereFaceLoss),
    "proxy_anchor": ({"margin": 0.2, "alpha": 16.0}, losses.ProxyAnchorLoss),
    "proxy_nca": ({"softmax_scale": 3.0}, losses.ProxyNCALoss),
}


class Labelled(Images):
    def __init__(self, classes):
        super().__init__()
        self.classes = tuple(map(str, range(classes)))


@pytest.mark.parametrize("name", THEIRS)
def test_centres_and_proxies(name):
    options, kind = THEIRS[name]
    for seed in range(6):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        count, width, classes = draw.randint(1, 30), draw.choice([2, 5, 16]), draw.randint(2, 9)
        torch.manual_seed(seed)
        ours = {"loss": name, **options} if "proxy" in name else options
        method = build("proxies" if "proxy" in name else name, Labelled(classes), dimension=width, **ours)
        theirs = kind(classes, width, **options)
        theirs.load_state_dict(method._loss.state_dict())
        z = torch.randn(count, width, generator=generator).requires_grad_()
        label = torch.randint(-1, classes, (count,), generator=generator)
        label[0] = 1
        known = label >= 0
        value, _ = method.loss(methods.Outputs(z), batch(label), 0.0)
        same(value, theirs(z[known], label[known]), [z, *method._loss.parameters()], [z, *theirs.parameters()])
