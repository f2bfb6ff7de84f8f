"""How large a pixel is: µm per pixel as a file says it, and images brought to one scale."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sslcells.data._decode import ome

COARSEST = 20.0
"""µm per pixel from which on a resolution is not believed: screens and printers have 72 to 1270 dpi"""
_FINEST = 1e-4
_SQUARE = 0.01
"""share by which the two sides of a pixel may differ"""
_INCH, _CENTIMETRE = 25400.0, 10000.0
_SAME = 0.05
"""pixels that a field may drift before it is scaled"""
_UNITS = {2: _INCH, 3: _CENTIMETRE}
"""TIFF's ResolutionUnit → µm"""
_UM = {
    "å": 1e-4, "angstrom": 1e-4, "pm": 1e-6, "picometer": 1e-6, "nm": 1e-3, "nanometer": 1e-3,
    "um": 1.0, "µm": 1.0, "micron": 1.0, "micrometer": 1.0, "mm": 1e3, "millimeter": 1e3,
    "cm": _CENTIMETRE, "centimeter": _CENTIMETRE, "m": 1e6, "meter": 1e6, "in": _INCH, "inch": _INCH,
}  # fmt: skip
_TAGS_SAY = ("", "pixel", "pixels", "inch", "cm")
"""units of ImageJ's that it takes from the tags of other programs, or that are none"""
_RESOLUTION = (282, 283, 296)
"""the tags XResolution, YResolution, ResolutionUnit"""
_APERIO = re.compile(r"\bMPP\s*=\s*([0-9.]+)")


class Scale(NamedTuple):
    """µm per pixel of a file."""

    um: float = 0.0
    """0 where it is not known"""
    origin: str = ""
    """what says so, such as `OME`; or why it is not known"""


UNKNOWN = Scale()


def of_sizes(x: Any, y: Any, unit: Any, origin: str) -> Scale:
    """The scale of pixels of this width and height in a unit that is named."""
    um = _um(unit)
    if x is None:
        return UNKNOWN
    if um is None:
        return Scale(0.0, f"{origin} names the unit {unit!r}")
    width, height = _number(x) * um, _number(x if y is None else y) * um
    if not (width > 0 and height > 0 and math.isfinite(width) and math.isfinite(height)):
        return Scale(0.0, f"{origin} says {x} × {y} {unit}")
    if abs(width - height) > _SQUARE * max(width, height):
        return Scale(0.0, f"{origin} says {width:g} × {height:g} µm: pixels that are not square are not read")
    return Scale(width, origin)


def of_dpi(x: float, y: float, unit: float, origin: str) -> Scale:
    """The scale of a resolution in pixels per `unit` µm, unless screens and printers have such ones."""
    if not (math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0):
        return UNKNOWN
    um = unit / x
    if um >= COARSEST or um < _FINEST:
        named = f"{x:.0f} dpi" if unit == _INCH else f"{um:g} µm"
        return Scale(0.0, f"{origin} say {named}, which is not a microscope's")
    return of_sizes(um, unit / y, "um", origin)


def of_tiff(opened: Any, base: Any) -> Scale:
    """The scale of an opened TIFF's series at full size: by OME's metadata, ImageJ's, Aperio's, or the tags.

    Raises:
        ValueError: if OME's metadata cannot be read.
    """
    found = UNKNOWN
    if opened.is_ome:
        found = _of_ome(opened, base)
    tags = getattr(base.keyframe, "tags", None)
    x, y, unit = (_tag(tags, code) for code in _RESOLUTION)
    if not found.um and not found.origin and opened.is_imagej and x and y:
        named = (opened.imagej_metadata or {}).get("unit")
        if isinstance(named, str) and named.strip().lower() not in _TAGS_SAY:
            found = of_sizes(1 / x, 1 / y, named, "ImageJ")
    if not found.um and not found.origin:
        described = str(getattr(base.keyframe, "description", "") or "")
        mpp = _APERIO.search(described) if described.startswith("Aperio") else None
        if mpp is not None:
            found = of_sizes(mpp[1], mpp[1], "um", "Aperio's description")
    if not found.um and not found.origin and x and y and unit in _UNITS:
        found = of_dpi(x, y, _UNITS[int(unit)], "TIFF tags")
    return found


def of_picture(info: dict[Any, Any]) -> Scale:
    """The scale of a picture that Pillow opened, by its resolution."""
    dpi = info.get("dpi")
    try:
        x, y = (float(n) for n in dpi) if dpi is not None else (0.0, 0.0)
    except (TypeError, ValueError, ZeroDivisionError):
        return UNKNOWN
    return of_dpi(x, y, _INCH, "its dpi") if x and y else UNKNOWN


def of_ngff(image: dict[str, Any], dataset: dict[str, Any], axes: Sequence[Any]) -> Scale:
    """The scale of one level of an OME-Zarr image: its own transformation times the image's."""
    names = [axis.get("name") if isinstance(axis, dict) else axis for axis in axes]
    scales = [_ngff_scale(holder.get("coordinateTransformations"), len(names)) for holder in (dataset, image)]
    if scales[0] is None:
        return UNKNOWN
    sizes = {}
    for at in (names.index("x"), names.index("y")):
        axis = axes[at]
        unit = axis.get("unit") if isinstance(axis, dict) else None
        if unit is None:
            return Scale(0.0, "OME-Zarr names no unit")
        um = _um(unit)
        if um is None:
            return Scale(0.0, f"OME-Zarr names the unit {unit!r}")
        sizes[names[at]] = scales[0][at] * (scales[1][at] if scales[1] is not None else 1.0) * um
    return of_sizes(sizes["x"], sizes["y"], "um", "OME-Zarr")


def field(
    image: Image.Image, size: tuple[int, int], factor: float, centre: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """(H, W) or (H, W, C) of `size` around `centre` (y, x), one pixel of which shows `factor` pixels of the image.

    Without a centre it is the image's. The filter sees what lies beside the field, as if the whole image were brought
    to the scale and then cut. Outside of the image its border pixels are repeated.
    """
    wide, high = image.size
    y, x = centre if centre is not None else (high / 2, wide / 2)
    if abs(factor - 1) * max(size) < _SAME:
        factor = 1.0
        y, x = math.floor(y - size[0] / 2 + 0.5) + size[0] / 2, math.floor(x - size[1] / 2 + 0.5) + size[1] / 2
    rows, upper, lower = _inside(y, size[0], factor, high)
    columns, left, right = _inside(x, size[1], factor, wide)
    box = (left, upper, right, lower)
    if factor == 1:
        values = np.asarray(image.crop((int(left), int(upper), int(right), int(lower))))
    else:
        values = np.asarray(image.resize((len(columns), len(rows)), Image.Resampling.BICUBIC, box=box))
    sides = [(rows.start, size[0] - rows.stop), (columns.start, size[1] - columns.stop), (0, 0)]
    return np.pad(values, sides[: values.ndim], mode="edge")


def _inside(centre: float, count: int, factor: float, length: int) -> tuple[range, float, float]:
    """Which of `count` pixels of a field lie in an image of this length (at least one), and their ends in it."""
    start = centre - count * factor / 2
    first = max(0, math.ceil(-start / factor - 1e-6))
    last = min(count, math.floor((length - start) / factor + 1e-6))
    if first < last:
        return range(first, last), max(0.0, start + first * factor), min(float(length), start + last * factor)
    only = min(max(0, math.floor((length / 2 - start) / factor)), count - 1)
    extent = min(factor, float(length))
    begin = min(max(0.0, start + only * factor), length - extent)
    return range(only, only + 1), begin, begin + extent


def _of_ome(opened: Any, base: Any) -> Scale:
    each = [
        of_sizes(x.get("PhysicalSizeX"), x.get("PhysicalSizeY"), x.get("PhysicalSizeXUnit", "µm"), "OME")
        if x.get("PhysicalSizeYUnit", "µm") == x.get("PhysicalSizeXUnit", "µm")
        else Scale(0.0, "OME names two units")
        for x in ome.pixels(opened.ome_metadata)
    ]
    if len({*each}) == 1:
        return each[0]
    series = list(opened.series)
    return each[series.index(base)] if len(each) == len(series) and base in series else UNKNOWN


def _tag(tags: Any, code: int) -> float:
    """A number, or a ratio, of a tag; 0 where there is none."""
    found = tags.get(code) if tags is not None else None
    try:
        value = found.value if found is not None else 0
        return float(value[0]) / float(value[1]) if isinstance(value, tuple) else float(value)
    except (TypeError, ValueError, ZeroDivisionError, IndexError):
        return 0.0


def _ngff_scale(transformations: Any, count: int) -> list[float] | None:
    for each in transformations if isinstance(transformations, list) else []:
        scale = each.get("scale") if isinstance(each, dict) and each.get("type") == "scale" else None
        if isinstance(scale, list) and len(scale) == count:
            return [_number(n) for n in scale]
    return None


def _um(unit: Any) -> float | None:
    name = str(unit).replace("\\u00B5", "µ").replace("\u03bc", "µ").strip().casefold().replace("\u03bc", "µ")
    name = name.replace("metre", "meter")
    return _UM.get(name, _UM.get(name.removesuffix("s")))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
