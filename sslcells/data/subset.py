"""A part of a split, as if there were no more of it: few labels, or few images of the rare classes."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.data import Header, ImageSet


class Subset(ImageSet):
    """The images of `images` with these indices, numbered anew."""

    def __init__(self, images: ImageSet, index: Tensor, about: str = "") -> None:
        self._images, self._index, self.about = images, index.numpy(), about
        self.light, self.channels, self.classes = images.light, images.channels, images.classes
        self.labels, self.sources = images.labels[index], images.sources[index]
        self.targets = None if images.targets is None else images.targets[index]
        self.found, self.sourced = images.found, None if images.sourced is None else images.sourced[index]

    def pixels(self, index: int) -> Tensor:
        """Image `index` of the part: (C, H, W) uint8."""
        return self._images.pixels(int(self._index[index]))

    def values(self, index: int) -> NDArray[Any]:
        """The numbers that it was made from."""
        return self._images.values(int(self._index[index]))

    def header(self, index: int) -> Header | None:
        """What its file says of itself."""
        return self._images.header(int(self._index[index]))

    def name(self, index: int) -> str:
        """What it is called in the whole."""
        return self._images.name(int(self._index[index]))


def labelled_part(images: ImageSet, fraction: float, seed: int) -> ImageSet:
    """About this fraction of the labelled images of each class, in whole sources; all of `images` where it is 1.

    A lab that labels a tenth labels a tenth of its photographs. Sources are put in an order that the seed decides. Of
    those that hold a class, so many from the front are drawn as come nearest to the fraction of its images, and at
    least one; the part is all labelled images of the sources that were drawn for any class. Where sources hold several
    classes, or many images, it is larger or smaller than the fraction. The parts of one seed are nested. Where an image
    may have several classes, having none of them is one more.

    Raises:
        ConfigError: where the images have no labels.
    """
    if fraction == 1:
        return images
    if not images.labelled and images.targets is None:
        raise ConfigError(f"train.label_fraction={fraction}: the train split has no labels to take a part of")
    generator = torch.Generator().manual_seed(seed)
    turn = torch.randperm(len(images), generator=generator)
    numbers, source = torch.unique(images.sources, return_inverse=True)
    first = torch.full((len(numbers),), len(images)).scatter_reduce(0, source, turn, "amin")
    place = first.argsort().argsort()[source]  # (N,) of each image's source in the order
    image, kind = _kinds(images)
    # How many images of a class a source holds, by class and then in the order of the sources.
    held, count = torch.unique(kind * len(numbers) + place[image], return_counts=True)
    kind_of, place_of = held // len(numbers), held % len(numbers)
    total = torch.zeros(int(kind.max()) + 1, dtype=torch.int64).index_add_(0, kind_of, count)  # (K,)
    upto = count.cumsum(0) - (total.cumsum(0) - total)[kind_of]
    # The source takes its class nearer to the fraction while the middle of its images is before it.
    near = upto - count / 2 < fraction * total[kind_of]
    drawn = torch.zeros(len(numbers), dtype=torch.bool)
    drawn[place_of[near | (upto == count)]] = True
    labelled = torch.zeros(len(images), dtype=torch.bool).index_fill_(0, image, True)
    return Subset(images, (drawn[place] & labelled).nonzero()[:, 0])


def _kinds(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Labelled images, and a class of each, (P,) int64 twice; an image of several classes comes once for each."""
    if images.targets is None:
        image = (images.labels >= 0).nonzero()[:, 0]
        return image, images.labels[image]
    none = (images.targets == 0).all(1, keepdim=True)
    image, kind = torch.cat([images.targets > 0, none], 1).nonzero().unbind(1)
    return image, kind
