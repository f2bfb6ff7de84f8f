"""iBOT: which patches are hidden, who sees them, and the loss of patches beside its formula."""

import math

import pytest
import torch
from test_contract import IMAGES, SIZE, batch, crops, embed, learner

from sslcells import methods
from sslcells.augment import Draws
from sslcells.config import ConfigError, load
from sslcells.methods import ibot
from sslcells.plan import consequences

GRID = 7, 7
SMALL = {"prototypes": 32, "freeze": 0.0}


def draws(images):
    return Draws(3, 8, images, 2, methods.MASKS)


@pytest.mark.parametrize("masking", ["blocks", "random"])
def test_how_much_is_hidden_and_that_it_depends_on_the_image_alone(masking):
    config = ibot.Config(masking=masking, mask_probability=0.5, min_masked=0.2, max_masked=0.4)
    images = torch.arange(400)
    mask = ibot.hidden(config, GRID, draws(images))
    share = mask.float().mean(1)
    some = share > 0
    assert 0.45 < some.float().mean() < 0.55
    assert share[some].min() >= 0.2 - 0.5 / 49
    assert share[some].max() <= 0.4 + 0.5 / 49
    assert 0.28 < share[some].mean() < 0.32
    assert mask[some].float().mean(0).min() > 0.1  # every patch is hidden at times
    part = ibot.hidden(config, GRID, draws(images[100:140]))
    assert torch.equal(part.view(2, 40, -1), mask.view(2, 400, -1)[:, 100:140])
    assert not torch.equal(mask[:400], mask[400:])


def beside(mask):
    """Of the hidden patches, the share whose lower neighbour is hidden too."""
    square = mask.view(-1, *GRID)
    return ((square[:, :-1] & square[:, 1:]).sum() / square[:, :-1].sum()).item()


def test_blocks_hang_together():
    images = torch.arange(300)
    blocks, anywhere = (
        ibot.hidden(ibot.Config(masking=masking, mask_probability=1.0), GRID, draws(images))
        for masking in ("blocks", "random")
    )
    assert beside(anywhere) < 0.4
    assert beside(blocks) > 0.6


def test_a_view_of_which_patches_are_hidden_hides_one_at_least():
    config = ibot.Config(mask_probability=1.0, min_masked=0.01, max_masked=0.01)
    assert ibot.hidden(config, GRID, draws(torch.arange(20))).sum(1).eq(1).all()


@pytest.mark.parametrize("head", ["shared", "own"])
@torch.no_grad()
def test_the_teacher_sees_what_is_hidden_from_the_student(head):
    network = learner("ibot", {**SMALL, "patch_head": head, "min_masked": 0.3}).eval()
    b = batch()
    mask = ibot.hidden(network.method._config, (4, 4), Draws(0, 5, b.image, 2, methods.MASKS, b.occurrence))
    assert mask.any(1).sum() not in (0, len(mask))
    pixel = mask.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).view(2, IMAGES, 1, SIZE, SIZE)
    whole, other = (
        embed(network, network.method, b),
        embed(network, network.method, b._replace(pixels=b.pixels + pixel)),
    )
    torch.testing.assert_close(other.rows, whole.rows)
    torch.testing.assert_close(other.patches.rows, whole.patches.rows)
    changed = (other.teacher - whole.teacher).abs().amax(1) > 1e-4
    assert torch.equal(changed, mask.any(1))
    assert ((other.patches.teacher - whole.patches.teacher).abs().amax(1) > 1e-4).all()

    seen = network.teacher.backbone.forward_features(crops(b, network.method)[0])[:, 1:][
        mask
    ]  # test_vit has one prefix
    of_patches = network.teacher.head.image if head == "shared" else network.teacher.head.own
    torch.testing.assert_close(whole.patches.teacher, of_patches(seen))
    assert whole.patches.weight.sum().item() == pytest.approx(mask.any(1).sum().item())


def test_the_loss_of_patches():
    """Eq. 2, of each view the mean over its hidden patches; the mean over views counts those without as 0."""
    method = learner("ibot", {**SMALL, "temperature": 0.2, "teacher_temperature": 0.05, "patch_weight": 0.5}).method
    generator = torch.Generator().manual_seed(1)
    rows, teacher, of_images, of_teacher = (torch.randn(n, 32, generator=generator) / 4 for n in (5, 5, 8, 8))
    view = [0, 0, 0, 2, 2]
    weight = torch.tensor([1 / view.count(v) for v in view])
    patches = methods.Patches(rows, teacher, weight)
    loss, figures = method.loss(methods.Outputs(of_images, of_teacher, patches=patches), None, 0.0)
    expected = 0.0
    for v in range(8):
        cross = [-(teacher[i] / 0.05).softmax(0) @ (rows[i] / 0.2).log_softmax(0) for i in range(5) if view[i] == v]
        expected += sum(cross) / len(cross) / 8 if cross else 0
    assert figures["patch_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(method.patch_centre, teacher.mean(0) / 10)
    none = methods.Patches(*(x[:0] for x in patches))
    alone, figures = learner("ibot", {**SMALL, "temperature": 0.2, "teacher_temperature": 0.05}).method.loss(
        methods.Outputs(of_images, of_teacher, patches=none), None, 0.0
    )
    assert loss.item() - alone.item() == pytest.approx(0.5 * expected.item(), rel=1e-4)
    assert all(figure.isfinite() for figure in figures.values())


@pytest.mark.parametrize("which", ["rows", "teacher"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
def test_a_patch_that_is_not_finite_shows(which, bad, centring):
    method = learner("ibot", {**SMALL, "centring": centring}).method
    patches = methods.Patches(torch.randn(5, 32), torch.randn(5, 32), torch.ones(5))
    getattr(patches, which)[3, 1] = bad
    loss, _ = method.loss(methods.Outputs(torch.randn(8, 32), torch.randn(8, 32), patches=patches), None, 0.0)
    assert not loss.isfinite()


def test_what_does_not_fit_is_named():
    on = ["method.name=ibot", "augment.size=32", "train.global_batch=16"]
    with pytest.raises(
        ConfigError, match=r"method.name=ibot: it hides patches, and model.backbone=test_resnet has none"
    ):
        consequences(load(None, on), 1)
    vit = [*on, "model.backbone=test_vit"]
    with pytest.raises(ConfigError, match="norm=batch: the head sees images and patches"):
        load(None, [*vit, "method.norm=batch"])
    with pytest.raises(ConfigError, match=r"min_masked=0\.6 is above max_masked=0\.5"):
        load(None, [*vit, "method.min_masked=0.6"])
    assert "negatives: none" in consequences(load(None, [*vit, "model.args={img_size: 32, patch_size: 8}"]), 1)
