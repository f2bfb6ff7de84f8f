"""The description of a folder by `--check` reveals the mistakes in it."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchvision import datasets

from sslcells.data import folder, medmnist, open_splits, synthetic, table, torchvision
from sslcells.data.describe import brief, describe
from sslcells.data.subset import labelled_part


def image(file: Path, size=(8, 6), grey=9, mode="RGB", **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, grey).save(file, **options)


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A folder with most of the mistakes that folders have."""
    for i in range(3):
        image(tmp_path / f"Train/a/slide1_{i}.png")
    image(tmp_path / "Train/b/slide2_0.jpg", size=(40, 20))
    image(tmp_path / "Train/b/none.tif", mode="I;16", grey=4000)
    image(tmp_path / "Train/loose.png")
    image(tmp_path / "TEST/a/slide9_1.png")
    image(tmp_path / "TEST_SIMPLE/a/1.png")
    tifffile.imwrite(
        tmp_path / "Train/a/slide1_stack.tif", np.full((5, 6, 8), 300, np.uint16), photometric="minisblack"
    )
    for name in ("Train/a/Thumbs.db", "Train/a/.hidden.png", "Train/b/mask.npy", "Train/b/mask2.npy", "labels.csv"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "Train/c").mkdir()
    (tmp_path / "Train/gone").symlink_to("nowhere")
    (tmp_path / "Train/b/cut.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("verify", ["full", "header", "none"])
def test_a_folder_with_mistakes(messy, verify):
    config = folder.Config(
        path=str(messy), size=8, verify=verify, on_error="skip", source_pattern=r"(slide\d)_", test="TEST"
    )
    if verify == "none":
        (messy / "Train/b/cut.png").unlink()
    text = describe(open_splits(config))
    train, test = text.split("\n  test: ")
    for words in (
        f"train: 7 images of {messy}/Train, by its name",
        "2 classes: a 4, b 2; 1 image without one: Train/loose.png",
        "sources: 5 images of 2 sources, such as Train/a/slide1_0.png; 2 without one: Train/b/none.tif, Train/loose",
        "PNG RGB 8 bit 4 (such as Train/a/slide1_0.png)",
        "JPEG RGB 8 bit 1 (such as Train/b/slide2_0.jpg)",
        "TIFF grey 16 bit 2 (such as Train/a/slide1_stack.tif)",
        "sizes (height × width): 6×8 (Train/a/slide1_0.png) to 20×40 (Train/b/slide2_0.jpg); most common 6×8, 6 times",
        "several pages or frames, only the first is used: 1 file, such as Train/a/slide1_stack.tif with 5",
        "uint8 5",
        "uint16 2",
        "to 4000",
        ".npy: 2, such as Train/b/mask.npy",
        ".db: 1, such as Train/a/Thumbs.db",
        "hidden: 1, such as Train/a/.hidden.png",
        "broken links: 1, such as Train/gone",
        "folders beside the splits: 1, such as TEST_SIMPLE",
        "other files beside the splits: 1, such as labels.csv",
        "read as: 3 channels of 8×8 px",
        *(["broken, left out: 1 image: Train/b/cut.png: empty file"] if verify != "none" else []),
    ):
        assert words in train, words
    assert test.startswith(f"1 image of {messy}/TEST, as data.test says")
    assert ("all read" if verify != "none" else "7 of them read") in train


def test_in_short(messy):
    splits = open_splits(folder.Config(path=str(messy), size=8, on_error="skip"))
    assert brief(splits).startswith("data: train 7, 2 classes (1 of 7 images without: Train/loose.png), sources ")
    assert "2 × .npy" in brief(splits)
    assert "1 × broken" in brief(splits)
    assert "; test 1, 2 classes, sources" in brief(splits)
    assert "\n" not in brief(splits)


def test_a_table_of_sources_that_lists_a_part_is_said(tmp_path):
    for i in range(16):
        image(tmp_path / f"{i:02}.png")
    rows = [f"{i:02}.png,s{i // 3}" for i in range(9)]
    (tmp_path / "s.csv").write_text("\n".join(["path,source", *rows]))
    splits = open_splits(folder.Config(path=str(tmp_path), sources="s.csv"))
    named = "09.png, 10.png, 11.png, 12.png, 13.png, …"
    assert f"train 16, no labels, 3 sources (7 of 16 images without: {named})" in brief(splits)
    assert f"sources: 9 images of 3 sources, such as 00.png; 7 without one: {named}" in describe(splits)


def test_a_part_says_what_the_whole_does(messy):
    splits = open_splits(folder.Config(path=str(messy), size=8, on_error="skip", source_pattern=r"(slide\d)_"))
    part = labelled_part(splits["train"], 0.5, 0)
    text = describe({"train": part})
    assert "several pages" in text
    assert "values (" in text


def test_a_large_split_is_sampled(tmp_path, monkeypatch):
    config = synthetic.Config(size=16, train=3000, val=0, test=0)
    splits, asked = open_splits(config), []
    pixels = synthetic.Smears.pixels
    monkeypatch.setattr(synthetic.Smears, "pixels", lambda self, i: asked.append(i) or pixels(self, i))
    text = describe(splits)
    assert len(set(asked)) <= 17
    assert {0, 2999} <= set(asked)  # the ends too
    assert "5 classes: neutrophil 600" in text
    assert "no data of yours" in text


def test_several_labels_an_image_and_arrays(tmp_path):
    file = tmp_path / "x.npz"
    arrays = {"train_images": np.zeros((4, 9, 9), np.uint8), "train_labels": np.array([[0, 1], [0, 0], [1, 1], [0, 1]])}
    np.savez(file, **arrays)
    text = describe(open_splits(medmnist.Config(path=str(file))))
    assert "labels: several per image, 2 classes: 0 1, 1 3; 1 image without any: x.npz train_images[1]" in text
    assert f"train: 4 images of {file}, train_images" in text
    assert "uint8, 0 to 0; 4 images with only one value" in text
    assert "1 channel of 9×9 px" in text


def test_many_classes_are_cut_short(tmp_path):
    np.savez(
        tmp_path / "x.npz",
        train_images=np.zeros((500, 8, 8), np.uint8),
        train_labels=np.concatenate([np.arange(200), np.full(300, 7)])[:, None],
    )
    text = describe(open_splits(medmnist.Config(path=str(tmp_path / "x.npz"))))
    assert "200 classes: 7 301, " in text
    assert ", …, " in text
    assert max(map(len, text.splitlines())) < 1000


def test_the_numbers_of_a_stack(tmp_path):
    values = np.full((2, 8, 9), 7, np.float32)
    values[1, 0] = np.nan
    tifffile.imwrite(tmp_path / "1.tif", values)
    text = describe(open_splits(folder.Config(path=str(tmp_path), stack="first", channels=2, size=8)))
    assert "float32, 7 to 7; 1 image with only one value; 1 image with NaN or infinite values" in text
    assert torch.equal(
        open_splits(folder.Config(path=str(tmp_path), stack="first", channels=2))["train"].labels, torch.tensor([-1])
    )


def stl10(folder):
    """STL10's files with 6 images, the last of which has no label."""
    (folder / "stl10_binary").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"stl10_binary/{split}_X.bin").write_bytes(bytes(3 * 96 * 96 * 6))
        (folder / f"stl10_binary/{split}_y.bin").write_bytes(bytes([1, 2, 3, 4, 5, 6]))
    (folder / "stl10_binary/unlabeled_X.bin").write_bytes(bytes(3 * 96 * 96 * 2))
    (folder / "stl10_binary/class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    return folder


def opened(kind, path):
    """Four images or more of this kind, one of which has no label."""
    if kind == "folder":
        for name in ("a/1.png", "a/2.png", "b/3.png", "4.png"):
            image(path / name)
        return folder.Config(path=str(path)), "4.png", 1, 4
    if kind == "table":
        rows = ["1.png,a,d1,S", "2.png,a,d1,", "3.png,b,,S", "4.png,,,"]
        for i in range(1, 5):
            image(path / f"{i}.png")
        (path / "t.csv").write_text("\n".join(["path,label,donor,site", *rows]))
        return table.Config(table=str(path / "t.csv")), "4.png", 1, 4
    if kind == "medmnist":
        np.savez(
            path / "x.npz", train_images=np.zeros((4, 8, 8), np.uint8), train_labels=np.array([[0], [1], [1], [-1]])
        )
        return medmnist.Config(path=str(path / "x.npz")), "x.npz train_images[3]", 1, 4
    if kind == "torchvision":
        return torchvision.Config(name="STL10", root=str(stl10(path)), train="train+unlabeled"), "[6], ", 2, 8
    return synthetic.Config(size=16, train=4, val=0, test=0), "", 0, 4


@pytest.mark.parametrize("kind", ["folder", "table", "medmnist", "torchvision", "synthetic"])
def test_how_many_have_a_label_a_source_and_a_site_is_said_of_every_kind(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    config, name, lacking, count = opened(kind, tmp_path)
    splits = {"train": open_splits(config)["train"]}
    long, short = describe(splits), brief(splits)
    if lacking:
        assert f"{lacking} image{'s' * (lacking > 1)} without one: " in long
        assert f"({lacking} of {count} images without: " in short
        assert name in long
        assert name in short
    else:
        assert "synthetic" in long
        assert "; all have one" in long
    if kind == "table":
        assert "sources: 2 images of 1 source, such as 1.png; 2 without one: 3.png, 4.png" in long
        assert "1 source (2 of 4 images without: 3.png, 4.png)" in short
        assert "1 site: S 2; 2 without one: 2.png, 4.png" in long
        assert "1 site (2 of 4 images without: 2.png, 4.png)" in short
    else:
        assert "sources: unknown, each image counts as its own" in long
        assert "sites: unknown" in long
        assert "sources unknown, sites unknown" in short
