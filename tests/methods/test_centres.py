"""Class centres and proxies: against pytorch-metric-learning on one process, and what is drawn for the margin loss."""

import pytest
import torch
from pytorch_metric_learning import losses, miners
from test_contract import Images

from sslcells import methods
from sslcells.config import PLUGINS, ConfigError
from sslcells.data import Batch
from sslcells.methods._embedding import seed_of
from sslcells.methods.margin import distance_weighted

D, N = 8, 24
LABEL = torch.tensor([0, 0, 1, 2, 1, 2, 0, 1, 1, 2, 0, 2] * 2)
THEIRS = {
    ("arcface", "margin=20.0 scale=16.0"): lambda m: losses.ArcFaceLoss(3, D, margin=20.0, scale=16.0),
    ("cosface", "margin=0.2 scale=16.0"): lambda m: losses.CosFaceLoss(3, D, margin=0.2, scale=16.0),
    ("sphereface", "margin=3 scale=0.5"): lambda m: losses.SphereFaceLoss(3, D, margin=3, scale=0.5),
    ("proxies", "margin=0.2 alpha=16.0"): lambda m: losses.ProxyAnchorLoss(3, D, margin=0.2, alpha=16.0),
    ("proxies", "loss=proxy_nca softmax_scale=3.0"): lambda m: losses.ProxyNCALoss(3, D, softmax_scale=3.0),
}


def build(name, images=None, **options):
    torch.manual_seed(0)
    options = {"dimension": D, "hidden": 16, "norm": "layer", **options}
    return methods.build(PLUGINS["method"].config(name)(**options), 10, images or Images())


def parsed(text):
    pairs = (word.split("=") for word in text.split())
    return {k: v if k == "loss" else int(v) if k == "margin" and "." not in v else float(v) for k, v in pairs}


def rows(seed=0):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def batch(label):
    image = torch.arange(len(label))
    return Batch(torch.zeros(len(label), 1, 1, 1), label, image, image, image * 0, image * 0)


@pytest.mark.parametrize(("name", "options"), THEIRS)
@pytest.mark.parametrize("unknown", [0, 5])
def test_the_loss_is_theirs(name, options, unknown):
    """With the same centres; rows without a label are as if they were not there."""
    method = build(name, **parsed(options))
    theirs = THEIRS[name, options](method)
    theirs.load_state_dict(method._loss.state_dict())
    label, z = LABEL.clone(), rows()
    label[:unknown] = -1
    got, figures = method.loss(methods.Outputs(z), batch(label), 0.0)
    want = theirs(z[unknown:], label[unknown:])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(got, [z, *method._loss.parameters()])
    for g, w in zip(ours, torch.autograd.grad(want, [z, *theirs.parameters()]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
    assert 0 <= figures["top1"] <= 1


def test_the_margin_loss_is_theirs_on_the_triplets_drawn():
    method, z = build("margin"), rows()
    theirs = losses.MarginLoss(learn_beta=True, num_classes=3)
    one, two = (method.loss(methods.Outputs(z), batch(LABEL), 0.0)[0] for _ in range(2))
    generator = torch.Generator().manual_seed(seed_of(batch(LABEL)))
    want = theirs(z, LABEL, distance_weighted(z.detach(), LABEL, 0.5, generator))
    assert one.item() == two.item() == pytest.approx(want.item(), rel=1e-5)


def test_negatives_are_drawn_as_theirs():
    """As often as by their miner, which draws a positive too: at each anchor the shares of its negatives."""
    z = torch.nn.functional.normalize(rows(3).detach(), dim=1) + 0.3
    share = torch.zeros(2, N, N)
    miner = miners.DistanceWeightedMiner()
    for seed in range(400):
        anchor, positive, negative = distance_weighted(z, LABEL, 0.5, torch.Generator().manual_seed(seed))
        assert (LABEL[anchor] == LABEL[positive]).all()
        assert (anchor != positive).all()
        assert (LABEL[anchor] != LABEL[negative]).all()
        share[0].index_put_((anchor, negative), torch.ones(len(anchor)), accumulate=True)
        torch.manual_seed(seed)
        anchor, _, negative = miner(z, LABEL)
        share[1].index_put_((anchor, negative), torch.ones(len(anchor)), accumulate=True)
    ours, theirs = share / share.sum(2, keepdim=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


def test_no_negative_near_enough():
    z = torch.eye(4)[[0, 0, 1, 1]] * torch.tensor([1.0, 1, -1, -1])[:, None]
    found = distance_weighted(z, torch.tensor([0, 0, 1, 1]), 0.5, torch.Generator())
    assert [x.tolist() for x in found] == [[]] * 3
    z = torch.zeros(4, D).requires_grad_()
    loss, _ = build("margin").loss(methods.Outputs(z), batch(torch.tensor([0, 1, 2, -1])), 0.0)
    assert loss.item() == 0


@pytest.mark.parametrize("name", ["arcface", "proxies", "margin"])
def test_a_batch_without_labels_is_zero(name):
    z = rows()
    loss, _ = build(name).loss(methods.Outputs(z), batch(torch.full((N,), -1)), 0.0)
    loss.backward()
    assert loss.item() == 0
    assert not z.grad.any()


class Unlabelled(Images):
    def __init__(self):
        super().__init__()
        self.labels, self.sources = torch.full_like(self.labels, -1), torch.arange(len(self.labels))


NEED_LABELS = [
    *((name, {}) for name in ("arcface", "cosface", "sphereface", "margin", "proxies", "supcon")),
    *((name, {"positive": "label"}) for name in ("triplet", "pairs", "siamese")),
]


@pytest.mark.parametrize(("name", "options"), NEED_LABELS)
def test_what_needs_labels_says_so(name, options):
    with pytest.raises(
        ConfigError, match=r"needs labels of at least two classes; the train split has 8 images without"
    ):
        build(name, Unlabelled(), **options)


@pytest.mark.parametrize("name", ["triplet", "pairs", "siamese"])
def test_lone_sources_with_one_view_have_no_positives(name):
    build(name, Unlabelled(), positive="source", views=2)
    with pytest.raises(ConfigError, match=r"each of the 8 images of the train split is the only one of its source"):
        build(name, Unlabelled(), positive="source", views=1)
