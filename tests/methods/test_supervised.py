"""The classifier's losses against scikit-learn's and formulas, over the labelled images of the global batch."""

import numpy as np
import pytest
import torch
from gloo import on_ranks
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight
from test_contract import learner
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sslcells import ranks
from sslcells.config import ConfigError
from sslcells.data import Batch, ImageSet
from sslcells.methods import Outputs
from sslcells.methods.supervised import Config, Method


class Images(ImageSet):
    channels = 3

    def __init__(self, labels, classes=("a", "b", "c"), targets=None):
        self.labels, self.classes, self.targets = torch.tensor(labels), classes, targets
        self.sources = torch.arange(len(labels))

    def pixels(self, index):
        raise NotImplementedError

    def name(self, index):
        return str(index)


LABELS = [0, 0, 0, 0, 1, 1, 2, -1]
ROWS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def batch(labels, part=slice(None)):
    image = torch.arange(len(labels))
    ids = (torch.tensor(labels), image, image, 0 * image, 0 * image)
    return Batch(torch.zeros(len(labels), 1, 1, 1)[part], *(i[part] for i in ids))


def loss(labels=LABELS, part=slice(None), **options):
    method = Method(Config(**options), 4, Images(labels))
    value, figures = method.loss(Outputs(ROWS[part]), batch(labels, part), 0.0)
    return value, figures


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_cross_entropy_is_scikit_learns(weights):
    known, p = np.array(LABELS[:7]), ROWS[:7].softmax(1).numpy()
    each = compute_class_weight("balanced", classes=np.arange(3), y=known)[known] if weights == "balanced" else None
    value, figures = loss(class_weights=weights)
    assert value.item() == pytest.approx(log_loss(known, p, sample_weight=each), rel=1e-5)
    assert figures["top1"].item() == pytest.approx((p.argmax(1) == known).mean())


def test_focal_with_gamma_0_is_cross_entropy_and_with_2_its_formula():
    assert loss(loss="focal", gamma=0)[0].item() == pytest.approx(loss()[0].item())
    p = ROWS[:7].softmax(1)[torch.arange(7), torch.tensor(LABELS[:7])]
    assert loss(loss="focal")[0].item() == pytest.approx((-((1 - p) ** 2) * p.log()).mean().item(), rel=1e-5)


def of_rank(weights):
    value, figures = loss(class_weights=weights, part=slice(ranks.rank() * 2, ranks.rank() * 2 + 2))
    return ranks.gather(torch.stack([value, figures["top1"]])[None]).mean(0)


@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_ranks_with_unequal_weights_make_the_mean_of_the_global_batch(weights):
    whole, figures = loss(class_weights=weights)
    for got in on_ranks(4, of_rank, weights):
        torch.testing.assert_close(got, torch.stack([whole, figures["top1"]]))


def test_several_classes_an_image():
    targets = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.uint8)
    method = Method(Config(loss="bce", class_weights="balanced"), 4, Images([-1] * 4, (), targets))
    value, _ = method.loss(Outputs(ROWS[:4]), batch([-1] * 4), 0.0)
    weight = torch.tensor([2 / 2, 3 / 1, 1 / 3])  # negatives of a class for each of its positives
    p = ROWS[:4].sigmoid()
    expected = -(weight * targets * p.log() + (1 - targets.float()) * (1 - p).log()).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert method(torch.randn(2, 4), 0.0).shape == (2, 3)


def test_no_labelled_image_in_the_batch_is_a_loss_of_0():
    method = Method(Config(), 4, Images(LABELS))
    rows = ROWS[:2].clone().requires_grad_()
    value, _ = method.loss(Outputs(rows), batch([-1, -1]), 0.0)
    value.backward()
    assert value.item() == 0
    assert not rows.grad.any()


@pytest.mark.parametrize(
    ("options", "images", "message"),
    [
        ({}, Images([-1, -1]), "the train split has none"),
        ({"loss": "bce"}, Images([-1, -1]), "the train split has none"),
        ({"loss": "bce"}, Images([0, -1, 1]), "some of these are not"),
        ({}, Images([-1], (), torch.ones(1, 2)), "method.loss=bce"),
    ],
)
def test_labels_that_do_not_fit(options, images, message):
    with pytest.raises(ConfigError, match=message):
        Method(Config(**options), 4, images)


def test_bce_of_one_class_an_image():
    method = Method(Config(loss="bce"), 4, Images([0, 1, 2]))
    value, _ = method.loss(Outputs(ROWS[:3]), batch([0, 1, 2]), 0.0)
    expected = F.binary_cross_entropy_with_logits(ROWS[:3], torch.eye(3))
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


SENT = [("supervised", {}), ("supervised", {"loss": "bce"}), ("moco", {"queue": 24}), ("dino", {"prototypes": 32})]


def sent_by_ddp():
    """Numbers of the buffers that DDP sends from rank 0 at every forward pass."""
    return [
        sum(b.numel() for b in DistributedDataParallel(learner(name, options)).modules_buffers)
        for name, options in SENT
    ]


def test_what_a_method_keeps_is_not_sent_at_every_forward_pass():
    assert learner("supervised", {}).method._targets is None, "only bce needs a table of all images' targets"
    for sizes in on_ranks(2, sent_by_ddp):
        assert sizes == [0] * len(SENT)  # test_vit has no BatchNorm
