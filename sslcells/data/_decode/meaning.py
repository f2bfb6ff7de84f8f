"""What the numbers in an image file mean: which become black and which white, what is colour and what transparent."""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Intensity = Literal["percentile", "full"]
Percentiles = tuple[float, float]
Alpha = Literal["none", "straight", "premultiplied"]

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
        return _image(_eight(_shares(colours, how, meaning, shape)), modes[meaning.colours])
    share = _opacity(opacity, colours, meaning)
    seen = share > 0
    if meaning.alpha == "premultiplied":
        plain = np.divide(colours, share[..., None], where=seen[..., None], out=np.zeros(colours.shape))
        integers = values.dtype.kind in "iu"
        colours = (np.rint(plain).clip(0, np.iinfo(values.dtype).max) if integers else plain).astype(values.dtype)
    eight = np.ones(colours.shape, np.float64)
    if seen.any():  # what is not seen counts neither in the percentiles nor in the range
        eight[seen] = _shares(colours[seen], how, meaning, shape)
    on_white = 1 + share[..., None] * (eight - 1)
    return _image(_eight(on_white), modes[meaning.colours])


def scale(values: NDArray[Any], how: Scaling, meaning: Meaning) -> NDArray[np.uint8]:
    """Intensities of any number type and shape → 0..255 on one scale; see docs/files.md.

    NaN and −∞ become black, +∞ white, and they count in no percentile.

    Raises:
        ValueError: with type and shape, where no value is finite, or `full` would lose what is in them.
    """
    return _eight(_shares(values, how, meaning, values.shape))


def _shares(values: NDArray[Any], how: Scaling, meaning: Meaning, shape: tuple[int, ...]) -> NDArray[Any]:
    """Intensities → 0..1 on one scale; `shape` is the image's, for messages."""
    wide = (values.dtype.kind in "iu" and values.dtype.itemsize > 2) or values.dtype.itemsize > 4
    x: NDArray[np.floating[Any]] = values.astype(np.float64 if wide else np.float32)
    known = np.isfinite(x) if values.dtype.kind == "f" else None
    finite = x if known is None or known.all() else x[known]
    if not finite.size:
        raise ValueError(f"{said(values.dtype, shape)}: none of its values is finite")
    if how.intensity == "percentile":
        finite = -finite if meaning.inverted else finite
        low, high = (float(p) for p in np.percentile(finite, how.percentiles))
        if not high > low:  # most pixels are equal: the few others are what is to be seen
            low, high = float(finite.min()), float(finite.max())
    else:
        low, high = full_range(values.dtype, float(finite.min()), float(finite.max()), how, meaning.bits, shape)
        low, high = (-high, -low) if meaning.inverted else (low, high)
    x = -x if meaning.inverted else x
    span = high - low if high > low else 1.0  # a constant image becomes black
    with np.errstate(invalid="ignore", over="ignore"):
        shares: NDArray[Any] = np.nan_to_num(np.clip((x - low) / span, 0, 1))
    return shares


def _eight(shares: NDArray[Any]) -> NDArray[np.uint8]:
    """0..1 → 0..255."""
    eight: NDArray[np.uint8] = np.rint(shares * 255).astype(np.uint8)
    return eight


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
        if least < 0 or most > 1:
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
