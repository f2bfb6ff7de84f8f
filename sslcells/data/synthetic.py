"""Generated images of stained blood smears, any number, any size, no download: for first trials and for tests."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslcells.config import Section
from sslcells.data import SPLITS, Found, ImageSet
from sslcells.data._smear import CLASSES, draw_smear

_SPLITS = {"train": 0, "val": 1, "test": 2}


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
    """Images that are generated at first use and kept in memory."""

    channels = 3

    def __init__(self, config: Config, split: str) -> None:
        self._config, self._split = config, split
        self._drawn: dict[int, Tensor] = {}
        self.found = Found("synthetic, generated images: no data of yours")
        self.classes = CLASSES[: config.classes]
        count = getattr(config, split)
        self.labels = torch.arange(count) % config.classes
        self.sources = torch.arange(count) + (_SPLITS[split] << 32)

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (3, H, W) uint8, the same at every call."""
        if index not in self._drawn:
            scene = (self._config.seed << 2) + _SPLITS[self._split]
            drawn = draw_smear(scene, index, int(self.labels[index]), self._config.size)
            self._drawn[index] = torch.from_numpy(drawn).permute(2, 0, 1).contiguous()
        return self._drawn[index]

    def name(self, index: int) -> str:
        """The image's position in its split."""
        return f"synthetic/{self._split}/{index}"


def open_splits(config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """Those of the wanted splits that have images."""
    return {split: Smears(config, split) for split in wanted if getattr(config, split)}
