"""torchvision's sets in miniature: files in their layouts, written on the fly."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from sslcells.config import ConfigError
from sslcells.data import ImageSet, open_split, torchvision

RANDOM = np.random.default_rng(0)


def opened(root: Path, split="train", **fields) -> ImageSet:
    images = open_split(torchvision.Config(root=str(root), **fields), split)
    assert images is not None
    return images


def mistake(root: Path, **fields) -> str:
    with pytest.raises(ConfigError) as error:
        open_split(torchvision.Config(root=str(root), **fields), "train")
    return str(error.value)


def write_mnist(root: Path, name="MNIST") -> np.ndarray:
    """6 training images and 4 test images; the training ones are returned."""
    (root / name / "raw").mkdir(parents=True)
    for prefix, count in (("t10k", 4), ("train", 6)):
        images = RANDOM.integers(0, 255, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        raw = root / name / "raw"
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return images


@pytest.mark.parametrize(("name", "first"), [("MNIST", "0 - zero"), ("FashionMNIST", "T-shirt/top")])
def test_mnist_layout(tmp_path, name, first):
    written = write_mnist(tmp_path, name)
    train, test = opened(tmp_path, name=name), opened(tmp_path, "test", name=name)
    assert (len(train), len(test), train.channels) == (6, 4, 1)
    assert train.pixels(3).shape == (1, 28, 28)
    assert np.array_equal(train.pixels(3)[0].numpy(), written[3])
    assert test.labels.tolist() == [0, 1, 2, 3]
    assert (train.classes[0], len(train.classes)) == (first, 10)
    assert torch.cat([train.sources, test.sources]).unique().numel() == 10
    assert test.name(2) == f"{name} test[2]"


def test_there_is_no_val(tmp_path):
    assert open_split(torchvision.Config(root=str(tmp_path)), "val") is None


def test_cifar10(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    planes = RANDOM.integers(0, 255, (2, 3, 32, 32), np.uint8)

    def write(name: str, content: dict) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return name, calculate_md5(folder / name)

    batch = {"data": planes.reshape(2, -1), "labels": [7, 1]}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write("data_batch_1", batch)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write("test_batch", batch)])
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    images = opened(tmp_path, name="CIFAR10")
    assert (images.channels, images.classes, images.labels.tolist()) == (3, tuple("abcdefghij"), [7, 1])
    assert np.array_equal(images.pixels(1).numpy(), planes[1])


def test_stl10_and_its_unlabelled_images(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    planes = {
        name: RANDOM.integers(0, 255, (count, 3, 96, 96), np.uint8)
        for name, count in (("train", 2), ("unlabeled", 3), ("test", 2))
    }
    for name, images in planes.items():
        (folder / f"{name}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes([10, 1]))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)

    train = opened(tmp_path, name="STL10")
    assert (train.classes, train.labels.tolist()) == (tuple("abcdefghij"), [9, 0])
    assert np.array_equal(train.pixels(1).numpy(), planes["train"][1])
    assert opened(tmp_path, name="STL10", train="unlabeled").labels.tolist() == [-1] * 3
    both = opened(tmp_path, name="STL10", train="train+unlabeled")
    assert both.labels.tolist() == [9, 0, -1, -1, -1]
    assert np.array_equal(both.pixels(4).numpy(), planes["unlabeled"][2])
    assert len(opened(tmp_path, "test", name="STL10", train="unlabeled")) == 2


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR10", "STL10"])
def test_missing(tmp_path, name):
    message = mistake(tmp_path, name=name)
    assert f"data.name='{name}' cannot be read from {tmp_path}: it is missing" in message
    assert "data.download=true" in message


def test_damaged(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(gzip.compress(b"no images"))
    assert "cannot be read" in mistake(tmp_path)


def test_download_fails(tmp_path, monkeypatch):
    def offline(self):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", offline)
    message = mistake(tmp_path, download=True)
    assert message.endswith("no route to host")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "mnist"}, "did you mean MNIST"),
        ({"name": "CIFAR-10"}, "did you mean CIFAR10"),
        ({"train": "unlabeled"}, "MNIST has no unlabelled images"),
    ],
)
def test_wrong_fields(fields, expected):
    with pytest.raises(ValidationError, match=expected):
        torchvision.Config(**fields)


@pytest.mark.realdata
def test_mnist(realdata):
    if not (realdata / "MNIST").is_dir():
        pytest.skip(f"no MNIST in {realdata}")
    train, test = opened(realdata), opened(realdata, "test")
    assert (len(train), len(test)) == (60000, 10000)
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert train.pixels(0).shape == (1, 28, 28)
