"""Negatives of the same laboratory: what the methods leave out, and what they refuse."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sslcells.config import PLUGINS, ConfigError
from sslcells.data import Batch, ImageSet
from sslcells.losses import BatchHardTripletLoss, NTXentLoss, SupConLoss
from sslcells.methods import Outputs, build

LAB = torch.tensor([1, 2, 1, 2, 1, 2])
LABEL = torch.tensor([0, 0, 1, 1, 0, 1])


class Images(ImageSet):
    channels, classes, lab_names = 3, ("a", "b"), ("x", "y")

    def __init__(self, labs=LAB):
        self.labels, self.sources, self.labs = LABEL, torch.arange(6), labs

    def pixels(self, index):
        raise NotImplementedError

    def name(self, index):
        return f"image {index}"


def of(name, images=None, **options):
    config = PLUGINS["method"].config(name)(**options)
    return build(config, 4, images or Images())


def value(method, rows, lab=LAB):
    image = torch.arange(6)
    batch = Batch(torch.zeros(6, 1, 1, 1), LABEL, image, image, lab, 0 * image)
    return method.loss(Outputs(rows), batch, 0.0)[0].item()


def rows_of(views=2):
    return nn.functional.normalize(torch.randn(views * 6, 3, generator=torch.Generator().manual_seed(0)), dim=1)


def test_each_method_hands_the_laboratories_to_its_loss():
    z, lab2 = rows_of(), LAB.repeat(2)
    want = {
        "simclr": NTXentLoss(0.2)(*z.chunk(2), torch.arange(6), LAB),
        "supcon": SupConLoss(0.1)(z, LABEL.repeat(2), None, lab2),
        "triplet": BatchHardTripletLoss(0.2)(z, torch.arange(6).repeat(2), None, lab2),
    }
    for name, expected in want.items():
        assert value(of(name, same_lab="only"), z) == pytest.approx(expected.item())
        assert value(of(name, same_lab="only"), z) != pytest.approx(value(of(name), z))


@pytest.mark.parametrize("name", ["simclr", "supcon", "triplet"])
def test_another_laboratory_pushes_nothing(name):
    """Rows of other laboratories that are no positives have no part in the loss of the first."""
    z, method = rows_of(), of(name, same_lab="only", **({} if name == "simclr" else {"positive": "source"}))
    moved = z.clone()
    second = (LAB == 2).repeat(2)
    moved[second] = moved[second].flip(0)

    def of_first(rows):
        rows = rows.clone().requires_grad_()
        batch = Batch(torch.zeros(6, 1, 1, 1), LABEL, torch.arange(6), torch.arange(6), LAB, 0 * LAB)
        method.loss(Outputs(rows), batch, 0.0)[0].backward()
        return rows.grad[~second]

    torch.testing.assert_close(of_first(moved), of_first(z), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["simclr", "supcon", "triplet"])
def test_images_without_a_laboratory_are_refused(name):
    with pytest.raises(ConfigError, match=r"every image of train; 1 of 6 have none, such as image 2: give it by"):
        of(name, Images(torch.tensor([1, 2, 0, 1, 1, 2])), same_lab="only")
    with pytest.raises(ConfigError, match="6 of 6 have none, such as image 0"):
        of(name, Images(None), same_lab="only")
    of(name, Images(None))


@pytest.mark.parametrize(("name", "options"), [("simclr", {"loss": "hard_negative"}), ("triplet", {"negative": "all"})])
def test_losses_that_cannot(name, options):
    with pytest.raises(ValidationError, match="same_lab=only goes with"):
        PLUGINS["method"].config(name)(same_lab="only", **options)
