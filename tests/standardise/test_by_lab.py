"""Input standardised by laboratory: one row for all images of a laboratory, measured without labels."""

import json

import pytest
import torch
from cells_drawn import stained
from PIL import Image
from test_train import TINY

from sslcells import inputs
from sslcells.augment import resized
from sslcells.config import ConfigError, Standardise, load
from sslcells.data import open_splits
from sslcells.standardise import Standard, fit
from sslcells.standardise.cell import at_rank

PINK, BLUE = {"lamp": (0.95, 0.85, 0.8), "density": 0.7}, {"lamp": (0.75, 0.85, 0.9), "density": 1.3}


def cells(count=6, size=48, **options):
    """Cells whose nuclei differ in size, and every second one in density."""
    density = options.pop("density", 1.0)
    drawn = [
        stained(
            size=size, x=22 + i % 4, y=24, nucleus=5 + i % 3, cell=10, density=density * (1 + 0.3 * (i % 2)), **options
        )
        for i in range(count)
    ]
    return torch.stack([image for image, *_ in drawn])


def of_labs(x, labs, **config):
    return Standard(fit(Standardise(by="lab", **config), x, {name: [images] for name, images in labs.items()}))


def rows(standard, name, count):
    return standard.row(name).expand(count, -1)


@pytest.mark.parametrize("colour", ["background", "two_point", "reinhard"])
def test_a_laboratory_is_moved_as_one_and_its_cells_keep_their_differences(colour):
    ours, theirs = cells(**PINK), cells(**BLUE)
    change = of_labs(ours, {"ours": ours, "theirs": theirs}, colour=colour)
    after = [change(x, rows(change, name, 6)) for name, x in (("ours", ours), ("theirs", theirs))]
    assert (after[0] - after[1]).abs().mean() < (ours - theirs).abs().mean() / (2 if colour == "background" else 4)
    if colour == "two_point":
        alone = change(ours)  # every nucleus at one density
        darkness = [x[:, :, 20:28, 20:26].mean((1, 2, 3)) for x in (after[0], alone)]
        assert (darkness[0][0] - darkness[0][1]) > 3 * (darkness[1][0] - darkness[1][1]).abs()


def test_percentiles_are_those_of_all_pixels_of_the_plate():
    torch.manual_seed(0)
    plate = torch.rand(6, 4, 32, 32) * torch.linspace(0.2, 0.9, 6)[:, None, None, None]
    other = plate[:, :, :20, :24] * 0.5 + 0.1
    change = of_labs(plate, {}, colour="percentiles", stain="bright")
    found = change.laboratory([plate[:2], plate[2:]])
    flat = plate.transpose(0, 1).flatten(1)
    want = torch.cat([at_rank(flat, 0.001), at_rank(flat, 0.999)])
    torch.testing.assert_close(torch.tensor(found["row"][:-1]), want)
    after = [change(x, torch.tensor(change.laboratory([x])["row"]).expand(6, -1)) for x in (plate, other)]
    brightest = after[0].flatten(1).amax(1)
    assert brightest.max() > 0.99 > 0.35 > brightest.min()  # a dim cell of the plate stays dim
    torch.testing.assert_close(after[0][:, :, :20, :24], after[1], rtol=0, atol=0.02)


def test_the_size_of_the_nucleus_is_the_laboratorys():
    small, large = cells(), torch.nn.functional.interpolate(cells(), scale_factor=1.5, mode="bilinear")
    large = large[:, :, 12:60, 12:60]
    change = of_labs(small, {"small": small, "large": large}, scale="nucleus", diameter=0.3)
    ratio = change.row("large")[-1] / change.row("small")[-1]
    assert ratio == pytest.approx(1.5, abs=0.15)
    after = change.measure(change(small, rows(change, "small", 6)))[0][:, -1]
    alone = change.measure(change(small))[0][:, -1]
    assert after.max() - after.min() > 2 * (alone.max() - alone.min())  # cells keep their sizes


def test_an_image_without_a_laboratory_is_standardised_by_itself():
    x = cells(**PINK)
    change = of_labs(x, {"ours": x}, colour="two_point")
    mixed = rows(change, "ours", 6).clone()
    mixed[3:] = torch.nan
    assert torch.equal(change(x, mixed)[3:], change(x)[3:])
    assert torch.equal(change(x, mixed)[:3], change(x, rows(change, "ours", 6))[:3])
    with pytest.raises(ValueError, match=r"laboratory 'theirs' was not measured: known are ours"):
        change.row("theirs")


LABS = {"north": PINK, "south": BLUE, "west": {"lamp": (0.9, 0.8, 0.9)}}


def write(root, splits):
    """Folders SPLIT/LAB/CLASS of images of laboratories."""
    for split, labs in splits.items():
        for lab in labs:
            for i, x in enumerate(cells(6, **LABS[lab])):
                below = root / split / lab / ("even", "odd")[i % 2]
                below.mkdir(parents=True, exist_ok=True)
                pixels = (x * 255).round().byte().permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(below / f"{i}.png")
    return root


def run_on(path, folder, *changes):
    kept = [word for word in TINY if not word.startswith("data.")]
    data = ["data.kind=folder", f"data.path={path}", "data.lab_folder=above", "train.global_batch=8"]
    return load(None, [*kept, *data, "standardise.by=lab", "standardise.colour=two_point", f"out={folder}", *changes])


def test_laboratories_are_measured_in_train_and_val_and_test_ones_when_they_are_asked(tmp_path):
    path = write(tmp_path / "cells", {"train": ["north"], "val": ["north", "south"], "test": ["west", "south"]})
    run = run_on(path, tmp_path)
    splits = open_splits(run.data)
    spec = inputs.measured(run, splits)
    assert list(spec["labs"]) == ["north", "south"]
    assert {lab["measured"] for lab in spec["labs"].values()} == {12, 6}
    standard = Standard(json.loads(json.dumps(spec)))
    said = "by laboratory; no nucleus found in 0 of 6 images of train; of each laboratory: north 0 of 12, south 0 of 6"
    assert said in inputs.summary(standard)
    in_training = inputs.lab_rows(standard, inputs.in_training(splits), {})
    assert in_training.said == []
    assert in_training.rows.isnan().all(1).tolist() == [True, False, False, True]
    asked = inputs.lab_rows(standard, splits, {"new": [splits["test"]]})
    assert asked.rows.isnan().all(1).tolist() == [True, False, False, False, False]
    assert asked.said[0] == "west: standardised by 6 of its own images, without labels"
    assert torch.equal(asked.rows[:3].nan_to_num(), in_training.rows[:3].nan_to_num())
    augment = inputs.augment(run, splits, standard, asked.rows)
    x = torch.stack([splits["test"].pixels(i) for i in range(12)])
    labs = splits["test"].labs
    by_hand = torch.cat([standard(x[i : i + 1].float() / 255, asked.rows[labs[i]][None]) for i in range(12)])
    plain = augment.plain(x, labs)
    torch.testing.assert_close(plain, (resized(by_hand, 32) - 0.5) / 0.25, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, augment.plain(x))


def test_data_that_names_no_laboratory_is_refused(tmp_path):
    write(tmp_path / "cells", {"train": ["north"]})
    run = run_on(tmp_path / "cells" / "train" / "north", tmp_path, "data.lab_folder=none")
    with pytest.raises(
        ConfigError, match=r"standardise\.by=lab needs laboratories, and the data names none: data\.site"
    ):
        inputs.measured(run, open_splits(run.data))
    with pytest.raises(ConfigError, match=r"by=lab: nothing is measured of a laboratory; set colour"):
        run_on(tmp_path, tmp_path, "standardise.colour=none")
