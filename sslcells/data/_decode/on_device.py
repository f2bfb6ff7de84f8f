"""Plain JPEG files, which a device can decode: which they are, and their way to the pixels that the decoder gives.

Decoding is torchvision's: libjpeg-turbo on a CPU, nvJPEG on a CUDA device. Resizing is Pillow's bicubic filter in whole
numbers, so a decoded image becomes the same pixels on every device, whatever else is in its batch.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.data._decode import Fit, Size
from sslcells.data._decode.pillow import ORIENTATION

_BEGIN, _END = b"\xff\xd8\xff", b"\xff\xd9"
_SAMPLED = {(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (4, 2)}
"""luma samples for one of chroma, across and down, that every decoder has"""
_NOT_YCBCR = (ord("R"), ord("G"), ord("B"))
"""names of components that are colours as they are"""
_BITS = 22
"""of the fraction of a weight of Pillow's filters"""
_REACH = 2
"""pixels to each side that a bicubic filter reads, of the coarser image"""
_LUMA = (19595, 38470, 7471)
"""parts of red, green and blue in grey, of 65536 (ITU-R 601-2), as Pillow has them"""
_PILLOW = int(PIL.__version__.partition(".")[0])
_AT_ONCE = 2**24
"""bytes of files that are decoded in one call, unless one is larger"""


def read_plain(file: str) -> bytes | None:
    """The bytes of a plain JPEG file; None if it is another file, or cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe could hang
            return None
        with open(file, "rb") as opened:
            begin = opened.read(len(_BEGIN))
            return plain(begin + opened.read()) if begin == _BEGIN else None
    except OSError:
        return None


def plain(data: bytes) -> bytes | None:
    """`data`, if it is a whole JPEG file of 8 bits, grey or YCbCr, upright, and no larger than Pillow reads."""
    if not data.startswith(_BEGIN) or not data.rstrip(b"\0").endswith(_END):
        return None
    try:
        with Image.open(BytesIO(data), formats=("JPEG",)) as image:
            return data if _is_plain(image) else None
    except Exception:  # Pillow raises whatever happens to break; the decoder says what is wrong with the file
        return None


def _is_plain(image: Image.Image) -> bool:
    if image.format != "JPEG" or image.mode not in ("L", "RGB") or image.getexif().get(ORIENTATION, 1) != 1:
        return False
    names, across, down, _ = zip(*image.layer, strict=True)  # type: ignore[attr-defined]
    if len(names) == 1:
        return True
    colours = image.info.get("adobe_transform", 1) == 1 and names != _NOT_YCBCR
    return colours and {*across[1:], *down[1:]} == {1} and (across[0], down[0]) in _SAMPLED


@dataclass(frozen=True)
class DeviceDecoder:
    """Decodes plain JPEG files on a device, to the pixels of a Decoder with these fields.

    A JPEG file of four times `size` or more, both ways, that decoder reads at a half, a quarter or an eighth: its
    pixels differ by some grey levels.
    """

    channels: int
    size: Size | None
    fit: Fit

    def check(self, device: torch.device) -> None:
        """Decode a small image.

        Raises:
            ConfigError: if the device cannot.
        """
        small = BytesIO()
        Image.new("RGB", (16, 16)).save(small, "JPEG")
        try:
            if device.type not in ("cpu", "cuda"):
                raise RuntimeError("it does so on cpu and cuda")
            (found,) = _decoded([torch.frombuffer(bytearray(small.getvalue()), dtype=torch.uint8)], device)
            if isinstance(found, Exception):
                raise found
        except (ImportError, RuntimeError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"data.decode=device: torchvision decodes no JPEG on {device}: {why}; use data.decode=worker"
            ) from None

    def __call__(self, files: Sequence[Tensor], device: torch.device) -> list[Tensor | Exception]:
        """Of each file, (n,) uint8 bytes on the CPU: the (C, H, W) uint8 image on the device, or why there is none."""
        out: list[Tensor | Exception] = []
        for some in _in_calls(files):
            out += self._fitted(_decoded(some, device))
        return out

    def _fitted(self, decoded: list[Tensor | Exception]) -> list[Tensor | Exception]:
        """(3, H, W) each → (C, H, W) of `size`; images of one size together."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for at, x in enumerate(decoded):
            if isinstance(x, Tensor):
                alike.setdefault(tuple(x.shape[1:]), []).append(at)
        for (height, width), places in alike.items():
            fitted = self._resized(torch.stack([decoded[at] for at in places]), (height, width))  # type: ignore[misc]
            for row, at in enumerate(places):
                decoded[at] = fitted[row] if isinstance(fitted, Tensor) else fitted
        return decoded

    def _resized(self, x: Tensor, size: Size) -> Tensor | Exception:
        """(B, 3, H, W) uint8 → (B, C, H, W) uint8 of `size`, with Pillow's two rounded passes."""
        if self.channels == 1:
            x = _grey(x)
        if self.size is None:
            return x
        step = _smaller(size, self.size)
        height, width = (-(-side // step) * step for side in size)
        high, wide = frames((height, width), self.size, self.fit)
        if not (high.pixels and wide.pixels):
            return ValueError("nothing is left of it")
        passes = [(wide, width, -1), (high, height, -2)]
        if _rows_first(size, (high.pixels, wide.pixels)):
            passes.reverse()
        for frame, length, axis in passes:
            if frame != Frame(length, 0.0, float(length), (0, 0)):
                x = _resampled(x, _taps(x.shape[axis], length, frame, x.device), axis)
        return x


class Frame(NamedTuple):
    """How one axis of an image is resized."""

    pixels: int
    """how many it becomes"""
    start: float
    end: float
    """the part of the axis that they show, in px"""
    beside: tuple[int, int]
    """pixels before and after it, which repeat the first and the last one"""


class _Taps(NamedTuple):
    """Pixels that each of N output pixels reads along an axis, and their weights."""

    pixel: Tensor
    """(K, N) int64"""
    weight: Tensor
    """(K, N) int32, in 1 / 2^22"""


def frames(size: Size, wanted: Size, fit: Fit) -> tuple[Frame, Frame]:
    """How both axes, of (H, W), are resized to `wanted`: as Pillow's `fit`, `contain` and `resize` do it."""
    (height, width), (rows, columns) = size, wanted
    ratio, other = width / height, columns / rows
    if fit == "crop":
        shown_w, shown_h = float(width), float(height)
        if ratio > other:
            shown_w = other * height
        elif ratio < other:
            shown_h = width / other
        left, top = (width - shown_w) * 0.5, (height - shown_h) * 0.5
        return Frame(rows, top, top + shown_h, (0, 0)), Frame(columns, left, left + shown_w, (0, 0))
    inner_h, inner_w = rows, columns
    if fit == "pad" and ratio > other:
        inner_h = round(height / width * columns)
    elif fit == "pad" and ratio < other:
        inner_w = round(width / height * rows)
    return _whole(height, inner_h, rows), _whole(width, inner_w, columns)


def _smaller(size: Size, wanted: Size) -> int:
    """By how much Pillow decodes a file smaller for `wanted`; a side then ends with a whole pixel of that size."""
    times = min(size) // (2 * max(wanted))
    return max(step for step in (1, 2, 4, 8) if step <= max(times, 1))


def _rows_first(size: Size, wanted: Size) -> bool:
    """Whether Pillow resizes the height before the width: from 13.0 on, if it loses more than twice as many pixels."""
    fewer = size[0] - wanted[0]
    return _PILLOW >= 13 and fewer > 0 and fewer > 2 * (size[1] - wanted[1])


def _whole(length: int, count: int, wanted: int) -> Frame:
    before = (wanted - count) // 2
    return Frame(count, 0.0, float(length), (before, wanted - count - before))


@lru_cache(maxsize=512)
def _taps(pixels: int, length: int, frame: Frame, device: torch.device) -> _Taps:
    """Pillow's antialiased bicubic filter (Keys, a = -1/2) along an axis; beyond its pixels the last one repeats."""
    start, end = np.float32(frame.start), np.float32(frame.end)  # Pillow takes the corners of a box as such
    scale = float(end - start) / frame.pixels
    widened = max(scale, 1.0)
    centre = float(start) + (np.arange(frame.pixels) + 0.5) * scale
    first = np.maximum(np.trunc(centre - _REACH * widened + 0.5), 0).astype(np.int64)
    last = np.minimum(np.trunc(centre + _REACH * widened + 0.5), length).astype(np.int64)
    pixel = first + np.arange((last - first).max())[:, None]  # (K, N)
    weight = np.where(pixel < last, _bicubic((pixel - centre + 0.5) * (1 / widened)), 0.0)
    total = np.zeros(frame.pixels)
    for row in weight:  # in this order, as a sum of doubles depends on it
        total += row
    whole = weight / total * 2**_BITS
    rounded = np.trunc(whole + np.copysign(0.5, whole)).astype(np.int32)
    beside = ((0, 0), frame.beside)
    pixel, rounded = (np.pad(x, beside, mode="edge") for x in (np.minimum(pixel, pixels - 1), rounded))
    return _Taps(torch.from_numpy(pixel).to(device), torch.from_numpy(rounded).to(device))


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _resampled(x: Tensor, taps: _Taps, axis: int) -> Tensor:
    """(…) uint8 → uint8 with N pixels along `axis`, -1 or -2; sums of whole numbers, so their order is of no matter."""
    shape = list(x.shape)
    shape[axis] = taps.pixel.shape[1]
    total = torch.full(shape, 1 << (_BITS - 1), dtype=torch.int32, device=x.device)
    for pixel, weight in zip(taps.pixel, taps.weight, strict=True):
        total.addcmul_(x.index_select(axis, pixel), weight.unflatten(0, (-1, *[1] * (-1 - axis))))
    return (total >> _BITS).clamp_(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 → (B, 1, H, W)."""
    total = torch.full_like(x[:, :1], 1 << 15, dtype=torch.int32)
    for channel, part in enumerate(_LUMA):
        total.add_(x[:, channel : channel + 1], alpha=part)
    return (total >> 16).to(torch.uint8)


def _in_calls(files: Sequence[Tensor]) -> list[list[Tensor]]:
    """The files in order, in groups that are decoded at once."""
    calls: list[list[Tensor]] = []
    room = 0
    for file in files:
        room -= len(file)
        if room < 0:
            calls.append([])
            room = max(0, _AT_ONCE - len(file))
        calls[-1].append(file)
    return calls


def _decoded(files: list[Tensor], device: torch.device) -> list[Tensor | Exception]:
    """(3, H, W) uint8 on the device for each file; a failure says not of which, so then they go one by one."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return [*decode_jpeg(files, mode=ImageReadMode.RGB, device=device)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if len(files) == 1:
            return [error]
    return [x for file in files for x in _decoded([file], device)]
