"""Fields of a microscope and their masks: the numbers of a file as they are, and cells cut out of them."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sslcells.data._decode import ZARR, Unreadable, metadata_file, pillow
from sslcells.data._decode.axes import Planes, loaded, picture_layout, stack_layout
from sslcells.data._decode.meaning import Alpha, said, upright
from sslcells.data._decode.ngff import Ngff
from sslcells.data._decode.pixel_size import Scale, of_picture
from sslcells.data._decode.tiff import MAGIC, Tiff


class How(NamedTuple):
    """Which part of a file is a field."""

    z: Planes = "middle"
    level: int = 0
    channels: int | None = None
    """of fields whose file does not name its axes"""


class Field(NamedTuple):
    """The numbers of a field, upright."""

    values: NDArray[Any]
    """(H, W), (H, W, S) of colours, or (C, H, W) of channels"""
    axes: str
    """YX, YXS or CYX"""
    scale: Scale
    alpha: Alpha = "none"
    inverted: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """H and W."""
        height, width = (n for axis, n in zip(self.axes, self.values.shape, strict=True) if axis in "YX")
        return height, width


def read_field(file: str, how: How) -> Field:
    """The numbers of a field.

    Raises:
        Unreadable: if it is no image, or has other axes.
    """
    try:
        opened = _opened(file, how.level)
        if opened is None:
            return _picture(file, how)
        with opened as source:
            samples = dict(zip(source.axes, source.shape, strict=True)).get("C", how.channels)
            stack = samples is not None and samples > 1
            if stack:
                layout = stack_layout(source, int(samples or 0), "auto", how.z, {})
            else:
                layout = picture_layout(source, how.z, {})
            if source.pillows:
                return _picture(file, how)
            meaning = source.meaning(stack)
            values = loaded(source, layout)
            if layout.channels is not None:
                values = np.moveaxis(values, layout.channels, 0 if stack else -1)
            if not stack:
                three = source.coloured(values if values.ndim == 3 else values[..., None])
                values = three if three.shape[2] > 1 else three[..., 0]
            values = values.astype(np.uint8) * np.uint8(255) if values.dtype == bool else values
            axes = "CYX" if stack else "YXS" if values.ndim == 3 else "YX"
            turned = _upright(values, axes, meaning.orientation)
            return Field(turned, axes, source.scale(), meaning.alpha, meaning.inverted)
    except Exception as error:  # the libraries raise whatever happens to break
        raise Unreadable(_reason(error)) from error


def read_mask(file: str, how: How) -> NDArray[np.integer[Any]]:
    """The labels of a mask, 0 where there is no cell: (H, W).

    Raises:
        Unreadable: if it is no image of whole numbers of one plane.
    """
    try:
        opened = _opened(file, how.level)
        if opened is None:
            with Image.open(file, formats=("PNG",)) as image:
                values = pillow.deep_values(image, file) if pillow.deep_png(image) else np.array(image)
                orientation = image.getexif().get(pillow.ORIENTATION, 1)
        else:
            with opened as source:
                layout = picture_layout(source, how.z, {})
                if how.z == "max" and len(layout.at) > 1:
                    raise ValueError("a mask of several planes, of which the maximum is no mask: use --z middle")
                values, orientation = loaded(source, layout), source.meaning(stack=False).orientation
        if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
            values = values[0] if values.shape[0] == 1 else values[..., 0]
        if values.ndim != 2:
            raise ValueError(f"{said(values.dtype, values.shape)}: a mask has one number a pixel, no colours")
        return upright(_whole(values), orientation)
    except UnidentifiedImageError as error:
        raise Unreadable("not a mask: masks are TIFF, PNG or OME-Zarr") from error
    except Exception as error:  # as above
        raise Unreadable(_reason(error)) from error


def write_cell(
    file: Path, values: NDArray[Any], field: Field, um_per_pixel: float | None, compression: str = "zlib"
) -> None:
    """Write a cell that was cut from a field as TIFF, without loss, with its scale.

    Raises:
        OSError: if it cannot be written.
    """
    options: dict[str, Any] = {"photometric": "miniswhite" if field.inverted else "minisblack"}
    if field.axes == "YXS":
        colours = 3 if values.shape[2] >= 3 else 1
        options = options if colours == 1 else {"photometric": "rgb"}
        kind = {"straight": "unassalpha", "premultiplied": "assocalpha", "none": "unspecified"}[field.alpha]
        options |= {"extrasamples": [kind] * (values.shape[2] - colours), "planarconfig": "contig"}
    if um_per_pixel is not None:
        options |= {"resolution": (1e4 / um_per_pixel, 1e4 / um_per_pixel), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(
        file, np.ascontiguousarray(values), compression=compression, metadata={"axes": field.axes}, **options
    )


def window(
    field: Field, mask: NDArray[np.integer[Any]], centre: tuple[float, float], size: tuple[int, int], label: int | None,
    fill: float | None,
) -> NDArray[Any]:  # fmt: skip
    """Of a field `size` (H, W) pixels around `centre` (y, x), in the field's axes.

    What lies outside of the field repeats its border. With `fill` that, and all that is not of this label, has that
    value.
    """
    rows, columns = (np.arange(n) + int(np.floor(at - n / 2 + 0.5)) for at, n in zip(centre, size, strict=True))
    high, wide = field.size
    inside = np.ix_(rows.clip(0, high - 1), columns.clip(0, wide - 1))
    values = field.values[:, inside[0], inside[1]] if field.axes == "CYX" else field.values[inside]
    if fill is None:
        return values
    own = mask[inside] == label
    own &= ((rows >= 0) & (rows < high))[:, None] & ((columns >= 0) & (columns < wide))[None]
    shown = own[..., None] if field.axes == "YXS" else own
    cut: NDArray[Any] = np.where(shown, values, np.asarray(fill).astype(values.dtype))
    return cut


def _opened(file: str, level: int) -> Tiff | Ngff | None:
    if file.lower().endswith(ZARR) or (os.path.isdir(file) and metadata_file(file) is not None):
        return Ngff(file, level)
    if not os.path.isfile(file):
        raise ValueError("not a file")
    with open(file, "rb") as start:
        deep = start.read(4) in MAGIC
    if not deep and level:
        raise ValueError(f"no pyramid, and --level is {level}")
    return Tiff(file, level) if deep else None


def _picture(file: str, how: How) -> Field:
    with Image.open(file, formats=pillow.FORMATS) as image:
        scale = of_picture(image.info)
        if how.channels is not None and how.channels not in (1, 3):
            raise ValueError(f"not a TIFF file, and --channels is {how.channels}")
        if pillow.deep_png(image):
            values = pillow.deep_values(image, file)
            orientation = image.getexif().get(pillow.ORIENTATION, 1)
            axes = "YX" if values.ndim == 2 else "YXS"
            alpha: Alpha = "straight" if values.ndim == 3 and values.shape[2] in (2, 4) else "none"
            return Field(_upright(values, axes, orientation), axes, scale, alpha)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            return Field(np.array(image), "YX", scale)
        flat = image if image.mode in ("L", "RGB") else image.convert("RGBA" if _clear(image) else "RGB")
        values = np.array(flat)
        return Field(values, "YX" if values.ndim == 2 else "YXS", scale, "straight" if _clear(image) else "none")


def _clear(image: Image.Image) -> bool:
    return bool(image.has_transparency_data)


def _upright(values: NDArray[Any], axes: str, orientation: int) -> NDArray[Any]:
    if axes != "CYX":
        return upright(values, orientation)
    return np.moveaxis(upright(np.moveaxis(values, 0, -1), orientation), -1, 0)


def _whole(values: NDArray[Any]) -> NDArray[np.integer[Any]]:
    """Labels as whole numbers."""
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or (values != np.floor(values)).any():
            raise ValueError(f"{said(values.dtype, values.shape)}: labels are whole numbers")
    elif values.dtype.kind not in "bui":
        raise ValueError(f"{said(values.dtype, values.shape)}: labels are whole numbers")
    if values.size and (values.min() < 0 or values.max() >= 2**53):
        raise ValueError(f"labels from {values.min()} to {values.max()}: labels are 0 for no cell, and above for cells")
    return values.astype(np.int32 if values.max(initial=0) < 2**31 else np.int64)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:400] or type(error).__name__
