"""Data sets of torchvision: MNIST, FashionMNIST, CIFAR10, STL10."""

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator, model_validator
from torchvision import datasets

from sslcells.config import ConfigError, Section, nearest
from sslcells.data import SPLITS, ImageSet
from sslcells.data._array import ArrayImages
from sslcells.values import place

_SETS = ("MNIST", "FashionMNIST", "CIFAR10", "STL10")


class Config(Section):
    """A data set of torchvision, to try things out."""

    kind: Literal["torchvision"] = "torchvision"
    """A data set of torchvision, with train and test, but no val."""
    name: str = "MNIST"
    """MNIST, FashionMNIST, CIFAR10 or STL10."""
    root: str = "data"
    """Folder that contains torchvision's folder of the set, such as MNIST/."""
    download: bool = False
    """Download the set if it is missing."""
    train: Literal["train", "unlabeled", "train+unlabeled"] = "train"
    """Images of STL10 to use as `train`; the 100,000 unlabelled ones take 2.8 GB of memory."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in _SETS:
            same = next((known for known in _SETS if known.casefold() == name.casefold()), None)
            near = f" (did you mean {same}?)" if same else nearest(name, _SETS)
            raise ValueError(f"is not known{near}; choose from: {', '.join(_SETS)}")
        return name

    @model_validator(mode="after")
    def _only_stl10_has_unlabelled(self) -> Self:
        if self.train != "train" and self.name != "STL10":
            raise ValueError(f"train={self.train!r} exists only for STL10; {self.name} has no unlabelled images")
        return self


def open_splits(config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """The set's train and test images, in memory; it has no val.

    Raises:
        ConfigError: if the set is missing, damaged, or cannot be downloaded.
    """
    return {split: _opened(config, split) for split in wanted if split != "val"}


def _opened(config: Config, split: str) -> ArrayImages:
    root = place(config.root)
    part: dict[str, Any] = {"train": split == "train"}
    if config.name == "STL10":
        part = {"split": config.train if split == "train" else split}
    try:
        known = getattr(datasets, config.name)(root, download=config.download, **part)
        images, classes = _images(known.data), tuple(known.classes)
        labels = np.asarray(known.labels if config.name == "STL10" else known.targets)
    except Exception as error:  # torchvision raises RuntimeError for missing files, and anything for damaged ones
        advice = "" if config.download else "; data.download=true fetches it"
        raise ConfigError(f"data.name={config.name!r} cannot be read from {root}: {_reason(error)}{advice}") from None
    return ArrayImages(images, labels, classes, split, f"{config.name} {split}", where=f"{config.name} in {root}")


def _images(data: Any) -> NDArray[np.uint8]:
    """(N, H, W, C) from (N, H, W) of the grey sets, (N, H, W, 3) of CIFAR10 or (N, 3, H, W) of STL10."""
    images: NDArray[np.uint8] = np.asarray(data)
    if images.ndim == 3:
        return images[..., None]
    return images if images.shape[-1] == 3 else images.transpose(0, 2, 3, 1)


def _reason(error: Exception) -> str:
    return "it is missing or incomplete" if "not found" in str(error) else str(error) or type(error).__name__
