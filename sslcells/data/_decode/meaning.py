"""What the numbers in an image file mean: which become black and which white, what is colour and what transparent."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Intensity = Literal["percentile", "full"]
Percentiles = tuple[float, float]
Alpha = Literal["none", "straight", "premultiplied"]

_BLOCK = 2**20
"""values that are scaled at a time"""
_BITS = (8, 10, 12, 14, 16, 32)
"""depths of cameras and files"""


class Scaling(NamedTuple):
    """How numbers that are more than 8 bits become 0..255."""

    intensity: Intensity
    percentiles: Percentiles
    range: tuple[float, float] | None


class Meaning(NamedTuple):
    """What a file's own tags say of its samples."""

    colours: int = 1
    """1 for grey, 3 for red, green and blue; further samples are alpha, or left out"""
    alpha: Alpha = "none"
    """the sample after the colours: none, or opacity, by which the colours are already multiplied or not"""
    inverted: bool = False
    """True if low numbers are white"""
    bits: int | None = None
    """significant bits, where the file names them"""
    orientation: int = 1
    """as in EXIF"""


def upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn (H, W) or (H, W, S) as EXIF's orientation 1 to 8 says."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values


def picture(values: NDArray[Any], meaning: Meaning, how: Scaling) -> Image.Image:
    """(H, W, S) samples of any number type → an upright image of Pillow's: L or RGB, up to 8 bits with A or a too.

    The colours of an image share one scale. Up to 8 bits nothing is scaled but to 0..255.

    Raises:
        ValueError: with type and shape, where no scale does justice to the values.
    """
    values = upright(values, meaning.orientation)
    colours = values[..., : meaning.colours]
    opacity = values[..., meaning.colours] if meaning.alpha != "none" else None
    modes = {1: "L", 3: "RGB"}
    if values.dtype in (np.bool_, np.uint8):
        each = [_to_eight(x, meaning.bits) for x in (colours, *([] if opacity is None else [opacity]))]
        colours = 255 - each[0] if meaning.inverted else each[0]
        if opacity is None:
            return _image(colours, modes[meaning.colours])
        ending = "a" if meaning.alpha == "premultiplied" else "A"
        return _image(np.concatenate([colours, each[1][..., None]], 2), modes[meaning.colours] + ending)
    shape = colours.shape if meaning.colours > 1 else colours.shape[:2]
    if opacity is None:
        return _image(_between(colours, *_limits(colours, how, meaning, shape)), modes[meaning.colours])
    share = _opacity(opacity, colours, meaning)
    if meaning.alpha == "premultiplied":
        colours = _divided(colours, share)
    seen = share > 0
    # What is not seen counts neither in the percentiles nor in the range.
    limits = _limits(colours[seen], how, meaning, shape) if seen.any() else (0.0, 1.0)
    return _image(_between(colours, *limits, share), modes[meaning.colours])


def scale(values: NDArray[Any], how: Scaling, meaning: Meaning) -> NDArray[np.uint8]:
    """Intensities (N, …) of any number type → 0..255 on one scale; see docs/files.md.

    NaN and −∞ become black, +∞ white, and they count in no percentile.

    Raises:
        ValueError: with type and shape, where no value is finite, or `full` would lose what is in them.
    """
    return _between(values, *_limits(values, how, meaning, values.shape))


def _limits(values: NDArray[Any], how: Scaling, meaning: Meaning, shape: tuple[int, ...]) -> tuple[float, float]:
    """The numbers that become black and white; `shape` is the image's, for messages."""
    finite = values
    if values.dtype.kind == "f":
        known = np.isfinite(values)
        finite = values if known.all() else values[known]
    if not finite.size:
        raise ValueError(f"{said(values.dtype, shape)}: none of its values is finite")
    least, most = float(finite.min()), float(finite.max())
    if how.intensity == "percentile":
        low, high = _percentiles(finite, how.percentiles, meaning.inverted)
        if not high > low:  # most pixels are equal: the few others are what is to be seen
            low, high = least, most
    else:
        low, high = full_range(values.dtype, least, most, how, meaning.bits, shape)
    return (high, low) if meaning.inverted else (low, high)


def _percentiles(values: NDArray[Any], percentiles: Percentiles, inverted: bool) -> tuple[float, float]:
    """Two percentiles of finite values, counted from the largest value if low numbers are white."""
    each = [100 - p for p in percentiles[::-1]] if inverted else list(percentiles)
    if values.dtype.kind not in "iu" or values.dtype.itemsize > 2:
        wide = np.float64 if values.dtype.kind in "iu" or values.dtype.itemsize > 4 else np.float32
        low, high = np.percentile(values.astype(wide, copy=False), each)
        return float(low), float(high)
    least = int(values.min())
    counts = np.zeros(int(values.max()) - least + 1, np.int64)
    for rows in _blocks(values):  # a copy of all would take a multiple of the image
        counts += np.bincount(rows.ravel().astype(np.int64) - least, minlength=len(counts))
    ends = counts.cumsum()
    out = []
    for p in each:
        place = (values.size - 1) * p / 100
        below, above = np.searchsorted(ends, [np.floor(place), np.ceil(place)], side="right") + least
        out.append(float(below) + (place - np.floor(place)) * float(above - below))
    return out[0], out[1]


def _between(values: NDArray[Any], black: float, white: float, share: NDArray[Any] | None = None) -> NDArray[np.uint8]:
    """Scale from black to white to 0..255; with the opacity `share`, laid on white. A constant image is black."""
    wide = (values.dtype.kind in "iu" and values.dtype.itemsize > 2) or values.dtype.itemsize > 4
    span = white - black if white != black else 1.0
    out = np.empty(values.shape, np.uint8)
    opacities = repeat(None) if share is None else _blocks(share, values[:1].size)
    for rows, scaled, opacity in zip(_blocks(values), _blocks(out), opacities, strict=False):
        with np.errstate(invalid="ignore", over="ignore"):
            x: Any = rows.astype(np.float64 if wide else np.float32)
            x = (x - black) / span
        x = np.nan_to_num(x.clip(0, 1))
        if opacity is not None:
            x = 1 + opacity[..., None] * (x - 1)
        scaled[...] = np.rint(x * 255)
    return out


def _divided(colours: NDArray[Any], share: NDArray[Any]) -> NDArray[Any]:
    """(H, W, S) colours that are multiplied by their opacity (H, W) → as they were, in their number type."""
    out = np.zeros_like(colours)
    for rows, plain, opacity in zip(_blocks(colours), _blocks(out), _blocks(share, colours[:1].size), strict=True):
        x = np.divide(rows, opacity[..., None], where=opacity[..., None] > 0, out=np.zeros(rows.shape))
        plain[...] = np.rint(x).clip(0, np.iinfo(out.dtype).max) if out.dtype.kind in "iu" else x
    return out


def _blocks(values: NDArray[Any], row: int | None = None) -> Iterator[NDArray[Any]]:
    """Some rows of an array at a time, of `row` values each, so that floats of all of it are never kept."""
    step = max(1, _BLOCK // max(1, values[:1].size if row is None else row))
    return (values[i : i + step] for i in range(0, len(values), step))


def full_range(
    dtype: np.dtype[Any], least: float, most: float, how: Scaling, bits: int | None, shape: tuple[int, ...]
) -> tuple[float, float]:
    """The numbers that mean black and white with `intensity=full`, of an image from `least` to `most`.

    Raises:
        ValueError: where neither the file nor `range` says it, and the type's own range would lose what is in it.
    """
    if how.range is not None:
        return how.range
    what = f"{said(dtype, shape)} from {least:g} to {most:g}"
    advice = "set data.range=[black, white], or data.intensity=percentile"
    if dtype.kind == "i":
        raise ValueError(f"{what}: a signed type does not say what is black and what white: {advice}")
    if dtype.kind == "f":
        if least < 0 or most > 1 + 1e-6:  # a colour divided by its opacity is rounded
            raise ValueError(f"{what}: not within 0 to 1: {advice}")
        top = 1.0
    else:
        top = float(2**bits - 1 if bits else np.iinfo(dtype).max)
        if most > top:
            raise ValueError(f"{what}: more than the {bits} significant bits that the file names: {advice}")
    if bits is None and dtype.itemsize > 1 and 0 < most < top / 4:
        likely = "" if dtype.kind == "f" else f", such as {[0, 2 ** next(b for b in _BITS if most < 2**b) - 1]}"
        raise ValueError(f"{what}: less than a quarter of 0 to {top:g}, of which grey levels would be lost: "
                         f"{advice}{likely}")  # fmt: skip
    return 0.0, top


def said(dtype: Any, shape: tuple[int, ...]) -> str:
    """Such as `uint16 (480, 640, 3)`."""
    return f"{dtype} {tuple(int(n) for n in shape)}"


def number(dtype: Any, shape: tuple[int, ...]) -> None:
    """Raise a ValueError with type and shape unless these are whole or real numbers."""
    if dtype is None or np.dtype(dtype).kind not in "buif":
        raise ValueError(f"{said(dtype, shape)}: numbers of a type that is not read")


def _to_eight(values: NDArray[Any], bits: int | None) -> NDArray[np.uint8]:
    """Up to 8 bits → 0..255."""
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if bits is None or bits >= 8:
        return values
    scaled: NDArray[np.uint8] = np.rint(values.clip(0, 2**bits - 1) * (255 / (2**bits - 1))).astype(np.uint8)
    return scaled


def _opacity(alpha: NDArray[Any], colours: NDArray[Any], meaning: Meaning) -> NDArray[np.float64]:
    """Opacity 0..1 of (H, W). Of a 12-bit image in 16 bits the opaque may be 4095, as its colours go no further."""
    kind, most = alpha.dtype.kind, float(np.nan_to_num(alpha).max(initial=0))
    top = 1.0 if kind == "f" else float(np.iinfo(alpha.dtype).max)
    if kind != "f" and meaning.bits is not None:
        top = float(2**meaning.bits - 1)
    elif kind != "f" and most in [2.0**bits - 1 for bits in _BITS] and float(colours.max(initial=0)) <= most:
        top = most
    least = float(np.nan_to_num(alpha).min(initial=0))
    if least < 0 or most > top or (0 < most < top / 4):
        raise ValueError(f"{said(alpha.dtype, (*alpha.shape, meaning.colours + 1))}: its opacity reaches {most:g}, "
                         f"and what is opaque is not known")  # fmt: skip
    share: NDArray[np.float64] = np.nan_to_num(alpha.astype(np.float64)) / top
    return share


def _image(values: NDArray[np.uint8], mode: str) -> Image.Image:
    height, width, samples = values.shape
    flat = np.ascontiguousarray(values[..., 0] if samples == 1 else values)
    return Image.frombytes(mode, (width, height), flat.tobytes())
