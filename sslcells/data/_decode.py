"""Decodes image files of any supported format to uint8 pixels of one size and channel count."""

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Fit = Literal["crop", "pad", "stretch"]
Intensity = Literal["percentile", "full"]
Stack = Literal["auto", "first", "last"]
Percentiles = tuple[float, float]
Size = tuple[int, int]
"""(H, W)"""

# Listed, as Pillow would otherwise try every format, including PostScript, which runs an interpreter.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")
_ORIENTATION = 0x0112
_TURNED = range(5, 9)  # the EXIF orientations that swap height and width


READER = 1
"""Version of this decoder. Increase it when it accepts or refuses other files, so that images are verified again."""


class Header(NamedTuple):
    """The header of an image file."""

    size: Size
    """(H, W) of the upright image"""
    kind: str
    """format, colours and bits, such as `PNG RGB 8 bit`"""
    pages: int
    """pages, frames or series, of which the first is read"""


class Unreadable(Exception):
    """A file cannot be decoded; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Decoder:
    """Reads image files as (C, H, W) uint8: upright, on white where transparent, 8 bit, of one size.

    With `stack`, files are TIFF with any number of channels that are not colours; each channel is scaled on its own.
    """

    channels: int
    size: Size | None
    fit: Fit
    intensity: Intensity
    stack: Stack | None = None
    percentiles: Percentiles = (0.1, 99.9)

    def __call__(self, file: str) -> Tensor:
        """The pixels of one file: (C, H, W) uint8, H and W being `size`, or the image's own size if that is None.

        Raises:
            Unreadable: if the file is missing, truncated, or not an image.
        """
        try:
            _regular(file)
            if self.stack is not None:
                return self._stacked(_channels_first(file, self.channels, self.stack))
            with Image.open(file, formats=_FORMATS) as image:
                return self.pixels(image)
        except Exception as error:  # Pillow's plugins raise whatever happens to break
            raise Unreadable(_reason(error, file)) from error

    def header(self, file: str, whole: bool = False) -> Header:
        """The header of a file; with `whole` the image is also decoded, to check that it can be.

        Raises:
            Unreadable: if the file is missing, is not an image, or with `stack` has other channels.
        """
        try:
            _regular(file)
            if self.stack is not None:
                header = _stack_header(file, self.channels, self.stack)
                if whole:
                    self._stacked(_channels_first(file, self.channels, self.stack))
                return header
            with Image.open(file, formats=_FORMATS) as image:
                (width, height), kind = image.size, _kind(image)  # first, as reading EXIF may load the image
                several = getattr(image, "is_animated", False)
                turned = image.getexif().get(_ORIENTATION) in _TURNED
                if whole:
                    self.pixels(image)
                pages = 1
                if several:
                    with suppress(Exception):  # later pages are not read, so errors in them do not count
                        pages = getattr(image, "n_frames", 1)
                return Header((width, height) if turned else (height, width), kind, pages)
        except Exception as error:  # as above
            raise Unreadable(_reason(error, file)) from error

    def values(self, file: str) -> NDArray[Any]:
        """The raw values in the file: (H, W), (H, W, C), or (C, H, W) for a stack.

        Raises:
            Unreadable: as `__call__`.
        """
        try:
            _regular(file)
            if self.stack is not None:
                return _channels_first(file, self.channels, self.stack)
            with Image.open(file, formats=_FORMATS) as image:
                return np.array(image)
        except Exception as error:  # as above
            raise Unreadable(_reason(error, file)) from error

    def pixels(self, image: Image.Image) -> Tensor:
        """The pixels of an image opened by Pillow, which is rotated upright in place: (C, H, W) uint8."""
        if self.size is not None:
            # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the time; twice the size leaves the rest to _fit.
            image.draft(None, (2 * max(self.size), 2 * max(self.size)))
        ImageOps.exif_transpose(image, in_place=True)
        flat = _eight_bit(image, self.intensity, self.percentiles).convert("L" if self.channels == 1 else "RGB")
        pixels = np.array(flat) if self.size is None else _fit(flat, self.size, self.fit)  # (H, W) or (H, W, C)
        planes = pixels.reshape(*pixels.shape[:2], self.channels).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(planes))  # torch's copy would start a thread pool per reader

    def _stacked(self, planes: NDArray[Any]) -> Tensor:
        """(C, H, W) of any number type → (C, H, W) uint8 of `size`, every channel scaled on its own."""
        eight = [_scale(plane, self.intensity, self.percentiles) for plane in planes]
        size = self.size
        fitted = eight if size is None else [_fit(Image.fromarray(plane), size, self.fit) for plane in eight]
        return torch.from_numpy(np.stack(fitted))


def _regular(file: str) -> None:
    """Raise unless this is a regular file: opening a pipe or reading a device could hang."""
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        target = os.path.realpath(file)
        nowhere = error.errno == errno.ENOENT and os.path.isdir(os.path.dirname(target))
        if os.path.islink(file) and (nowhere or error.errno == errno.ELOOP):
            raise ValueError(_broken_link(file)) from None  # not a storage problem, so not retried
        raise
    if not stat.S_ISREG(mode):
        raise ValueError(f"{_WHAT.get(stat.S_IFMT(mode), 'something')}, not a file")


def _broken_link(file: str) -> str:
    return f"a broken link: it leads to {os.readlink(file)}"


_WHAT = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _stack_header(file: str, channels: int, stack: Stack) -> Header:
    with _opened(file) as tiff:
        series = tiff.series[0]
        shape, axis = _channel_axis(series, channels, stack)
        size = (shape[1], shape[2]) if axis == 0 else (shape[0], shape[1])
        return Header(size, f"TIFF {_times(series.shape)} {series.axes} {series.dtype}"[:60], len(tiff.series))


_BITS_PER_SAMPLE = 258
_MODES = {"1": "black and white", "L": "grey", "P": "palette", "I": "grey", "F": "grey", "LA": "grey and alpha"}
_DEEP = {"1": "1 bit", "I": "32 bit", "F": "float32", "I;16": "16 bit", "I;16B": "16 bit", "I;16L": "16 bit"}


def _kind(image: Image.Image) -> str:
    """Such as `PNG RGB 8 bit`, with the bit depth of the file, not of Pillow's mode."""
    bits = _DEEP.get(image.mode, "8 bit")
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        each = {int(n) for n in np.atleast_1d(tags.get(_BITS_PER_SAMPLE, ()))}
        bits = bits if image.mode == "F" or not each else f"{max(each)} bit"
    elif any("16B" in str(tile[3]) for tile in getattr(image, "tile", ())):  # PNG's rawmode
        bits = "16 bit"
    return f"{image.format} {_MODES.get(image.mode.partition(';')[0], image.mode)} {bits}"


def _opened(file: str) -> tifffile.TiffFile:
    try:
        return tifffile.TiffFile(file)
    except tifffile.TiffFileError as error:
        if not os.path.getsize(file):
            raise ValueError("empty file") from error
        raise ValueError("not a TIFF file, which data.stack reads") from error


def _channels_first(file: str, channels: int, stack: Stack) -> NDArray[Any]:
    """The first series of a TIFF file as (C, H, W), of the file's own number type."""
    with _opened(file) as tiff:
        series = tiff.series[0]
        shape, axis = _channel_axis(series, channels, stack)
        values: NDArray[Any] = series.asarray(maxworkers=1).reshape(shape)
    return np.moveaxis(values, axis, 0)


def _channel_axis(series: Any, channels: int, stack: Stack) -> tuple[tuple[int, ...], int]:
    """The shape of a TIFF series with three axes, and which of these, 0 or 2, has the channels.

    `auto` takes the axis that the file names C (channel) or S (sample); without one, the first or the last axis, if
    exactly one of them has the right length.
    """
    kept = [(int(n), name) for n, name in zip(series.shape, series.axes, strict=True) if n > 1]
    shape, names = tuple(n for n, _ in kept), "".join(name for _, name in kept)
    if len(shape) == 2 and channels == 1:
        return (1, *shape), 0
    if len(shape) != 3:
        raise ValueError(f"it holds {_times(series.shape)} values, not {channels} channels of one plane")
    fits = [axis for axis in (0, 2) if shape[axis] == channels]
    named = [axis for axis in fits if names[axis] in "CS"]
    asked = {"first": [0], "last": [2], "auto": named if len(named) == 1 else fits}[stack]
    if len(asked) > 1:
        raise ValueError(
            f"it holds {_times(shape)} values: the channels may be first or last; set data.stack=first or last"
        )
    if not asked or asked[0] not in fits:
        where = {"first": "first", "last": "last", "auto": "first or last"}[stack]
        raise ValueError(f"it holds {_times(shape)} values: {channels} channels are not the {where} of these")
    return shape, asked[0]


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _eight_bit(image: Image.Image, intensity: Intensity, percentiles: Percentiles) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scale(np.asarray(image), intensity, percentiles))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def _scale(values: NDArray[Any], intensity: Intensity, percentiles: Percentiles) -> NDArray[np.uint8]:
    """Bring (H, W) intensities of any number type to 0..255."""
    finite = np.nan_to_num(values.astype(np.float32), posinf=0.0, neginf=0.0)
    if intensity == "percentile":
        low, high = np.percentile(finite, percentiles)
    else:
        low, high = 0.0, float(np.iinfo(values.dtype).max) if values.dtype.kind in "iu" else 1.0
    span = high - low if high > low else 1.0  # a constant image becomes black
    scaled: NDArray[np.uint8] = np.rint(np.clip((finite - low) / span, 0, 1) * 255).astype(np.uint8)
    return scaled


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
    if "imagecodecs" in str(error):
        return f"{error}: pip install 'sslcells[tiff]'"
    return str(error) or type(error).__name__
