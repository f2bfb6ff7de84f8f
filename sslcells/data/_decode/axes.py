"""Which numbers of a file are one image, by the axes that it names: Y, X, S samples, C channels, Z, T, pages."""

import re
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sslcells.data._decode.meaning import number, said

Stack = Literal["auto", "first", "last"]
Planes = Literal["max", "middle", "each"]

MOST = 2**29
"""bytes that one image may take when it is decoded"""
_PLANES = "TZ"
_PAGES = "IQ"
"""tifffile's names of axes of which the file says nothing"""
_PLANE = re.compile(r"^(.+)#((?:[tz]\d+)+)$", re.DOTALL)


class Source(Protocol):
    """An array in a file, of which parts can be loaded."""

    axes: str
    """one letter an axis, in the file's order; axes of length 1 are left out, except Y and X"""
    shape: tuple[int, ...]
    dtype: Any

    def load(self, at: dict[str, int]) -> NDArray[Any]:
        """The values where these axes are at these places; the other axes are left, in the file's order."""
        ...


class Layout(NamedTuple):
    """How one image lies in a Source."""

    at: list[dict[str, int]]
    """the places along the other axes; of several the maximum is the image"""
    axes: str
    """the axes of the image, in the file's order"""
    shape: tuple[int, ...]
    channels: int | None
    """the axis of these that holds the channels or samples; None if there is none"""
    planes: dict[str, int]
    """axis of planes (z, t) → number of planes, where there are several"""
    pages: int
    """pages of unknown meaning, of which the first is read"""

    @property
    def size(self) -> tuple[int, int]:
        """H and W."""
        height, width = (n for axis, n in enumerate(self.shape) if axis != self.channels)
        return height, width


def check_level(level: int, levels: int) -> None:
    """Raise a ValueError if a pyramid of so many levels has no such one."""
    if level >= levels:
        raise ValueError(f"level {level} of {levels}: data.level is at most {levels - 1}")


def split_plane(file: str) -> tuple[str, dict[str, int]]:
    """`cells.tif#t0z3` → `cells.tif` and the plane's places along T and Z; a name without a plane has none."""
    found = _PLANE.match(file)
    if found is None:
        return file, {}
    return found[1], plane_sizes(found[2])


def plane_sizes(header: str) -> dict[str, int]:
    """`t2z5`, of a Header → the number of planes along T and Z."""
    return {axis.upper(): int(n) for axis, n in re.findall(r"([tz])(\d+)", header)}


def plane_names(planes: dict[str, int]) -> list[str]:
    """The endings of names, such as `#t0z3`, of the planes of a file with this many along each axis."""
    places = product(*(range(n) for n in planes.values()))
    return ["#" + "".join(f"{a.lower()}{i}" for a, i in zip(planes, place, strict=True)) for place in places]


def picture_layout(source: Source, z: Planes, plane: dict[str, int]) -> Layout:
    """Where a grey or colour image lies: one plane of Y, X and samples.

    Raises:
        ValueError: with type, shape and axes, if there are channels, or axes of another meaning.
    """
    _known(source, _PAGES + _PLANES + "YXSC")
    length = dict(zip(source.axes, source.shape, strict=True))
    pages = [(axis, n) for axis, n in zip(source.axes, source.shape, strict=True) if axis in _PAGES]
    if count := length.get("C"):
        raise ValueError(
            f"{_described(source)}: {count} channels are not colours: set data.stack=auto data.channels={count}"
        )
    chosen = _planes(source, z, plane)
    at = [{**place, **{axis: 0 for axis, _ in pages}} for place in chosen]
    layout = _layout(source, at, int(np.prod([n for _, n in pages])))
    return layout._replace(channels=layout.axes.index("S") if "S" in layout.axes else None)


def stack_layout(source: Source, channels: int, stack: Stack, z: Planes, plane: dict[str, int]) -> Layout:
    """Where an image of several channels lies: the axis that the file calls channels (C) or samples (S), or `stack`.

    Where the file says nothing, `auto` takes the first or the last of three axes, if exactly one has the right length.

    Raises:
        ValueError: with the shape, if there are other channels than these, or both axes may be them.
    """
    _known(source, _PAGES + _PLANES + "YXSC")
    overruled = stack != "auto" and len(source.axes) == 3 and not set(source.axes) & set("CS")
    at = [dict[str, int]()] if overruled else _planes(source, z, plane)
    layout = _layout(source, at, 1)
    shape, names = layout.shape, layout.axes
    known = f" ({names})" if set(names) - set(_PAGES + "YX") else ""
    what = f"it holds {_times(shape)} values{known}"
    if len(shape) == 2 and channels == 1:
        return layout
    if len(shape) != 3:
        hint = ""
        if len(source.shape) == 3:
            hint = f" of {_times(source.shape)} ({source.axes}): data.stack=first or last takes an axis as channels"
        raise ValueError(f"{what}{hint}, not {channels} channels of one plane")
    fits = [axis for axis in (0, 2) if shape[axis] == channels]
    named = [axis for axis in fits if names[axis] in "CS"]
    asked = {"first": [0], "last": [2], "auto": named if len(named) == 1 else fits}[stack]
    if len(asked) > 1:
        raise ValueError(f"{what}: the channels may be first or last; set data.stack=first or last")
    if not asked or asked[0] not in fits:
        where = {"first": "first", "last": "last", "auto": "first or last"}[stack]
        raise ValueError(f"{what}: {channels} channels are not the {where} of these")
    return layout._replace(channels=asked[0])


def loaded(source: Source, layout: Layout) -> NDArray[Any]:
    """The values of an image, its axes in the file's order; the maximum of several planes."""
    values = source.load(layout.at[0])
    for at in layout.at[1:]:
        other = source.load(at)
        values = np.fmax(values, other) if values.dtype.kind == "f" else np.maximum(values, other)
    if values.shape != layout.shape:
        raise ValueError(f"it holds {said(values.dtype, values.shape)} values where it names {_times(layout.shape)}")
    return values


def _planes(source: Source, z: Planes, plane: dict[str, int]) -> list[dict[str, int]]:
    """The places of the planes that make one image."""
    sizes = _sizes(source)
    if z == "middle":
        return [{axis: n // 2 for axis, n in sizes.items()}]
    if z == "max" or not sizes:
        return [dict(zip(sizes, place, strict=True)) for place in product(*(range(n) for n in sizes.values()))]
    if not plane:
        return [dict.fromkeys(sizes, 0)]  # every plane is an image, and this is the header of them all
    if set(plane) != set(sizes) or any(plane[axis] >= n for axis, n in sizes.items()):
        raise ValueError(f"{_described(source)}: it has no such plane")
    return [plane]


def _sizes(source: Source) -> dict[str, int]:
    return {axis: n for axis, n in zip(source.axes, source.shape, strict=True) if axis in _PLANES}


def _layout(source: Source, at: list[dict[str, int]], pages: int) -> Layout:
    number(source.dtype, source.shape)
    kept = [(axis, n) for axis, n in zip(source.axes, source.shape, strict=True) if axis not in at[0]]
    axes, shape = "".join(axis for axis, _ in kept), tuple(int(n) for _, n in kept)
    if not {"Y", "X"} <= set(axes) or 0 in shape:
        raise ValueError(f"{_described(source)}: no image")
    size = np.dtype(source.dtype).itemsize * int(np.prod([float(n) for n in shape]))
    if size > MOST:
        raise ValueError(
            f"{_described(source)}: {size / 2**30:.1f} GiB, and one image may take {MOST / 2**30:g}: cut it into "
            f"fields, or set data.level if it is a pyramid"
        )
    planes = _sizes(source) if at[0].keys() & set(_PLANES) else {}
    return Layout(at, axes, shape, None, planes, pages)


def _known(source: Source, axes: str) -> None:
    named = [axis for axis in source.axes if axis not in _PAGES]
    if len(set(named)) != len(named) or set(source.axes) - set(axes):
        raise ValueError(f"{_described(source)}: axes that are not read")


def _described(source: Source) -> str:
    return f"{said(source.dtype, source.shape)} {source.axes}"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
