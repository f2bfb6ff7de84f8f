"""A part of a split that is used like a whole split: few labels, or few images of the rare classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells.config import ConfigError, nearest
from sslcells.data import Header, ImageSet


class Subset(ImageSet):
    """The images of `images` with these indices, renumbered from 0."""

    def __init__(self, images: ImageSet, index: Tensor, about: str = "") -> None:
        self._images, self._index, self.about = images, index.numpy(), about
        self.light, self.channels, self.classes = images.light, images.channels, images.classes
        self.shape, self.whole_files, self.device_decoder = images.shape, images.whole_files, images.device_decoder
        self.labels, self.sources = images.labels[index], images.sources[index]
        self.targets = None if images.targets is None else images.targets[index]
        self.labs, self.lab_names = None if images.labs is None else images.labs[index], images.lab_names
        self.found, self.sourced = images.found, None if images.sourced is None else images.sourced[index]

    def pixels(self, index: int) -> Tensor:
        """Image `index` of the part: (C, H, W) uint8."""
        return self._images.pixels(int(self._index[index]))

    def plain_jpeg(self, index: int) -> bytes | None:
        """The file of image `index`, if a device can decode it."""
        return self._images.plain_jpeg(int(self._index[index]))

    def fill(self, indices: Sequence[int], out: Tensor) -> None:
        """Write images of the part into `out`: (B, C, H, W) uint8."""
        self._images.fill(self._index[np.asarray(indices, np.int64)].tolist(), out)

    def values(self, index: int) -> NDArray[Any]:
        """The raw values of image `index`."""
        return self._images.values(int(self._index[index]))

    def header(self, index: int) -> Header | None:
        """The file header of image `index`."""
        return self._images.header(int(self._index[index]))

    def name(self, index: int) -> str:
        """The name of image `index` in the whole split."""
        return self._images.name(int(self._index[index]))


def without_labs(images: ImageSet, names: Sequence[str]) -> ImageSet:
    """The images that are of none of these laboratories; all of `images` if there are no names.

    Raises:
        ConfigError: if the data does not say the laboratories, or has none of that name.
    """
    if not names:
        return images
    if images.labs is None:
        raise ConfigError(f"train.without_labs={', '.join(names)}: the data names no laboratories of its images")
    number = {name: i for i, name in enumerate(images.lab_names, 1)}
    for name in names:
        if name not in number:
            near = nearest(name, images.lab_names)
            raise ConfigError(
                f"train.without_labs: there is no laboratory {name}{near}; there are {', '.join(images.lab_names)}"
            )
    kept = (~torch.isin(images.labs, torch.tensor([number[name] for name in names]))).nonzero()[:, 0]
    return Subset(images, kept, images.about)


def labelled_part(images: ImageSet, fraction: float, seed: int) -> ImageSet:
    """The images of `labelled_index` as a split; all of `images` if the fraction is 1.

    Raises:
        ConfigError: as `labelled_index`.
    """
    return images if fraction == 1 else Subset(images, labelled_index(images, fraction, seed))


def labelled_index(images: ImageSet, fraction: float, seed: int) -> Tensor:
    """Indices of about this fraction of the labelled images of each class, in whole sources; of all images if it is 1.

    Whole sources, because a lab that labels a tenth of its images labels a tenth of its photographs. The seed puts the
    sources in a random order. For each class, sources that have it are drawn from the front, as many as come closest to
    the fraction of its images, but at least one. The part is all labelled images of the sources that any class drew. So
    it may be larger or smaller than the fraction, if sources have several classes or many images. With one seed, a
    smaller part is contained in a larger one. If images may have several labels, having none counts as a class too.

    Raises:
        ConfigError: if the images have no labels.
    """
    if fraction == 1:
        return torch.arange(len(images))
    if not images.labelled and images.targets is None:
        raise ConfigError(f"train.label_fraction={fraction} needs labels, and the train split has none")
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randperm(len(images), generator=generator)
    numbers, source = torch.unique(images.sources, return_inverse=True)
    first = torch.full((len(numbers),), len(images)).scatter_reduce(0, source, turn, "amin")
    place = first.argsort().argsort()[source]  # (N,) position of each image's source in the order
    image, kind = _kinds(images)
    # Number of images of each class in each source, sorted by class and then by the order of the sources.
    held, count = torch.unique(kind * len(numbers) + place[image], return_counts=True)
    kind_of, place_of = held // len(numbers), held % len(numbers)
    total = torch.zeros(int(kind.max()) + 1, dtype=torch.int64).index_add_(0, kind_of, count)  # (K,)
    upto = count.cumsum(0) - (total.cumsum(0) - total)[kind_of]
    # A source brings its class closer to the fraction if half of its images do not go beyond the fraction.
    closer = upto - count / 2 < fraction * total[kind_of]
    drawn = torch.zeros(len(numbers), dtype=torch.bool)
    drawn[place_of[closer | (upto == count)]] = True
    labelled = torch.zeros(len(images), dtype=torch.bool).index_fill_(0, image, True)
    return (drawn[place] & labelled).nonzero()[:, 0]


def _kinds(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Image and class of each label, (P,) int64 each; an image with several labels appears once for each."""
    if images.targets is None:
        image = (images.labels >= 0).nonzero()[:, 0]
        return image, images.labels[image]
    none = (images.targets == 0).all(1, keepdim=True)
    image, kind = torch.cat([images.targets > 0, none], 1).nonzero().unbind(1)
    return image, kind
