"""A split held in memory as one array."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells.data import SPLITS, Found, ImageSet


class ArrayImages(ImageSet):
    """Images of one (N, H, W, C) uint8 array, shared with forked data loader workers; each is its own source."""

    light = False

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[Any],
        classes: tuple[str, ...],
        split: str,
        origin: str,
        targets: NDArray[Any] | None = None,
        where: str | None = None,
    ) -> None:
        self._images = images
        self._origin = origin
        self.found = Found(where or origin)
        self.channels = images.shape[-1]
        self.shape = images.shape[3], images.shape[1], images.shape[2]
        self.classes = classes
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.targets = None if targets is None else torch.from_numpy(targets.astype(np.uint8))
        self.sources = torch.arange(len(images)) + (SPLITS.index(split) << 32)  # no number is used by two splits

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (C, H, W) uint8."""
        return torch.from_numpy(self._images[index].transpose(2, 0, 1).copy())

    def fill(self, indices: Sequence[int], out: Tensor) -> None:
        """Copy images: `out` is (B, C, H, W) uint8."""
        np.copyto(out.numpy(), self._images[np.asarray(indices, np.int64)].transpose(0, 3, 1, 2))

    def name(self, index: int) -> str:
        """The position of the image in its file."""
        return f"{self._origin}[{index}]"
