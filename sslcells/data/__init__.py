"""Images as uint8, with their labels and sources; one file per kind of data set.

A kind is a module with a `Config` and `open_splits(config, wanted=SPLITS) -> dict[str, ImageSet]`: those of the wanted
splits that there are; what they have in common is read once.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells import ranks
from sslcells.config import ConfigError, Section
from sslcells.data._decode import Decoder as Decoder
from sslcells.data._decode import Header as Header
from sslcells.data._decode import Unreadable as Unreadable
from sslcells.data._decode.on_device import DeviceDecoder
from sslcells.data._found import Found as Found
from sslcells.data._sources import check_pattern as check_pattern
from sslcells.data._sources import look_up_sources as look_up_sources
from sslcells.data._sources import read_table as read_table
from sslcells.data._sources import source_ids as source_ids
from sslcells.errors import UserError

SPLITS = ("train", "val", "test")
FILES = ("folder", "table", "webdataset", "parquet")
"""Kinds of data sets whose images are decoded from files"""


class Batch(NamedTuple):
    """Images of one rank and step."""

    pixels: Tensor
    """(B, C, H, W) uint8"""
    label: Tensor
    """(B,) int64 class; -1 where unknown"""
    image: Tensor
    """(B,) int64: the image's index in its split"""
    source: Tensor
    """(B,) int64: what the image was made from; the image's own number if unknown"""
    lab: Tensor
    """(B,) int64: where and how the image was taken; 0 if unknown"""
    occurrence: Tensor
    """(B,) int64: how often the image came before in the same global batch, for samplers that repeat images"""

    def to(self, device: torch.device) -> "Batch":
        """The batch with every tensor on `device`."""
        return Batch(*(t.to(device, non_blocking=True) for t in self))

    @staticmethod
    def ids(parts: Sequence["Batch"]) -> "Batch":
        """Join the ids of several parts, without pixels, for the loss and the sampler's figures."""
        return Batch(parts[0].pixels[:0], *(torch.cat(ids) for ids in list(zip(*parts, strict=True))[1:]))


class Pick(NamedTuple):
    """An image that a sampler chose."""

    image: int
    """its index in the split"""
    occurrence: int = 0
    """how often it came before in the same global batch"""


class ImageSet(ABC):
    """One split: images are read by index; labels and sources are known from the start."""

    light: bool = True
    """True if the set is small when pickled; then rank 0 opens it for all ranks"""
    channels: int
    """C"""
    shape: tuple[int, int, int] | None = None
    """(C, H, W) of every image if `fill` reads many at once; None if images are read one by one"""
    classes: tuple[str, ...]
    """names of the K classes; empty without labels"""
    labels: Tensor
    """(N,) int64 class; -1 where unknown"""
    sources: Tensor
    """(N,) int64: what each image was made from; equal numbers in any split of one data set are the same source"""
    about: str = ""
    """description of a set that is not a split of the data set itself"""
    targets: Tensor | None = None
    """(N, K) uint8, 1 for each class of an image, for sets with several labels per image, which have no `labels`"""
    found: Found | None = None
    """how the split was read from files"""
    sourced: Tensor | None = None
    """(N,) bool: True where the source is known; None if the data set has no sources"""
    labs: Tensor | None = None
    """(N,) int64: where and how each image was taken: 0 where unknown, else 1 + its place in `lab_names`; None if the
    data set does not say; the same numbers in every split"""
    lab_names: tuple[str, ...] = ()
    """names of the laboratories (sites, scanners, stain batches)"""
    whole_files: bool = False
    """True if every image is a whole file, whose bytes `plain_jpeg` may give"""
    device_decoder: DeviceDecoder | None = None
    """what decodes the files of `plain_jpeg` where they are not decoded when they are read"""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        """True if there are labels of at least two classes."""
        return len(self.classes) > 1 and bool((self.labels >= 0).any())

    def labs_of(self, image: Tensor) -> Tensor:
        """The laboratories (B,) int64 of images with these indices (B,); 0 where unknown."""
        return torch.zeros_like(image) if self.labs is None else self.labs[image]

    @abstractmethod
    def pixels(self, index: int) -> Tensor:
        """Image `index`: (C, H, W) uint8, the same size for every index.

        Raises:
            DataError: if the image cannot be read; the message names it.
        """

    def plain_jpeg(self, index: int) -> bytes | None:
        """The file of image `index`, if a device can decode it; None if not, or if it cannot be read."""
        return None

    def fill(self, indices: Sequence[int], out: Tensor) -> None:
        """Write the images with these indices into `out`, (B, C, H, W) uint8 and contiguous, of the set's `shape`.

        Raises:
            DataError: like `pixels`; `out` then holds some of them.
        """
        for row, index in zip(out, indices, strict=True):
            row.copy_(self.pixels(index))

    def values(self, index: int) -> NDArray[Any]:
        """The raw values of image `index`, in the shape and number type of the file.

        Raises:
            DataError: like `pixels`.
        """
        values: NDArray[Any] = np.asarray(self.pixels(index))
        return values

    def header(self, index: int) -> Header | None:
        """The file header of image `index`; None if it has no file of its own, or the header cannot be read."""
        return None

    @abstractmethod
    def name(self, index: int) -> str:
        """A readable name of image `index`: its path, or its position in the file."""


class DataError(UserError):
    """An image cannot be read; the message names it."""

    one_ranks = True


def open_splits(config: Section) -> dict[str, ImageSet]:
    """Open those of the splits "train", "val" and "test" that exist; all ranks must call it, and rank 0 looks first.

    Raises:
        ConfigError: if the data set is missing, contradicts the configuration, or has no train split.
    """
    opened: dict[str, ImageSet] = {}

    def first() -> dict[str, ImageSet] | None:
        opened.update(_open_splits(config))
        return opened if all(images.light for images in opened.values()) else None

    shared = ranks.from_main(first)
    splits = shared if shared is not None else ranks.together(lambda: opened or _open_splits(config))
    if getattr(config, "decode", "worker") == "device":
        _decode_on_device(splits["train"], config)
    if getattr(config, "cache", "none") == "none":
        return splits
    keep: Callable[..., dict[str, ImageSet]] = importlib.import_module("sslcells.data._cache").cached
    return keep(splits, config.cache_gib)  # type: ignore[attr-defined]


def _decode_on_device(train: ImageSet, config: Section) -> None:
    """Leave the plain JPEG files of train to the device, and say so.

    Raises:
        ConfigError: if its images are no whole files.
    """
    if not train.whole_files:
        raise ConfigError("data.decode=device: the images are cut from boxes where they are read; use decode=worker")
    train.device_decoder = DeviceDecoder(config.channels, config.size, config.fit)  # type: ignore[attr-defined]
    assert train.found is not None
    jpegs = sum(n for kind, (n, _) in train.found.kinds.items() if kind.startswith("JPEG "))
    known = f"{jpegs:,} of {train.found.headers:,} files are JPEG; " if train.found.headers else ""
    note = f"{known}plain ones are decoded on the device, the others, and all for figures, by the processes that read"
    train.found = replace(train.found, notes=[*train.found.notes, note])


def _open_splits(config: Section) -> dict[str, ImageSet]:
    splits = present_splits(config)
    if "train" not in splits:
        raise ConfigError(f"data: there is no train split, only {', '.join(splits) or 'nothing'}")
    channels = {name: images.channels for name, images in splits.items()}
    if len({*channels.values()}) > 1:
        each = ", ".join(f"{name} {count}" for name, count in channels.items())
        raise ConfigError(f"data: the splits have different numbers of channels: {each}")
    return splits


def present_splits(config: Section, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """Open those of the wanted splits that the data set in `config` has, train or not, in this process alone.

    Raises:
        ConfigError: if the data set is missing, or contradicts the configuration.
    """
    module = importlib.import_module(f"sslcells.data.{config.kind}")  # type: ignore[attr-defined]
    splits: dict[str, ImageSet] = module.open_splits(config, wanted)
    return splits


def open_split(config: Section, split: str) -> ImageSet | None:
    """One split, as `present_splits` opens it; None if the data set has no such split."""
    return present_splits(config, [split]).get(split)


def reading(config: Section | None, size: int) -> dict[str, Any]:
    """How an encoder trained on this data set reads image files: the fields of a Decoder except the channels.

    For images in files, the settings of its training; for a pack, those of the data set that was packed; for other
    data sets, images are cropped to squares of `size` px.
    """
    if getattr(config, "kind", None) == "pack":
        how: dict[str, Any] | None = importlib.import_module("sslcells.data.pack").reading_of(config)
        if how is not None:
            return how
    if getattr(config, "kind", None) in FILES and config is not None:
        said = {"size", "fit", "intensity", "stack", "percentiles", "range", "z", "level"}
        scaled = config.um_per_pixel is not None  # type: ignore[attr-defined]
        return config.model_dump(
            mode="json", include=said | ({"um_per_pixel", "um_per_pixel_default"} if scaled else set())
        )
    return {"size": [size, size], "fit": "crop", "intensity": "percentile"}
