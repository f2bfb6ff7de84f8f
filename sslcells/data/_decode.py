"""From an image file of any sort to uint8 pixels of one size and channel count."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Fit = Literal["crop", "pad", "stretch"]
Intensity = Literal["percentile", "full"]
Size = tuple[int, int]
"""(H, W)"""

# Named, because Pillow would otherwise try every format it knows, PostScript with its interpreter among them.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")
_ORIENTATION = 0x0112
_TURNED = range(5, 9)  # the EXIF orientations that swap height and width


class Unreadable(Exception):
    """A file cannot be turned into pixels; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Decoder:
    """Reads image files as (C, H, W) uint8: upright, on white where transparent, 8 bit, of one size."""

    channels: Literal[1, 3]
    size: Size | None
    fit: Fit
    intensity: Intensity

    def __call__(self, file: str) -> Tensor:
        """The pixels of one file: (C, H, W) uint8, H and W being `size`, or the image's own where that is None.

        Raises:
            Unreadable: where the file is missing, cut short, or no image.
        """
        try:
            with Image.open(file, formats=_FORMATS) as image:
                return self.pixels(image)
        except Exception as error:  # Pillow's plugins raise whatever happens to break
            raise Unreadable(_reason(error, file)) from error

    def pixels(self, image: Image.Image) -> Tensor:
        """The pixels of an image that Pillow has opened, which is turned upright in place: (C, H, W) uint8."""
        if self.size is not None:
            # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the time; twice the size leaves the rest to _fit.
            image.draft(None, (2 * max(self.size), 2 * max(self.size)))
        ImageOps.exif_transpose(image, in_place=True)
        flat = _eight_bit(image, self.intensity).convert("L" if self.channels == 1 else "RGB")
        pixels = np.array(flat) if self.size is None else _fit(flat, self.size, self.fit)  # (H, W) or (H, W, C)
        planes = pixels.reshape(*pixels.shape[:2], self.channels).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(planes))  # torch's copy would start a thread pool per reader


def header_size(file: str) -> Size:
    """(H, W) of the upright image as the file's header says; the pixels are not decoded.

    Raises:
        Unreadable: where the file is missing or has no image's header.
    """
    try:
        with Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            return (width, height) if image.getexif().get(_ORIENTATION) in _TURNED else (height, width)
    except Exception as error:  # as above
        raise Unreadable(_reason(error, file)) from error


def _eight_bit(image: Image.Image, intensity: Intensity) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scale(np.asarray(image), intensity))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def _scale(values: NDArray[Any], intensity: Intensity) -> NDArray[np.uint8]:
    """Bring (H, W) intensities of any number type to 0..255."""
    finite = np.nan_to_num(values.astype(np.float32), posinf=0.0, neginf=0.0)
    if intensity == "percentile":
        low, high = np.percentile(finite, (0.1, 99.9))
    else:
        low, high = 0.0, float(np.iinfo(values.dtype).max) if values.dtype.kind in "iu" else 1.0
    span = high - low if high > low else 1.0  # of one even grey, nothing is left
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
    # The nearest pixels go on as the border: black would be a signal in bright field, white in fluorescence.
    return np.pad(inner, ((top, below), (left, right), (0, 0))[: inner.ndim], mode="edge")


def _reason(error: Exception, file: str) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image" if os.path.getsize(file) else "empty file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
