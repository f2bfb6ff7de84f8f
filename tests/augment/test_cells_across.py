"""Views take surroundings and stain of a bank, of other laboratories first, whatever the batch and the rank."""

import pytest
import torch
from cells_drawn import stained
from gloo import launched, on_ranks
from PIL import Image
from safetensors.torch import load_file
from test_train import NO_BATCHNORM, TINY, Killed, killed_after, tiny, untimed
from torch import Tensor

from sslcells import inputs
from sslcells.augment import Augment, Bank, cells_across
from sslcells.augment._draws import Draws
from sslcells.augment._others import Others, amount, shown
from sslcells.config import Standardise, load
from sslcells.data import ImageSet
from sslcells.standardise import Standard, fit
from sslcells.train import train

PARTS = "background", "stain_mix", "density", "gamma", "mix", "sharpness", "zoom", "blur"
OFF = dict.fromkeys(PARTS, 0)


def cells(count=6, **options):
    kinds = [
        stained(size=48, x=22 + i % 5, y=26 - i % 4, nucleus=5 + i % 3, cell=9 + i % 3, **options) for i in range(count)
    ]
    return torch.stack([(image * 255).round().byte() for image, *_ in kinds])


def made(labs=(0, 0, 0, 0), standard=None, planes=3, **options):
    standard = standard or Standard(Standardise(stain="giemsa" if planes == 3 else "dark").model_dump())
    bank = Bank(cells(len(labs), density=0.6)[:, :1].expand(-1, planes, -1, -1), torch.tensor(labs), standard)
    return Augment(cells_across.Config(size=32, **options), (0.5,), (0.25,), standard=standard, bank=bank)


def others(x, bank, standard, lab=None):
    cell = standard.found(x, cell=True).cell
    return Others(cell, torch.zeros(len(x), dtype=torch.int64) if lab is None else lab, bank)


@pytest.mark.parametrize("planes", [1, 2, 3, 5])
def test_shape_range_and_that_every_view_has_its_own(planes):
    same = cells(1)[:, :1].expand(4, planes, -1, -1)
    x = made(planes=planes)(same, torch.arange(4), seed=0, step=0, views=2)
    assert x.shape == (8, planes, 32, 32)
    assert x.min() >= -2.0001
    assert x.max() <= 2.0001
    distance = torch.cdist(x.flatten(1), x.flatten(1)) + torch.eye(8) * 1e9
    assert distance.min() > 0.1


def test_replay_is_exact_and_free_of_the_batch():
    standard = Standard(fit(Standardise(colour="two_point", scale="nucleus", centre=True), cells().float() / 255))
    make, images, lab = (
        made((1, 2, 2, 3), standard),
        torch.tensor([4, 99, 7, 0, 3, 8]),
        torch.tensor([1, 2, 3, 0, 2, 1]),
    )
    key = {"seed": 3, "step": 5, "views": 2}
    whole = make(cells(), images, lab=lab, **key).unflatten(0, (2, 6))
    part = make(cells()[2:4], images[2:4], lab=lab[2:4], **key).unflatten(0, (2, 2))
    torch.testing.assert_close(whole[:, 2:4], part, rtol=0, atol=1e-5)
    assert torch.equal(make(cells(), images, lab=lab, **key).unflatten(0, (2, 6)), whole)


def test_a_strength_of_zero_changes_nothing():
    x, standard = cells().float() / 255, Standard(Standardise().model_dump())
    bank = Bank(cells(3, density=1.8), torch.zeros(3, dtype=torch.int64), standard)
    config, draws = cells_across.Config(**OFF), Draws(0, 0, torch.arange(6), 1)
    rows = others(x, bank, standard)
    found = amount(x, bright=False)
    assert torch.equal(cells_across.surrounded(config, x, draws, rows), x)
    for same in (
        cells_across.stained(config, found, draws, rows),
        cells_across.dense(config, found, draws, bright=False),
        cells_across.dense(config, found, draws, bright=True),
    ):
        torch.testing.assert_close(same, found, rtol=0, atol=2e-4)


@pytest.mark.parametrize("part", ["density", "gamma", "mix"])
def test_each_part_changes_densities_by_at_most_its_strength(part):
    found = amount(cells().float() / 255, bright=False)
    draws = Draws(0, 0, torch.arange(6), 1)
    changed = cells_across.dense(cells_across.Config(**OFF | {part: 0.2}), found, draws, bright=False)
    assert (changed - found).abs().mean() > 0.003
    most = found.clamp_min(1e-4)
    bounds = {"density": 0.2 * most, "gamma": (most ** (0.8) - most).abs().maximum((most**1.25 - most).abs())}
    if part in bounds:
        assert ((changed - found).abs() <= bounds[part] + 2e-4).all()
    if part == "gamma":  # a power for each channel: what a channel has most of keeps its order
        assert not torch.allclose(changed[:, 0] / most[:, 0], changed[:, 1] / most[:, 1], atol=0.02)


def test_only_what_surrounds_the_cell_comes_from_another_image():
    x, standard = cells().float() / 255, Standard(Standardise().model_dump())
    bank = Bank(cells(3, lamp=(0.3, 0.9, 0.3), neighbours=False), torch.zeros(3, dtype=torch.int64), standard)
    config, with_others = cells_across.Config(background=1), others(x, bank, standard)
    y = cells_across.surrounded(config, x, Draws(0, 0, torch.arange(6), 1), with_others)
    inside = with_others.cell == 1
    assert (y - x)[inside.expand_as(x)].abs().max() == 0
    outside = (with_others.cell == 0).expand_as(x)
    green = torch.tensor([0.3, 0.9, 0.3])[:, None, None].expand_as(x)
    assert (y - green)[outside].abs().mean() < 0.02  # of the bank's images, without their cell
    assert torch.equal(
        cells_across.surrounded(cells_across.Config(background=0), x, Draws(0, 0, torch.arange(6), 1), with_others), x
    )


def test_stain_moves_towards_another_cells():
    x, standard = cells().float() / 255, Standard(Standardise().model_dump())
    bank = Bank(cells(3, density=1.8), torch.zeros(3, dtype=torch.int64), standard)
    config = cells_across.Config(stain_mix=1)
    found = amount(x, bright=False)
    y = shown(cells_across.stained(config, found, Draws(0, 0, torch.arange(6), 1), others(x, bank, standard)), False)
    change = (y - x).flatten(1).sum(1)
    assert (change < 0).all()  # darker
    assert change.min() < 3 * change.max()  # by parts that differ
    white = (x > 0.99).all(1, keepdim=True).expand_as(x)
    assert (y - x)[white].abs().max() < 0.02  # what has no stain gets none


def test_partners_are_of_other_laboratories_first():
    bank = made((1, 1, 2, 3))._bank
    luck = torch.linspace(0, 0.999, 40)
    for lab, wanted in ((1, {2, 3}), (2, {0, 1, 3}), (9, {0, 1, 2, 3}), (0, {0, 1, 2, 3})):
        assert set(bank.drawn(torch.full((40,), lab), luck).tolist()) == wanted
    alone = made((1, 1))._bank
    assert set(alone.drawn(torch.ones(40, dtype=torch.int64), luck).tolist()) == {0, 1}


class Labelled(ImageSet):
    """Images of laboratories in very unequal parts."""

    def __init__(self, labs: list[int]) -> None:
        self.labs = torch.tensor(labs)
        self.labels = self.sources = torch.arange(len(labs))

    def pixels(self, index: int) -> Tensor:
        return torch.full((3, 8, 8), index, dtype=torch.uint8)

    def name(self, index: int) -> str:
        return str(index)


def test_the_bank_has_all_laboratories_in_equal_parts():
    pixels, lab = inputs.in_equal_parts(Labelled([1] * 90 + [2] * 6 + [3] * 2), 12, seed=0)
    assert torch.bincount(lab).tolist() == [0, 5, 5, 2]
    assert len(pixels.flatten(1).unique(dim=0)) == 12
    assert torch.equal(inputs.in_equal_parts(Labelled([1] * 90 + [2] * 6 + [3] * 2), 12, seed=0)[1], lab)


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(tmp_path):
    changes = [
        "augment.recipe=cells_across",
        "augment.bank=16",
        "standardise.colour=three_point",
        "standardise.channels=red_green",
        "standardise.centre=true",
        "standardise.size=24",
    ]
    whole = train(tiny(tmp_path / "whole", *changes))
    with pytest.raises(Killed):
        train(tiny(tmp_path / "again", *changes), killed_after(6))
    again = train(tiny(tmp_path / "again", *changes))
    assert untimed(again) == untimed(whole)
    ours, theirs = (load_file(f / "encoder.safetensors") for f in (whole, again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_recipe_is_read():
    run = load("cells_across_pbc96", ["data.path=x"])
    assert run.augment.of_others
    assert run.standardise.active


def of_two_laboratories(root):
    """Folders LAB/CLASS of cells of two laboratories that stain otherwise."""
    for lab, look in (("north", {"density": 0.7}), ("south", {"density": 1.3, "lamp": (0.8, 0.9, 0.9)})):
        for i, pixels in enumerate(cells(20, **look)):
            below = root / "train" / lab / ("even", "odd")[i % 2]
            below.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(below / f"{i}.png")
    return root


def trained_across(path, folder, *changes):
    kept = [word for word in TINY if not word.startswith("data.")]
    data = ["data.kind=folder", f"data.path={path}", "data.lab_folder=above", "evaluate.pictures=false"]
    recipe = ["augment.recipe=cells_across", "augment.bank=8", "standardise.colour=two_point", "standardise.by=lab"]
    few = ["optim.name=sgd", "train.total_steps=3", "train.device=cpu", "evaluate.every_epochs=100"]
    done = train(load(None, [*kept, *data, *NO_BATCHNORM, *recipe, *few, f"out={folder}", *changes]))
    return load_file(done / "encoder.safetensors")


def trained_on_a_rank(path, folder):
    with launched():
        return trained_across(path, folder)


@pytest.mark.slow
def test_two_ranks_and_micro_batches_learn_what_one_process_learns(tmp_path):
    """By laboratory, with partners of other laboratories: nothing of a view depends on the rank or the micro-batch."""
    path = of_two_laboratories(tmp_path / "cells")
    whole = trained_across(path, tmp_path / "one")
    parts = trained_across(path, tmp_path / "micro", "train.micro_batch=4")
    first, second = on_ranks(2, trained_on_a_rank, path, tmp_path / "two")
    for key, weight in whole.items():
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
        torch.testing.assert_close(first[key], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts[key], weight, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(parts[key], whole[key]) for key in whole), "the two were not computed apart"
