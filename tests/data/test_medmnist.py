"""Files in MedMNIST's layout, written on the fly; the medmnist package is played by a stand-in."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sslcells.config import ConfigError
from sslcells.data import ImageSet, medmnist, open_split, open_splits

RANDOM = np.random.default_rng(0)


def arrays(shape=(28, 28, 3), classes=4, counts=(9, 5, 7), labels_shape=(1,)) -> dict[str, np.ndarray]:
    """The six arrays of a file; the test split lacks the last class."""
    out = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        out[f"{split}_images"] = RANDOM.integers(0, 255, (count, *shape), np.uint8)
        labels = np.arange(count) % (classes - (split == "test"))
        out[f"{split}_labels"] = np.broadcast_to(labels[:, None], (count, *labels_shape)).astype(np.uint8)
    return out


def saved(file: Path, **changes) -> Path:
    kept = {key: value for key, value in {**arrays(), **changes}.items() if value is not None}
    np.savez_compressed(file, **kept)
    return file


def opened(file: Path, split="train", **fields) -> ImageSet:
    images = open_split(medmnist.Config(path=str(file), **fields), split)
    assert images is not None
    return images


def mistake(split="train", **fields) -> str:
    with pytest.raises(ConfigError) as error:
        open_split(medmnist.Config(**fields), split)
    return str(error.value)


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)


@pytest.fixture
def package(monkeypatch):
    """A medmnist package that "downloads" by writing the file, and a list of what was asked of it."""
    asked = []

    def blood(split, download, root, size):
        asked.append((split, download, size))
        saved(Path(root) / ("bloodmnist.npz" if size == 28 else f"bloodmnist_{size}.npz"))

    def path(split, download, root, size):
        try:
            raise OSError("no route to host")
        except OSError:
            raise RuntimeError("Automatic download failed!")  # noqa: B904 (as medmnist does)

    info = {
        "bloodmnist": {"python_class": "BloodMNIST", "label": {str(k): name for k, name in enumerate("wxyz")}},
        "pathmnist": {"python_class": "PathMNIST", "label": {"0": "a"}, "url_64": "https://example.org/64"},
    }
    monkeypatch.setitem(sys.modules, "medmnist", SimpleNamespace(INFO=info, BloodMNIST=blood, PathMNIST=path))
    return asked


@pytest.mark.parametrize(("shape", "channels"), [((28, 28, 3), 3), ((64, 64), 1), ((28, 20, 1), 1)])
def test_every_split_of_colour_and_grey(tmp_path, no_package, shape, channels):
    content = arrays(shape)
    np.savez(tmp_path / "x.npz", **content)
    for split, count in (("train", 9), ("val", 5), ("test", 7)):
        images = opened(tmp_path / "x.npz", split)
        assert (len(images), images.channels, images.classes) == (count, channels, ("0", "1", "2", "3"))
        pixels = images.pixels(2)
        assert (pixels.shape, pixels.dtype) == ((channels, *shape[:2]), torch.uint8)
        raw = content[f"{split}_images"][2].reshape(*shape[:2], channels)
        assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(raw))
        assert images.labels.tolist() == content[f"{split}_labels"][:, 0].tolist()
        assert images.name(2) == f"x.npz {split}_images[2]"


def test_images_are_their_own_source_in_all_splits(tmp_path, no_package):
    file = saved(tmp_path / "x.npz")
    ids = torch.cat([opened(file, split).sources for split in ("train", "val", "test")])
    assert ids.unique().numel() == 9 + 5 + 7


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
def test_what_is_done_to_pixels_stays_out_of_the_set(tmp_path, no_package, shape):
    np.savez(tmp_path / "x.npz", **arrays(shape))
    images = opened(tmp_path / "x.npz")
    before = images.pixels(0).clone()
    images.pixels(0).add_(1)
    assert torch.equal(images.pixels(0), before)
    assert images.pixels(0).is_contiguous()


def test_several_labels_per_image_are_none(tmp_path, no_package):
    np.savez(tmp_path / "chest.npz", **arrays((28, 28), classes=2, labels_shape=(14,)))
    images = opened(tmp_path / "chest.npz")
    assert (images.classes, images.labels.tolist(), images.labelled) == ((), [-1] * 9, False)


def test_a_long_tail_of_train(tmp_path, no_package):
    labels = RANDOM.permutation(np.repeat([0, 1, 2], [30, 90, 40]))
    content = arrays((28, 28), counts=(160, 5, 7))
    file = saved(tmp_path / "x.npz", **{**content, "train_labels": labels[:, None]})
    images = opened(file, long_tail=9.0)
    assert images.labels.bincount().tolist() == [10, 90, 30]  # 90 · 9^(−c/2): 90, 30, 10, commonest first
    places = (images.sources & 0xFFFF).tolist()
    assert places == sorted(places)
    assert [labels[i] for i in places] == images.labels.tolist()
    assert images.name(7) == f"x.npz train_images[{places[7]}]"
    assert torch.equal(images.pixels(7)[0], torch.from_numpy(content["train_images"][places[7]]))
    assert images.sources.tolist() == opened(file, long_tail=9.0).sources.tolist()
    assert opened(file, long_tail=1.5).labels.bincount().tolist() == [30, 90, 40]  # no more than there are
    assert len(opened(file, "test", long_tail=9.0)) == 7
    several = saved(tmp_path / "chest.npz", **arrays((28, 28), classes=2, labels_shape=(14,)))
    assert "data.long_tail=2.0:" in mistake(path=str(several), long_tail=2.0)


def test_flat_labels(tmp_path, no_package):
    file = saved(tmp_path / "x.npz", **{f"{s}_labels": arrays()[f"{s}_labels"][:, 0] for s in ("train", "test")})
    assert opened(file).labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_a_file_without_val(tmp_path, no_package):
    file = saved(tmp_path / "x.npz", val_images=None, val_labels=None)
    assert open_split(medmnist.Config(path=str(file)), "val") is None
    assert len(opened(file)) == 9


def test_names_of_the_classes(tmp_path, package):
    own = saved(tmp_path / "mine.npz")
    known = saved(tmp_path / "bloodmnist_64.npz")
    larger = saved(tmp_path / "pathmnist.npz")
    assert opened(own).classes == ("0", "1", "2", "3")
    assert opened(own, class_names=tuple("abcd")).classes == tuple("abcd")
    assert opened(known).classes == tuple("wxyz")
    assert opened(known, class_names=tuple("abcd")).classes == tuple("abcd")
    assert opened(larger).classes == ("0", "1", "2", "3")  # more classes than the published one
    assert "has 2 names; the labels of" in mistake(path=str(own), class_names=("a", "b"))


def test_a_set_by_name(tmp_path, package):
    saved(tmp_path / "bloodmnist_64.npz")
    fields = {"set": "bloodmnist", "resolution": 64, "root": str(tmp_path)}
    images = open_split(medmnist.Config(**fields, download=True), "test")
    assert (len(images), images.classes, package) == (7, tuple("wxyz"), [])
    message = mistake(**{**fields, "resolution": 28})
    assert str(tmp_path / "bloodmnist.npz") in message
    assert "download=true" in message


def test_download(tmp_path, package):
    root = tmp_path / "new"
    images = open_split(medmnist.Config(set="bloodmnist", resolution=128, root=str(root), download=True), "train")
    assert len(images) == 9
    assert package == [("val", True, 128)]
    assert [file.name for file in root.iterdir()] == ["bloodmnist_128.npz"]


def test_download_fails(tmp_path, package):
    message = mistake(set="pathmnist", resolution=64, root=str(tmp_path), download=True)
    assert "no route to host" in message
    assert f"put https://example.org/64 at {tmp_path / 'pathmnist_64.npz'}" in message
    assert not list(tmp_path.iterdir())


def test_download_needs_the_package(tmp_path, no_package):
    assert "sslcells[medmnist]" in mistake(set="pathmnist", root=str(tmp_path), download=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_images": None}, "has no train_images (did you mean train_labels?); it has: train_labels, val_images"),
        ({"train_labels": None}, "has no train_labels"),
        ({"train_images": np.zeros((9, 28, 28, 28), np.uint8)}, "volumes cannot be read"),
        ({"train_images": np.zeros((9, 28, 28, 28, 3), np.uint8)}, "volumes cannot be read"),
        ({"train_images": np.zeros((9, 784), np.uint8)}, "train_images has the shape (9, 784)"),
        ({"train_images": np.zeros((9, 28, 28))}, "train_images is float64, not uint8"),
        ({"train_images": np.zeros((0, 28, 28), np.uint8), "train_labels": np.zeros((0, 1), int)}, "is empty"),
        ({"train_labels": np.zeros((8, 1), int)}, "train has 9 images but 8 labels"),
        ({"train_labels": np.zeros((9, 1))}, "train_labels is float64"),
        ({"train_images": np.array([{}], object)}, "train_images holds Python objects, not numbers"),
    ],
)
def test_other_layouts(tmp_path, no_package, changes, expected):
    file = saved(tmp_path / "x.npz", **changes)
    message = mistake(path=str(file))
    assert expected in message
    assert str(file) in message


def test_a_split_by_halves(tmp_path, no_package):
    file = saved(tmp_path / "x.npz", val_labels=None)
    assert "has no val_labels" in mistake("val", path=str(file))


def test_no_npz(tmp_path):
    file = saved(tmp_path / "data.npz")
    assert "no such file (did you mean data.npz?)" in mistake(path=str(tmp_path / "dat.npz"))
    assert "is a folder" in mistake(path=str(tmp_path))
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert "is not a .npz archive" in mistake(path=str(tmp_path / "text.npz"))
    assert "is not a .npz archive" in mistake(path=str(tmp_path / "one.npy"))
    content = bytearray(file.read_bytes())
    content[300:2000] = bytes(1700)
    file.write_bytes(content)
    assert "data.npz cannot be read" in mistake(path=str(file))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"set": "bloodmnst"}, "did you mean bloodmnist"),
        ({"set": "organmnist3d"}, "volumes"),
        ({"set": "bloodmnist", "resolution": 32}, "28, 64, 128 or 224"),
        ({}, "give either path"),
        ({"set": "bloodmnist", "path": "x.npz"}, "give either path"),
    ],
)
def test_wrong_fields(fields, expected):
    with pytest.raises(ValidationError, match=expected):
        medmnist.Config(**fields)


@pytest.mark.realdata
def test_pbc28(realdata):
    if not (realdata / "pbc28.npz").is_file():
        pytest.skip(f"no pbc28.npz in {realdata}")
    counts = [len(opened(realdata / "pbc28.npz", split)) for split in ("train", "val", "test")]
    assert counts == [11961, 1712, 3419]
    images = opened(realdata / "pbc28.npz", "val")
    assert images.pixels(0).shape == (3, 28, 28)
    assert len(images.classes) == 8


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {f"{split}_labels": np.full((n, 14), 256) for split, n in (("train", 9), ("val", 5), ("test", 7))},
            "train_labels[0, 0] is 256 (126 such labels); of several labels",
        ),
        ({"test_labels": np.full((7, 14), 2)}, "the splits have different numbers of labels an image: train_labels 1"),
        ({"val_labels": np.zeros((5, 0), int)}, "val_labels is int64 of shape (5, 0)"),
        (
            {"test_images": np.zeros((7, 28, 28, 1), np.uint8)},
            "different sizes or channels: train_images (9, 28, 28, 3)",
        ),
        ({"train_images": np.zeros((9, 28, 28), np.uint8)}, "different sizes or channels"),
        ({"val_images": np.zeros((5, 64, 64, 3), np.uint8)}, "val_images (5, 64, 64, 3)"),
        (
            {"train_labels": np.arange(9)[:, None] * 125_000_000},
            "train_labels[1] is 125000000 (8 such labels); classes",
        ),
        ({"test_labels": np.array([[0]] * 6 + [[10**9]])}, "test_labels[6] is 1000000000 (1 such labels)"),
        ({"train_labels": np.full((9, 1), 2**64 - 1, np.uint64)}, "train_labels holds 18446744073709551615"),
        ({"train_labels": np.full((9, 1), -2)}, "train_labels[0] is -2"),
        ({"train_labels": np.zeros((9, 1), np.float32)}, "train_labels is float32"),
        ({"train_labels": np.full((9, 1), np.nan)}, "train_labels is float64"),
        ({"train_labels": np.array([["a"]] * 9)}, "train_labels is <U1"),
        ({"test_labels": np.array([[0]] * 7, object)}, "test_labels holds Python objects"),
        ({"train_images": np.full((9, 28, 28, 3), np.nan)}, "train_images is float64, not uint8"),
        ({"test_labels": np.zeros((8, 1), int)}, "test has 7 images but 8 labels"),
        ({"test_labels": np.int64(3)}, "test_labels is int64 of shape ()"),
        ({"train_images": np.zeros((9, 0, 28, 3), np.uint8)}, "train_images is empty: its shape is (9, 0, 28, 3)"),
        ({"val_labels": None}, "has no val_labels"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_before_anything_is_trained(tmp_path, no_package, changes, expected):
    file = saved(tmp_path / "x.npz", **changes)
    with pytest.raises(ConfigError) as error:
        open_splits(medmnist.Config(path=str(file)))
    assert expected in str(error.value)
    assert str(file) in str(error.value)


def test_targets_of_0_and_1_and_unknown_classes_are_right(tmp_path, no_package):
    several = {f"{s}_labels": np.arange(n * 2).reshape(n, 2) % 2 for s, n in (("train", 9), ("val", 5), ("test", 7))}
    images = opened(saved(tmp_path / "x.npz", **several))
    assert images.targets.tolist() == [[0, 1]] * 9
    images = opened(saved(tmp_path / "y.npz", train_labels=np.array([[-1], [3]] + [[0]] * 7)))
    assert (images.labels[:3].tolist(), len(images.classes)) == ([-1, 3, 0], 4)


def test_nothing_is_unpickled(tmp_path, no_package):
    class Bomb:
        def __reduce__(self):
            return exec, ("raise SystemExit('run')",)

    file = saved(tmp_path / "x.npz", train_labels=np.array([[Bomb()]] * 9))
    assert "train_labels holds Python objects" in mistake(path=str(file))


def test_a_pipe_is_no_file(tmp_path, no_package):
    os.mkfifo(tmp_path / "x.npz")
    assert "is no file but a pipe or device" in mistake(path=str(tmp_path / "x.npz"))
