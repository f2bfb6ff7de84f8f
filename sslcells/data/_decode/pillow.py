"""Pictures through Pillow: JPEG, PNG, BMP, WebP and GIF of 8 bits; PNG of 16 bits through imagecodecs.

Pillow keeps only 8 of these where there are colours or alpha.
"""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sslcells.data._decode.axes import MOST
from sslcells.data._decode.meaning import Meaning, Scaling, picture
from sslcells.data._decode.meaning import upright as turned

# Listed, as Pillow would otherwise try every format, including PostScript, which runs an interpreter.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")
ORIENTATION = 0x0112
TURNED = range(5, 9)  # the EXIF orientations that swap height and width

_MODES = {"1": "black and white", "L": "grey", "P": "palette", "I": "grey", "F": "grey", "LA": "grey and alpha"}
_DEEP = {"1": "1 bit", "I": "32 bit", "F": "float32", "I;16": "16 bit", "I;16B": "16 bit", "I;16L": "16 bit"}


def deep_png(image: Image.Image) -> bool:
    """True for a PNG of 16 bits a sample, by its header."""
    return image.format == "PNG" and any("16B" in str(tile[3]) for tile in getattr(image, "tile", ()))


def deep_values(image: Image.Image, file: str) -> NDArray[Any]:
    """The samples of an opened PNG of 16 bits: (H, W) or (H, W, S) uint16."""
    size = image.width * image.height * 2 * len(image.getbands())
    if size > MOST:
        raise ValueError(
            f"uint16 {(image.height, image.width, len(image.getbands()))}: {size / 2**30:.1f} GiB, and one image may "
            f"take {MOST / 2**30:g}: cut it into fields"
        )
    try:
        codecs = importlib.import_module("imagecodecs")
    except ImportError:
        raise ValueError("PNG of 16 bits needs the library imagecodecs: pip install imagecodecs") from None
    with open(file, "rb") as opened:
        values: NDArray[Any] = codecs.png_decode(opened.read())
    return values


def upright_values(image: Image.Image, file: str) -> NDArray[Any]:
    """The samples of an opened picture, upright: (H, W) or (H, W, S)."""
    if not deep_png(image):
        return np.array(ImageOps.exif_transpose(image))
    return turned(deep_values(image, file), _orientation(image, file))


def deep_picture(image: Image.Image, file: str, how: Scaling) -> Image.Image:
    """An opened PNG of 16 bits → an upright picture of 8."""
    values = deep_values(image, file)
    samples = values if values.ndim == 3 else values[..., None]
    orientation = _orientation(image, file)
    count = samples.shape[2]
    clear = _clear(image, samples)
    if clear is not None:
        samples = np.concatenate([samples, clear[..., None]], 2)
        count += 1
    colours = 3 if count >= 3 else 1
    alpha = "straight" if count in (2, 4) else "none"
    return picture(samples, Meaning(colours, alpha, orientation=orientation), how)  # type: ignore[arg-type]


def _orientation(image: Image.Image, file: str) -> int:
    return int(image.getexif().get(ORIENTATION, 1)) if _may_be_turned(file) else 1


def _may_be_turned(file: str) -> bool:
    """Whether a PNG names its orientation anywhere; looking for it properly decodes the image once more."""
    with open(file, "rb") as opened:
        data = opened.read()
    return any(name in data for name in (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type"))


def _clear(image: Image.Image, samples: NDArray[Any]) -> NDArray[np.uint16] | None:
    """(H, W) opacity of a PNG one of whose colours is transparent."""
    named = image.info.get("transparency")
    if named is None or samples.shape[2] not in (1, 3):
        return None
    return np.where((samples == np.asarray(named, np.uint16)).all(2), 0, 65535).astype(np.uint16)


def flat(image: Image.Image, how: Scaling, channels: int) -> Image.Image:
    """An upright picture of any mode → L or RGB of 8 bits, on white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = picture(np.asarray(image)[..., None], Meaning(), how)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def upright(image: Image.Image, most: int | None) -> None:
    """Turn a picture upright in place; a JPEG is decoded at no more than it takes for `most` pixels a side."""
    if most is not None:
        # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the time; twice the size leaves the rest to the fit.
        image.draft(None, (2 * most, 2 * most))
    ImageOps.exif_transpose(image, in_place=True)


def kind(image: Image.Image) -> str:
    """Such as `PNG RGB 8 bit`, with the bit depth of the file, not of Pillow's mode."""
    bits = "16 bit" if deep_png(image) else _DEEP.get(image.mode, "8 bit")
    return f"{image.format} {_MODES.get(image.mode.partition(';')[0], image.mode)} {bits}"
