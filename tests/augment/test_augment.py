"""The recipes: every view its own, replayable, true to the geometry and colours that they claim to change."""

import math

import pytest
import torch
from kornia.augmentation import AugmentationSequential, RandomHorizontalFlip
from kornia.enhance import adjust_hue
from torch.nn import functional
from torchvision.transforms import RandomResizedCrop

from sslcells.augment import Augment, StainJitter, _crops, cells, channels, none, resized, simclr
from sslcells.augment import _operations as op
from sslcells.augment._draws import Draws
from sslcells.augment._stain import STAINS, stain_jitter
from sslcells.config import ConfigError

RECIPES = {"simclr": simclr, "cells": cells, "channels": channels, "none": none}


def pixels(count=6, planes=3, size=40):
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (count, planes, 8, 8), generator=generator, dtype=torch.uint8).float()
    return torch.nn.functional.interpolate(small, (size, size), mode="bilinear").byte()


def augment(recipe, size=32, **options):
    return Augment(RECIPES[recipe].Config(size=size, **options), (0.5,), (0.25,))


@pytest.mark.parametrize("planes", [1, 2, 3, 5])
@pytest.mark.parametrize("recipe", RECIPES)
def test_shape_range_and_dtype(recipe, planes):
    x = augment(recipe)(pixels(planes=planes), torch.arange(6), seed=0, step=0, views=2)
    assert x.shape == (12, planes, 32, 32)
    assert x.dtype == torch.float32
    assert x.min() >= -2.0001
    assert x.max() <= 2.0001


@pytest.mark.parametrize("recipe", ["simclr", "cells", "channels"])
def test_every_image_and_view_has_its_own(recipe):
    same = pixels(1).expand(8, -1, -1, -1)
    x = augment(recipe)(same, torch.arange(8), seed=0, step=0, views=2).flatten(1)
    distance = torch.cdist(x, x) + torch.eye(16) * 1e9
    assert distance.min() > 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_replay_is_exact_and_free_of_the_batch(recipe):
    make, images = augment(recipe), torch.tensor([4, 99, 7, 0, 3, 8])
    whole = make(pixels(), images, seed=3, step=5, views=2).unflatten(0, (2, 6))
    part = make(pixels()[2:4], images[2:4], seed=3, step=5, views=2).unflatten(0, (2, 2))
    torch.testing.assert_close(whole[:, 2:4], part, rtol=0, atol=1e-5)
    again = make(pixels(), images, seed=3, step=5, views=2).unflatten(0, (2, 6))
    assert torch.equal(whole, again)
    if recipe != "none":
        other = make(pixels(), images, seed=3, step=6, views=2).unflatten(0, (2, 6))
        assert not torch.allclose(whole, other, atol=0.1)


@pytest.mark.parametrize("recipe", ["simclr", "cells", "channels"])
def test_local_views_are_small_crops_of_their_own(recipe):
    whole = augment(recipe, size=32)
    local = whole.local(16, (0.05, 0.1))
    x = local(pixels(), torch.arange(6), seed=0, step=0, views=3, first=2)
    assert x.shape == (18, 3, 16, 16)
    assert whole.config.size == 32
    all_views = local(pixels(), torch.arange(6), seed=0, step=0, views=5)
    assert torch.equal(x, all_views[12:])  # views are numbered on from those of full size


def test_a_recipe_without_crops_has_no_local_views():
    with pytest.raises(ConfigError, match=r"recipe=none: it has no crops"):
        augment("none").local(16, (0.05, 0.4))


def test_plain_resizes_and_normalises():
    x = augment("cells", size=40).plain(pixels())
    torch.testing.assert_close(x, (pixels().float() / 255 - 0.5) / 0.25)


def identity(count=1):
    return torch.zeros(count, 2), torch.ones(count, 2), torch.zeros(count), torch.zeros(count, 2, dtype=torch.bool)


def test_warp_without_change_is_the_image():
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(op.warp(x, 16, *identity(2)), x, rtol=0, atol=1e-5)


def test_warp_flips_crops_and_turns():
    x = torch.rand(1, 1, 16, 16)
    centre, half, angle, flip = identity()
    torch.testing.assert_close(op.warp(x, 16, centre, half, angle, torch.tensor([[True, False]])), x.flip(3))
    torch.testing.assert_close(op.warp(x, 16, centre, half, angle, torch.tensor([[False, True]])), x.flip(2))
    corner = op.warp(x, 8, torch.tensor([[0.5, -0.5]]), half / 2, angle, flip)
    torch.testing.assert_close(corner, x[..., :8, 8:])
    turned = op.warp(x, 16, centre, half, torch.tensor([math.pi / 2]), flip)
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), rtol=0, atol=1e-5)


def test_warp_turns_without_distortion_in_a_wide_image():
    """A disc in a 2:1 image stays a disc at any angle."""
    row, column = torch.meshgrid(torch.arange(64.0), torch.arange(128.0), indexing="ij")
    disc = ((row - 31.5) ** 2 + (column - 63.5) ** 2 < 20**2).float()[None, None]
    half = torch.tensor([[0.5, 1.0]])
    views = [op.warp(disc, 64, torch.zeros(1, 2), half, torch.tensor([a]), identity()[3]) for a in (0.0, 0.7, 1.5)]
    for view in views[1:]:
        assert (view - views[0]).abs().mean() < 0.02


def views_of(x, size, turn=0.0, half=(1.0, 1.0), warp=op.warp):
    count = len(x)
    flip = torch.zeros(count, 2, dtype=torch.bool)
    return warp(x, size, torch.zeros(count, 2), torch.tensor(half).expand(count, 2), torch.full((count,), turn), flip)


@pytest.mark.parametrize("turn", [0.0, 0.6, math.pi / 4])
@pytest.mark.parametrize("pixels", [33, 34, 37, 41, 45, 53, 61, 66, 75, 85, 103, 127, 131, 190, 263])
def test_a_crop_that_shrinks_keeps_as_much_noise_as_the_image_resized(pixels, turn):
    """White noise at scales 1.03 to 8.2; one bilinear sample keeps up to 66 times as much."""
    x = torch.rand(64, 1, pixels, pixels, generator=torch.Generator().manual_seed(pixels))
    # Not all of them centred: at 45° and scale √2 every sample would fall on the middle of a pixel.
    centre = torch.rand(64, 2, generator=torch.Generator().manual_seed(0)) / pixels
    whole, upright = torch.ones(64, 2), torch.zeros(64, 2, dtype=torch.bool)
    kept = op.warp(x, 32, centre, whole, torch.full((64,), turn), upright).var() / resized(x, 32).var()
    assert kept == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize(("height", "width"), [(24, 90), (90, 24), (48, 64), (40, 200), (30, 33)])
def test_noise_in_crops_that_shrink_unevenly(height, width):
    x = torch.rand(24, 2, height, width, generator=torch.Generator().manual_seed(width))
    want = resized(x, 32).var()
    assert views_of(x, 32).var() / want == pytest.approx(1, abs=0.06)
    if min(height, width) >= 32:  # else the turned crop magnifies along one axis, at another phase
        assert views_of(x, 32, 0.7).var() / want == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("pixels", [36, 60, 110, 200, 211, 332])
@pytest.mark.parametrize(("turn", "half"), [(0.0, (0.6, 0.6)), (0.7, (0.6, 0.6)), (0.7, (0.6, 0.2))])
def test_smoothing_moves_nothing(pixels, turn, half):
    """A slope, whose mean under anything symmetric is itself."""
    row, column = torch.meshgrid(torch.arange(float(pixels)), torch.arange(float(pixels)), indexing="ij")
    x = torch.stack([row, column])[None] / pixels
    torch.testing.assert_close(views_of(x, 24, turn, half), views_of(x, 24, turn, half, sampled), rtol=0, atol=1e-5)


def sampled(x, size, centre, half, angle, flip):
    """One bilinear sample."""
    reach, aspect = half * torch.where(flip, -1.0, 1.0), x.shape[-1] / x.shape[-2]
    cos, sin = angle.cos(), angle.sin()
    rows = [[cos * reach[:, 0], -sin * reach[:, 1] / aspect, centre[:, 0]]]
    rows.append([sin * reach[:, 0] * aspect, cos * reach[:, 1], centre[:, 1]])
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = functional.affine_grid(theta, [len(x), x.shape[1], size, size], align_corners=False)
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def test_a_crop_that_does_not_shrink_is_one_bilinear_sample():
    x = torch.rand(12, 2, 40, 30)
    centre, angle, flip = 0.3 * torch.randn(12, 2), 6 * torch.rand(12), torch.rand(12, 2) > 0.5
    half = 0.4 + 0.6 * torch.rand(12, 2)
    assert torch.equal(op.warp(x, 40, centre, half, angle, flip), sampled(x, 40, centre, half, angle, flip))
    half[::2] = 0.5  # those magnify still, among others that shrink
    out = op.warp(x, 20, centre, half, angle, flip)
    assert torch.equal(out[::2], sampled(x, 20, centre, half, angle, flip)[::2])


def test_a_view_is_the_same_alone_and_among_others():
    x = torch.rand(9, 2, 90, 120)
    half = torch.linspace(0.1, 1, 9)[:, None] * torch.tensor([1.0, 0.8])
    arguments = 0.1 * torch.randn(9, 2), half, 6 * torch.rand(9), torch.rand(9, 2) > 0.5
    whole = op.warp(x, 20, *arguments)
    for i in range(9):
        alone = op.warp(x[i : i + 1], 20, *(a[i : i + 1] for a in arguments))
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("turned", [0.0, 1.0])
def test_views_of_uint8_images_are_those_of_float_ones(turned, size, monkeypatch):
    """Converted all at once, and some at a time; three views an image, the images in turn."""
    x = torch.randint(0, 256, (5, 3, 36, 30), dtype=torch.uint8)
    draw = torch.Generator().manual_seed(0)
    half, flip = 0.3 + 0.7 * torch.rand(15, 2, generator=draw), torch.rand(15, 2, generator=draw) > 0.5
    arguments = size, 0.2 * torch.randn(15, 2, generator=draw), half, turned * torch.rand(15, generator=draw), flip
    want = op.warp((x.float() / 255).repeat(3, 1, 1, 1), *arguments)
    assert torch.equal(op.warp(x, *arguments), want)
    monkeypatch.setattr(op, "_CONVERTED", 2 * x[0].numel())
    torch.testing.assert_close(op.warp(x, *arguments), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(op.warp(x.float() / 255, *arguments), want, rtol=0, atol=1e-6)


def test_hue_turns_as_kornias():
    x = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x[:16] = (3 * x[:16]).round() / 3  # channels that are equal
    x[16:24] = x[16:24, :1]
    turn = torch.linspace(-7, 7, 64)
    torch.testing.assert_close(op.turn_hue(x, turn), adjust_hue(x, turn), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(40, 40, 32), (33, 35, 32), (64, 200, 32), (90, 120, 20), (200, 64, 24)]
)
def test_upright_crops_are_those_of_a_whole_turn(height, width, size, monkeypatch):
    """Upright crops go line by line; a turn of 2π, which float32 does not hold exactly, goes the general way."""
    monkeypatch.setattr(op, "_FINER", math.inf)
    draw = torch.Generator().manual_seed(width)
    x, centre = torch.rand(8, 2, height, width, generator=draw), 0.4 * torch.randn(8, 2, generator=draw)
    half = torch.linspace(0.15, 1.2, 8)[:, None] * (0.4 + 0.6 * torch.rand(8, 2, generator=draw))
    flip, none = torch.rand(8, 2, generator=draw) > 0.5, torch.zeros(8)
    upright = op.warp(x, size, centre, half, none, flip)
    torch.testing.assert_close(upright, op.warp(x, size, centre, half, none + 2 * math.pi, flip), rtol=0, atol=1e-4)
    for i in range(8):
        one = slice(i, i + 1)
        assert torch.equal(op.warp(x[one], size, centre[one], half[one], none[one], flip[one]), upright[one])


@pytest.mark.parametrize("pixels", [150, 203, 340])
def test_crops_of_the_means_of_squares_are_those_of_the_pixels(pixels, monkeypatch):
    """Of smooth images, at scales 3.8 to 14; sides that the squares do not fill among them."""
    draw = torch.Generator().manual_seed(pixels)
    x = functional.interpolate(torch.rand(6, 2, 9, 9, generator=draw), (pixels, pixels - 1), mode="bicubic")
    half, centre = 0.6 + 0.4 * torch.rand(6, 1, generator=draw).expand(6, 2), 0.1 * torch.randn(6, 2, generator=draw)
    arguments = x, 24, centre, half, 6 * torch.rand(6, generator=draw), torch.rand(6, 2, generator=draw) > 0.5
    views = op.warp(*arguments)
    monkeypatch.setattr(op, "_FINER", math.inf)
    of_pixels = op.warp(*arguments)
    assert not torch.equal(views, of_pixels)
    assert (views - of_pixels).std() < 0.02 * of_pixels.std()


def assert_torchvisions_crops(height, width, scale, theirs, apart):
    """Area, ratio and place of 10⁵ crops, by the largest distance of their distributions (Kolmogorov and Smirnov's)."""
    config = simclr.Config(min_scale=scale[0], max_scale=scale[1])
    ours = _crops.random_resized_crop(config, height, width, Draws(0, 0, torch.arange(100_000), 1)).double()
    torch.manual_seed(0)
    drawn = [
        RandomResizedCrop.get_params(torch.zeros(1, height, width), [*scale], [3 / 4, 4 / 3]) for _ in range(theirs)
    ]
    peers = torch.tensor(drawn).double()[:, [1, 0, 3, 2]]
    for name, of in {
        "area": lambda c: c[:, 2] * c[:, 3],
        "ratio": lambda c: c[:, 2] / c[:, 3],
        "left": lambda c: c[:, 0],
        "top": lambda c: c[:, 1],
        "middle": lambda c: 2 * c[:, 0] + c[:, 2],
    }.items():
        a, b = (of(c).sort().values for c in (ours, peers))
        below = [torch.searchsorted(c, torch.cat([a, b]), right=True) / len(c) for c in (a, b)]
        assert (below[0] - below[1]).abs().max() < apart, name


@pytest.mark.parametrize(("height", "width", "scale"), [(64, 64, (0.08, 1.0)), (40, 200, (0.08, 1.0))])
def test_simclr_crops_as_torchvision_does(height, width, scale):
    assert_torchvisions_crops(height, width, scale, 10_000, 0.025)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.4), (1.0, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 200), (200, 40), (28, 28), (48, 64)])
def test_simclr_crops_as_torchvision_does_in_any_shape(height, width, scale):
    assert_torchvisions_crops(height, width, scale, 100_000, 0.012)


class Largest(Draws):
    """Every number the largest that may be drawn."""

    def uniform(self, low=0.0, high=1.0):
        return torch.full((len(self),), float(high))

    def chance(self, probability):
        return torch.full((len(self),), probability > 0)


@pytest.mark.parametrize("size", [8, 28, 48, 96, 224])
@pytest.mark.parametrize(("recipe", "largest"), [("simclr", 2 / 224), ("cells", 0.02), ("channels", 0.02)])
def test_the_largest_blur_is_as_wide_as_it_says(recipe, largest, size):
    """The standard deviation that a point is spread to, and the share of it that stays where it was."""
    want = size * largest if recipe == "simclr" else max(0.6, size * largest)
    at = torch.arange(-30.0, 31, dtype=torch.float64)
    weight = (-(at**2) / (2 * want**2)).exp()
    weight /= weight.sum()
    config = RECIPES[recipe].Config(size=size)
    x = torch.zeros(2, 1, size, size)
    x[..., size // 2, size // 2] = 1
    line = (simclr if recipe == "simclr" else _crops).blurred(config, x, Largest(0, 0, torch.arange(2), 1))[0, 0].sum(0)
    place = torch.arange(float(size)) - size // 2
    assert line.sum() == pytest.approx(1, abs=1e-5)
    std = (line * place.square()).sum().sqrt().item()
    assert std == pytest.approx((weight * at.square()).sum().sqrt().item(), rel=0.02, abs=1e-3)
    if want >= 0.6:
        assert std == pytest.approx(want, rel=0.03)


def test_colour_jitter_takes_each_rows_own_order():
    x = torch.rand(24, 3, 4, 4)
    order = torch.tensor(
        [[a, b, c, 6 - a - b - c] for a in range(4) for b in range(4) for c in range(4) if len({a, b, c}) == 3]
    )
    factors = [torch.full((24,), v) for v in (1.2, 0.7, 1.3, 0.4)]
    together = op.colour_jitter(x, torch.ones(24, dtype=torch.bool), order, factors)
    for i in range(24):
        alone = op.colour_jitter(
            x[i : i + 1], torch.ones(1, dtype=torch.bool), order[i : i + 1], [f[:1] for f in factors]
        )
        torch.testing.assert_close(together[i : i + 1], alone)
    assert (
        together[0] - op.colour_jitter(x, torch.ones(24, dtype=torch.bool), order[[23]].expand(24, 4), factors)[0]
    ).abs().max() > 0.01


def test_linear_colour_is_near_the_conversion_to_hsv():
    x = torch.rand(8, 3, 16, 16) * 0.4 + 0.3
    one = torch.ones(8)
    torch.testing.assert_close(op.linear_colour(x, one, one, one, one * 0), x, rtol=0, atol=2e-3)
    grey = op.linear_colour(x, one, one, one * 0, one * 0)
    assert grey.std(1).max() < 2e-3
    torch.testing.assert_close(op.linear_colour(x, one * 1.2, one, one, one * 0), x * 1.2, rtol=0, atol=2e-3)
    red = torch.tensor([0.8, 0.3, 0.3])[None, :, None, None].expand(1, 3, 2, 2)
    ours = op.linear_colour(red, one[:1], one[:1], one[:1], torch.tensor([0.5]))[0, :, 0, 0]
    theirs = adjust_hue(red, torch.tensor([0.5]))[0, :, 0, 0]
    assert torch.dot(ours - ours.mean(), theirs - theirs.mean()) > 0
    assert torch.equal(ours.argsort(), theirs.argsort())


@pytest.mark.parametrize("stain", STAINS)
def test_stain_jitter_changes_only_the_dye_it_should(stain):
    dyes = torch.nn.functional.normalize(torch.tensor(STAINS[stain]), dim=1)
    one_dye = (-0.4 * dyes[0]).exp()[None, :, None, None].expand(1, 3, 4, 4)
    kept = stain_jitter(one_dye, stain, torch.tensor([[1.0, 1.7, 0.3]]), torch.zeros(1, 3))
    torch.testing.assert_close(kept, one_dye, rtol=0, atol=1e-4)
    doubled = stain_jitter(one_dye, stain, torch.tensor([[2.0, 1.0, 1.0]]), torch.zeros(1, 3))
    torch.testing.assert_close(doubled, one_dye**2, rtol=0, atol=1e-4)


def test_stain_jitter_among_kornias_augmentations():
    x = torch.rand(64, 3, 6, 6).mul(0.8).add(0.1)
    both = AugmentationSequential(RandomHorizontalFlip(p=1.0), StainJitter("haematoxylin-eosin", p=1.0))
    out = both(x)
    assert out.shape == x.shape
    assert ((out >= 0) & (out <= 1)).all()
    torch.testing.assert_close(both(x, params=both._params), out)
    half = StainJitter(p=0.5)
    kept = (half(x) == x).flatten(1).all(1)
    assert 10 < kept.sum() < 54
    drawn = StainJitter(strength=0.5, base=0.1).generate_parameters((4000, 3, 6, 6))
    for values, low, high in ((drawn["amount"], 0.5, 1.5), (drawn["base"], -0.1, 0.1)):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high >= values.max() > high - 0.01 * (high - low)
    same = StainJitter(same_on_batch=True).generate_parameters((5, 3, 6, 6))["amount"]
    assert torch.equal(same, same[:1].expand(5, 3))
    none = StainJitter(strength=0, base=0)(x)
    torch.testing.assert_close(none, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stain": "eosin"}, "choose from: haematoxylin-eosin, giemsa"),
        ({"strength": 1.5}, r"strength=1\.5"),
        ({"base": -1}, "base=-1"),
    ],
)
def test_stain_jitter_says_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        StainJitter(**options)
    with pytest.raises(ValueError, match="these images have 4"):
        StainJitter()(torch.rand(2, 4, 6, 6))


def test_channels_are_jittered_each_on_its_own():
    x = torch.rand(2, 4, 3, 3)
    gain, offset, gamma = torch.rand(3, 2, 4)
    out = channels.channel_jitter(x, gain, offset, gamma)
    for i in range(2):
        for c in range(4):
            torch.testing.assert_close(out[i, c], (gain[i, c] * x[i, c] ** gamma[i, c] + offset[i, c]).clamp(0, 1))


def test_some_channels_are_dropped_never_all():
    make = augment("channels", drop=0.6, blur=0, offset=0)
    images = torch.full((64, 3, 40, 40), 200, dtype=torch.uint8)
    x = make(images, torch.arange(64), seed=0, step=0, views=2)
    black = (x == x.new_tensor(-2.0)).flatten(2).all(2)  # (V·B, C): of pixels 0, normalised
    assert not black.all(1).any()
    assert 0.4 < black.float().mean() < 0.6  # less than 0.6, as one always stays
    assert not (augment("channels", drop=0, offset=0)(images, torch.arange(64), seed=0, step=0, views=1) == -2).any()


def test_on_some_leaves_the_others():
    x = torch.rand(4, 1, 2, 2)
    chosen = torch.tensor([True, False, True, False])
    out = op.on_some(x, chosen, lambda y, f: y * f[:, None, None, None], torch.tensor([2.0, 3, 4, 5]))
    torch.testing.assert_close(out, x * torch.tensor([2.0, 1, 4, 1])[:, None, None, None])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_views_on_a_gpu(recipe):
    args = torch.arange(6), 0, 0, 2
    here, there = (augment(recipe)(pixels().to(d), args[0], seed=0, step=0, views=2).cpu() for d in ("cpu", "cuda"))
    torch.testing.assert_close(here, there, rtol=0, atol=2e-3)
