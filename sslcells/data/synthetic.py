"""Generated images of stained blood smears, any number, any size, no download: for first trials and for tests."""

import mmap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from sslcells.config import Section
from sslcells.data import SPLITS, Found, ImageSet
from sslcells.data._smear import CLASSES, draw_smear

_SPLITS = {"train": 0, "val": 1, "test": 2}
KEPT = 2**30
"""Bytes of a split's images that are kept; what is beyond is drawn again each time."""


class Config(Section):
    """Number and size of the generated images."""

    kind: Literal["synthetic"] = "synthetic"
    size: int = Field(48, ge=16, le=1024)
    """Height and width in pixels; an image shows 24 µm."""
    train: int = Field(2560, ge=2)
    """Number of images in the train split."""
    val: int = Field(512, ge=0)
    """Number of images in the val split."""
    test: int = Field(512, ge=0)
    """Number of images in the test split."""
    classes: int = Field(5, ge=2, le=5)
    """Number of classes, in this order: neutrophil, eosinophil, basophil, lymphocyte, monocyte."""
    seed: int = Field(0, ge=0)
    """Seed of the images, independent of the run's seed."""


class Smears(ImageSet):
    """Images that are drawn at first use, and kept in memory that forked processes share."""

    channels = 3

    def __init__(self, config: Config, split: str) -> None:
        self._config, self._split = config, split
        self.found = Found("synthetic, generated images: no data of yours")
        self.classes = CLASSES[: config.classes]
        count = getattr(config, split)
        self.labels = torch.arange(count) % config.classes
        self.sources = torch.arange(count) + (_SPLITS[split] << 32)
        self._drawn = self._room()

    def _room(self) -> NDArray[np.uint8]:
        """A row for each image that is kept: its pixels, and 1 once they are there."""
        row = 3 * self._config.size**2 + 1
        count = min(len(self.labels), KEPT // row)
        return np.frombuffer(mmap.mmap(-1, count * row), np.uint8).reshape(count, row)

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (3, H, W) uint8, the same at every call."""
        size, kept = self._config.size, index < len(self._drawn)
        if kept and self._drawn[index, -1]:
            return torch.from_numpy(self._drawn[index, :-1].copy()).view(3, size, size)
        scene = (self._config.seed << 2) + _SPLITS[self._split]
        smear = np.ascontiguousarray(draw_smear(scene, index, int(self.labels[index]), size).transpose(2, 0, 1))
        if kept:
            self._drawn[index, :-1] = smear.reshape(-1)
            self._drawn[index, -1] = 1
        return torch.from_numpy(smear)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_drawn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._drawn = self._room()

    def name(self, index: int) -> str:
        """The image's position in its split."""
        return f"synthetic/{self._split}/{index}"


def open_splits(config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """Those of the wanted splits that have images."""
    return {split: Smears(config, split) for split in wanted if getattr(config, split)}
