"""A split that lies in memory as one array."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells.data import SPLITS, ImageSet


class ArrayImages(ImageSet):
    """Images of one (N, H, W, C) uint8 array, which forked data loader workers share; each is its own source.

    `kept` are the places in the file of those that are here, (N,), where not all of it are.
    """

    light = False

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[Any],
        classes: tuple[str, ...],
        split: str,
        origin: str,
        kept: NDArray[np.int64] | None = None,
    ) -> None:
        self._images = images
        self._places = torch.arange(len(images)) if kept is None else torch.from_numpy(kept)
        self._origin = origin
        self.channels = images.shape[-1]
        self.classes = classes
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.sources = self._places + (SPLITS.index(split) << 32)  # apart from other splits' numbers

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (C, H, W) uint8."""
        return torch.from_numpy(self._images[index].transpose(2, 0, 1).copy())

    def name(self, index: int) -> str:
        """The image's place in its file."""
        return f"{self._origin}[{self._places[index]}]"
