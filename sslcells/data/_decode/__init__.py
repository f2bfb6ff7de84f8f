"""Decodes image files of any supported format to uint8 pixels of one size and channel count; see docs/files.md."""

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sslcells.data._decode import pillow
from sslcells.data._decode.axes import Layout, Planes, Stack, loaded, picture_layout, stack_layout
from sslcells.data._decode.axes import plane_names as plane_names
from sslcells.data._decode.axes import plane_sizes as plane_sizes
from sslcells.data._decode.axes import split_plane as split_plane
from sslcells.data._decode.meaning import Intensity, Meaning, Percentiles, Scaling, picture, scale
from sslcells.data._decode.meaning import upright as turned
from sslcells.data._decode.ngff import ZARR as ZARR
from sslcells.data._decode.ngff import Ngff
from sslcells.data._decode.ngff import metadata_file as metadata_file
from sslcells.data._decode.pixel_size import Scale, field, of_picture
from sslcells.data._decode.tiff import MAGIC, Tiff

Fit = Literal["crop", "pad", "stretch"]
Size = tuple[int, int]
"""(H, W)"""

READER = 3
"""Version of this decoder. Increase it when it accepts or refuses other files, so that images are verified again."""


class Header(NamedTuple):
    """The header of an image file."""

    size: Size
    """(H, W) of the upright image"""
    kind: str
    """format, colours and bits, such as `PNG RGB 8 bit`"""
    pages: int
    """pages, frames or series, of which the first is read"""
    planes: str = ""
    """planes along T and Z, such as `t2z5`, where there are several"""
    part: str = ""
    """for a file of a multi-file OME-TIFF set, the set's first file; empty for that one, and for all other files"""
    um_per_pixel: float = 0.0
    """of the level that is read; 0 if the file does not say it"""
    scale_from: str = ""
    """what in the file says how large a pixel is, or why that is not known"""


class Unreadable(Exception):
    """A file cannot be decoded; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Decoder:
    """Reads image files as (C, H, W) uint8: upright, on white where transparent, 8 bit, of one size.

    With `stack`, files are TIFF or OME-Zarr with any number of channels that are not colours; each channel is scaled
    on its own. Of several planes (Z, T) `z` says what is read; with `each`, `file#t0z3` is one of them.

    With `um_per_pixel`, images are brought to that scale, and `size` is what is cut from their centre. How large a
    pixel of a file is says the caller, else the file, else `um_per_pixel_default`.
    """

    channels: int
    size: Size | None
    fit: Fit
    intensity: Intensity
    stack: Stack | None = None
    percentiles: Percentiles = (0.1, 99.9)
    range: tuple[float, float] | None = None
    z: Planes = "middle"
    level: int = 0
    um_per_pixel: float | None = None
    um_per_pixel_default: float | None = None

    def __post_init__(self) -> None:
        assert self.um_per_pixel is None or self.size is not None

    def __call__(self, file: str, um_per_pixel: float | None = None) -> Tensor:
        """The pixels of one file: (C, H, W) uint8, H and W being `size`, or the image's own size if that is None.

        Raises:
            Unreadable: if the file is missing, truncated, not an image, or one whose intensities would be lost; or if
                its scale is wanted and not known.
        """
        try:
            file, plane = self._plane(file)
            return self._pixels(file, plane, um_per_pixel)
        except Exception as error:  # the libraries raise whatever happens to break
            raise Unreadable(_reason(error, file)) from error

    def header(self, file: str, whole: bool = False) -> Header:
        """The header of a file; with `whole` the image is also decoded, to check that it can be.

        Raises:
            Unreadable: if the file is missing, is not an image, or with `stack` has other channels.
        """
        try:
            file, plane = self._plane(file)
            with self._opened(file) as source:
                if not isinstance(source, (Tiff, Ngff)):
                    return self._picture_header(source, file, whole)
                header = self._header(source, self._layout(source, plane), file)
            if whole and not header.part:  # a further file of a set is read with the first
                every = self.z == "each" and not plane and header.planes
                names = plane_names(plane_sizes(header.planes)) if every else []
                for each in [split_plane(f"{file}{name}")[1] for name in names] or [plane]:
                    self._pixels(file, each, None)
            return header
        except Exception as error:  # as above
            raise Unreadable(_reason(error, file)) from error

    def values(self, file: str) -> NDArray[Any]:
        """The raw values in the file, upright: (H, W), (H, W, C), or (C, H, W) for a stack.

        Raises:
            Unreadable: as `__call__`.
        """
        try:
            file, plane = self._plane(file)
            with self._opened(file) as source:
                if not isinstance(source, (Tiff, Ngff)):
                    with Image.open(source, formats=pillow.FORMATS) as image:
                        return pillow.upright_values(image, file)
                layout = self._layout(source, plane)
                orientation = source.meaning(self.stack is not None).orientation
                values = turned(_samples_at(loaded(source, layout), layout, -1), orientation)
                if self.stack is not None:
                    return np.moveaxis(values, -1, 0)
                return values if values.shape[-1] > 1 else values[..., 0]
        except Exception as error:  # as above
            raise Unreadable(_reason(error, file)) from error

    def pixels(self, image: Image.Image, um_per_pixel: float | None = None) -> Tensor:
        """The pixels of an image opened by Pillow, which is rotated upright in place: (C, H, W) uint8.

        Raises:
            ValueError: if its scale is wanted and not known.
        """
        factor = self.factor(of_picture(image.info), um_per_pixel)
        pillow.upright(image, None if self.size is None or factor is not None else max(self.size))
        return self._fitted(pillow.flat(image, self._scaling, self.channels), factor)

    def factor(self, own: Scale, um_per_pixel: float | None = None) -> float | None:
        """How many pixels of a file one pixel of `um_per_pixel` is; None if images are left as they are.

        Raises:
            ValueError: if the file's scale is not known.
        """
        if self.um_per_pixel is None:
            return None
        um = um_per_pixel or own.um or self.um_per_pixel_default
        if not um:
            because = f" ({own.origin})" if own.origin else ""
            raise ValueError(f"its µm per pixel is not known{because}, and data.um_per_pixel is {self.um_per_pixel:g}")
        return self.um_per_pixel / um

    @property
    def _scaling(self) -> Scaling:
        return Scaling(self.intensity, self.percentiles, self.range)

    def _plane(self, file: str) -> tuple[str, dict[str, int]]:
        return split_plane(file) if self.z == "each" else (file, {})

    def _opened(self, file: str) -> Tiff | Ngff | BufferedReader:
        """A TIFF file or OME-Zarr folder, opened; of a picture, which Pillow reads, the opened file.

        Raises:
            ValueError: if `stack` or `level` asks for one of the two, and this is neither.
        """
        if file.endswith(ZARR) or (os.path.isdir(file) and metadata_file(file) is not None):
            _regular(file, folder=True)
            return Ngff(file, self.level)
        _regular(file)
        opened = open(file, "rb")  # noqa: SIM115 (the caller closes it)
        try:
            first = opened.read(len(MAGIC[0]))
            if first not in MAGIC:
                self._check_picture(first)
                opened.seek(0)
                return opened
        except BaseException:
            opened.close()
            raise
        opened.close()
        return Tiff(file, self.level)

    def _check_picture(self, first: bytes) -> None:
        if not first:
            raise ValueError("empty file")
        if self.stack is not None:
            raise ValueError("not a TIFF file, which data.stack reads")
        if self.level:
            raise ValueError(f"no pyramid, and data.level is {self.level}")

    def _layout(self, source: Tiff | Ngff, plane: dict[str, int]) -> Layout:
        if self.stack is not None:
            return stack_layout(source, self.channels, self.stack, self.z, plane)
        return picture_layout(source, self.z, plane)

    def _header(self, source: Tiff | Ngff, layout: Layout, file: str) -> Header:
        meaning = source.meaning(self.stack is not None)
        height, width = layout.size
        size = (width, height) if meaning.orientation in pillow.TURNED else (height, width)
        planes = "".join(f"{axis.lower()}{n}" for axis, n in layout.planes.items())
        kind = source.kind()
        if self.stack is not None:
            kind += f" {'×'.join(map(str, layout.shape))} {layout.axes} {np.dtype(source.dtype)}"
        if planes:
            each = " × ".join(f"{axis} {n}" for axis, n in layout.planes.items())
            kind += f", {self.z} of {each}"
        scale = source.scale()
        return Header(size, kind, layout.pages + source.others(), planes, source.part_of(file), *scale)

    def _picture_header(self, opened: BufferedReader, file: str, whole: bool) -> Header:
        with Image.open(opened, formats=pillow.FORMATS) as image:
            # First, as reading EXIF may load the image.
            (width, height), kind, deep = image.size, pillow.kind(image), pillow.deep_png(image)
            several = getattr(image, "is_animated", False)
            lying = image.getexif().get(pillow.ORIENTATION) in pillow.TURNED
            scale = of_picture(image.info)
            if whole:
                self._picture(image, file, deep, None)
            pages = 1
            if several:
                with suppress(Exception):  # later pages are not read, so errors in them do not count
                    pages = getattr(image, "n_frames", 1)
            size = (width, height) if lying else (height, width)
            return Header(size, kind, pages, "", "", *scale)

    def _pixels(self, file: str, plane: dict[str, int], um_per_pixel: float | None) -> Tensor:
        with self._opened(file) as source:
            if not isinstance(source, (Tiff, Ngff)):
                with Image.open(source, formats=pillow.FORMATS) as image:
                    return self._picture(image, file, pillow.deep_png(image), um_per_pixel)
            layout = self._layout(source, plane)
            if self.z == "each" and layout.planes and not plane:
                first = plane_names(layout.planes)[0]
                raise ValueError(f"it holds several planes: name one of them, such as {os.path.basename(file)}{first}")
            factor = self.factor(source.scale(), um_per_pixel) if self.um_per_pixel is not None else None
            if self.stack is None and source.pillows:
                with Image.open(file, formats=("TIFF",)) as image:
                    return self.pixels(image, um_per_pixel or source.scale().um or None)
            meaning = source.meaning(self.stack is not None)
            values = loaded(source, layout)
            if self.stack is not None:
                return self._stacked(_samples_at(values, layout, 0), meaning, factor)
            coloured = source.coloured(_samples_at(values, layout, -1))
            upright = picture(coloured, meaning, self._scaling)
            return self._fitted(pillow.flat(upright, self._scaling, self.channels), factor)

    def _picture(self, image: Image.Image, file: str, deep: bool, um_per_pixel: float | None) -> Tensor:
        if not deep:
            return self.pixels(image, um_per_pixel)
        factor = self.factor(of_picture(image.info), um_per_pixel)
        flat = pillow.flat(pillow.deep_picture(image, file, self._scaling), self._scaling, self.channels)
        return self._fitted(flat, factor)

    def _fitted(self, flat: Image.Image, factor: float | None) -> Tensor:
        """L or RGB of any size → (C, H, W) of `size`."""
        pixels = self._sized(flat, factor)  # (H, W) or (H, W, C)
        planes = pixels.reshape(*pixels.shape[:2], self.channels).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(planes))  # torch's copy would start a thread pool per reader

    def _sized(self, image: Image.Image, factor: float | None) -> NDArray[np.uint8]:
        if self.size is None:
            return np.array(image)
        return _fit(image, self.size, self.fit) if factor is None else field(image, self.size, factor)

    def _stacked(self, planes: NDArray[Any], meaning: Meaning, factor: float | None) -> Tensor:
        """(C, H, W) of any number type → (C, H, W) uint8 of `size`, every channel scaled on its own."""
        if planes.dtype == bool:
            planes = planes.astype(np.uint8) * np.uint8(255)
        if self.intensity == "percentile":
            eight = np.stack([scale(plane, self._scaling, meaning) for plane in planes])
        else:
            eight = scale(planes, self._scaling, meaning)
        each = [np.ascontiguousarray(turned(plane, meaning.orientation)) for plane in eight]
        fitted = each if self.size is None else [self._sized(Image.fromarray(plane), factor) for plane in each]
        return torch.from_numpy(np.stack(fitted))


def _samples_at(values: NDArray[Any], layout: Layout, axis: int) -> NDArray[Any]:
    """(H, W), (C, H, W) or (H, W, C) with the channels at `axis`; one is added to values without."""
    if layout.channels is None:
        return np.expand_dims(values, axis)
    return np.moveaxis(values, layout.channels, axis)


def _regular(file: str, folder: bool = False) -> None:
    """Raise unless this is a regular file: opening a pipe or reading a device could hang."""
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        target = os.path.realpath(file)
        nowhere = error.errno == errno.ENOENT and os.path.isdir(os.path.dirname(target))
        if os.path.islink(file) and (nowhere or error.errno == errno.ELOOP):
            raise ValueError(_broken_link(file)) from None  # not a storage problem, so not retried
        raise
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise ValueError(f"{_WHAT.get(stat.S_IFMT(mode), 'something')}, not a {'folder' if folder else 'file'}")


def _broken_link(file: str) -> str:
    return f"a broken link: it leads to {os.readlink(file)}"


_WHAT = {
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _fit(image: Image.Image, size: Size, fit: Fit) -> NDArray[np.uint8]:
    """Bring the image to (H, W); Pillow's filters widen with the scale, so nothing aliases."""
    height, width = size
    if fit == "crop":
        return np.array(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
    if fit == "stretch":
        return np.array(image.resize((width, height), Image.Resampling.BICUBIC))
    inner = np.asarray(ImageOps.contain(image, (width, height), Image.Resampling.BICUBIC))
    top, left = (height - inner.shape[0]) // 2, (width - inner.shape[1]) // 2
    below, right = height - inner.shape[0] - top, width - inner.shape[1] - left
    # The border repeats the edge pixels: black would be a signal in bright field, white in fluorescence.
    return np.pad(inner, ((top, below), (left, right), (0, 0))[: inner.ndim], mode="edge")


def _reason(error: Exception, file: str) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image" if os.path.getsize(file) else "empty file"
    if isinstance(error, FileNotFoundError) and os.path.islink(file):
        return _broken_link(file)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "it takes more memory than there is"
    if "imagecodecs" in str(error) and "pip install" not in str(error):
        return f"{error}: pip install imagecodecs"
    return " ".join(str(error).split())[:400] or type(error).__name__
