"""The cell is found where it was drawn, by thresholds that equal Otsu's, in the component that scipy labels."""

from itertools import pairwise

import pytest
import torch
from cells_drawn import disc, stained
from scipy import ndimage
from torch.nn import functional

from sslcells.standardise import cell as module
from sslcells.standardise.cell import (
    LEVELS,
    around,
    background_of,
    central,
    find,
    grown,
    middle,
    packed,
    reduced,
    three_classes,
    two_classes,
    unpacked,
)


def found(x, stain="giemsa"):
    small = reduced(x[None] if x.ndim == 3 else x)
    return find(small, background_of(small, stain), stain)


def overlap(found, drawn):
    drawn = reduced(drawn[None, None].float())[0, 0] >= 0.5
    return ((found & drawn).sum() / (found | drawn).sum()).item()


@pytest.mark.parametrize(("x", "y", "nucleus", "outline"), [(48, 48, 12, 20), (40, 58, 9, 15), (52, 44, 16, 19)])
def test_nucleus_and_cell_are_where_they_were_drawn(x, y, nucleus, outline):
    image, core, inside = stained(x=x, y=y, nucleus=nucleus, cell=outline)
    at = found(image)
    assert at.found.all()
    assert overlap(at.nucleus[0], core) > 0.85
    assert overlap(at.cell[0], inside) > 0.8
    torch.testing.assert_close(at.centre[0], torch.tensor([x / 48 - 1, y / 48 - 1]), rtol=0, atol=0.03)
    assert at.diameter[0].item() == pytest.approx(2 * nucleus / 96, rel=0.08)


@pytest.mark.parametrize(("lamp", "density"), [((0.9, 0.8, 0.7), 1.0), ((0.75, 0.85, 0.8), 0.6), ((1, 0.9, 0.8), 1.6)])
def test_light_and_stain_do_not_move_the_masks(lamp, density):
    plain, other = (found(stained(lamp=light, density=d)[0]) for light, d in (((1.0, 1.0, 1.0), 1.0), (lamp, density)))
    for ours, theirs in zip(plain[:2], other[:2], strict=True):
        assert ((ours & theirs).sum() / (ours | theirs).sum()).item() > 0.9


def test_all_lobes_of_a_nucleus_belong_to_it_and_a_platelet_does_not():
    image, *_ = stained(nucleus=0.1, neighbours=False)
    lobes = disc(96, 40, 48, 6) | disc(96, 56, 50, 6)
    platelet = disc(96, 82, 20, 3)
    image[:, lobes | platelet] = stained()[0][:, 48, 48][:, None]
    at = found(image)
    assert overlap(at.nucleus[0], lobes) > 0.8


def test_a_platelet_in_the_middle_is_not_the_cell():
    image, core, _ = stained(x=30, y=66)
    image[:, disc(96, 50, 46, 2.5)] = image[:, 66, 30][:, None]
    assert overlap(found(image).nucleus[0], core) > 0.85
    alone = torch.ones(3, 96, 96)
    alone[:, disc(96, 50, 46, 2.5)] = image[:, 66, 30][:, None]
    assert found(alone).nucleus[0].any()


def test_red_cells_are_told_from_the_cell_and_other_nuclei():
    image, core, inside = stained()
    image[:, disc(96, 84, 48, 6)] = image[:, 48, 48][:, None]
    red = found(image).red[0]
    assert 200 < red.sum() < 300
    assert not (red & (reduced((core | inside | disc(96, 84, 48, 6))[None, None].float())[0, 0] > 0.5)).any()


def test_the_median_inside_a_mask():
    torch.manual_seed(0)
    values, mask = torch.rand(2, 3, 500), torch.rand(2, 500) < 0.3
    for n in range(2):
        torch.testing.assert_close(
            middle(values, mask, 1.0)[n], values[n][:, mask[n]].median(1).values, rtol=0, atol=1 / 511
        )
    assert (middle(values, mask & False, 1.0) == 0).all()


def test_a_neighbour_that_touches_the_cell_is_cut_off():
    image, _, inside = stained(neighbours=False)
    red = disc(96, 77, 48, 10) & ~inside  # touches along a few pixels
    image[:, red] = stained()[0][:, 12, 10][:, None]
    at = found(image)
    assert overlap(at.cell[0], inside) > 0.8


def test_fluorescence_is_bright_on_dark():
    _, core, inside = stained(neighbours=False)
    image = (0.05 + 0.15 * inside + 0.6 * core)[None]
    at = found(image, "bright")
    assert at.found.all()
    assert overlap(at.nucleus[0], core) > 0.85
    assert overlap(at.cell[0], inside) > 0.75


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_nothing_is_found_in_an_empty_image(value):
    at = found(torch.full((3, 40, 40), value))
    assert not at.found.any()
    assert at.cell.all()
    assert not at.nucleus.any()
    assert at.diameter.item() == 0
    assert at.centre.abs().sum() == 0


@pytest.mark.parametrize("side", [17, 48, 64, 65, 96, 130])
def test_any_size_is_reduced_to_the_grid(side):
    small = reduced(torch.rand(2, 3, side, side + 3))
    assert max(small.shape[-2:]) <= module.GRID
    assert found(torch.rand(2, 3, side, side + 3)).cell.shape == (2, *small.shape[-2:])


def variance_between(level, limits):
    """The variance between classes that are cut at these levels, in a plain loop."""
    edges, total = [-1, *limits, LEVELS], level.double().mean()
    parts = [level[(level > low) & (level <= high)].double() for low, high in pairwise(edges)]
    return sum(len(p) * (p.mean() - total).square() for p in parts if len(p))


def test_thresholds_are_otsus():
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        level = torch.randint(LEVELS, (6, 7), generator=generator)
        two, three = int(two_classes(level[None])), int(three_classes(level[None]))
        best = max(variance_between(level, [t]) for t in range(LEVELS))
        assert float(variance_between(level, [two])) == pytest.approx(float(best), rel=1e-9)
        pairs = {(a, b): float(variance_between(level, [a, b])) for a in range(LEVELS) for b in range(a, LEVELS)}
        assert max(v for (_, b), v in pairs.items() if b == three) == pytest.approx(max(pairs.values()), rel=1e-9)


@pytest.mark.parametrize("width", [5, 24, 63, 64])
def test_what_is_reached_is_scipys_component(width):
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(5, 24, width, generator=generator) < 0.55
    seed = central(mask)
    reached = unpacked(around(packed(seed), packed(mask), width, steps=300, jump=1), width)
    for i in range(5):
        labels = torch.from_numpy(ndimage.label(mask[i], structure=torch.ones(3, 3))[0])
        assert torch.equal(reached[i], torch.isin(labels, labels[seed[i]]))


@pytest.mark.parametrize("width", [5, 63, 64])
def test_masks_grow_as_scipys(width):
    mask = torch.rand(3, 9, width, generator=torch.Generator().manual_seed(2)) < 0.1
    assert torch.equal(unpacked(packed(mask), width), mask)
    for corners, shape in ((True, ndimage.generate_binary_structure(2, 2)), (False, None)):
        larger = unpacked(grown(packed(mask), width, corners), width)
        for ours, theirs in zip(larger, mask, strict=True):
            assert torch.equal(ours, torch.from_numpy(ndimage.binary_dilation(theirs, shape)))


@pytest.mark.parametrize("shape", [(64, 64), (33, 47), (64, 21)])
def test_masks_that_grow_by_pooling_are_those_that_grow_as_bits(shape):
    """ONNX is made of the first; cells where they were drawn, off the middle, in noise, and noise alone."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack(
        [stained(x=x, y=y, nucleus=n, cell=c)[0] for x, y, n, c in ((48, 48, 12, 20), (20, 70, 14, 21))]
    )
    x = functional.interpolate(drawn, shape)
    noisy = (x + 0.2 * torch.randn(x.shape, generator=g)).clamp(0, 1)
    x = torch.cat([x, noisy, torch.rand(2, 3, *shape, generator=g)])
    bits, pooled = (find(x, background_of(x, "giemsa"), "giemsa", bits=of) for of in (True, False))
    assert bits.found.any()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(bits, pooled, strict=True))
