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
    """This fraction of the labelled images of each class, at least one; all of `images` where it is 1.

    Where an image may have several classes, this fraction of all.

    Sources are drawn, and all their images taken, until the fraction is reached: a lab that labels a tenth labels a
    tenth of its photographs. The parts of one seed are nested.

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
    order = (first[source] * len(images) + turn).argsort()  # by source, sources in the order of their first image
    kind = images.labels[order] if images.targets is None else torch.zeros_like(order)
    chosen = []
    for c in kind[kind >= 0].unique().tolist():  # type: ignore[no-untyped-call]
        members = order[kind == c]
        chosen.append(members[: max(1, round(fraction * len(members)))])
    return Subset(images, torch.cat(chosen).sort().values)
