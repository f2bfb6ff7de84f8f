"""OME-Zarr folders (ngff 0.4 and 0.5) through the library `zarr`, an extra: a level of the pyramid, part by part."""

import importlib
import importlib.util
import json
import os
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sslcells.data._decode.axes import MOST, check_level
from sslcells.data._decode.meaning import Meaning
from sslcells.data._decode.pixel_size import Scale, of_ngff

ZARR = ".zarr"
_METADATA = (".zattrs", "zarr.json")
_MOST_METADATA = 2**24
"""bytes of a metadata file that are read"""
_AXES = {"t": "T", "c": "C", "z": "Z", "y": "Y", "x": "X"}


def metadata_file(folder: str) -> str | None:
    """The file in this folder that makes it an OME-Zarr image, or None if it is none."""
    for name in _METADATA:
        file = os.path.join(folder, name)
        if os.path.isfile(file):
            try:
                if _multiscales(_attributes(file)):
                    return file
            except (OSError, ValueError):
                return file  # damaged: reading it says so
    return None


class Ngff:
    """One level of an OME-Zarr image, as an `axes.Source`."""

    def __init__(self, folder: str, level: int = 0) -> None:
        zarr = _library()
        file = metadata_file(folder)
        if file is None:
            raise ValueError("a folder without OME-Zarr metadata (multiscales in .zattrs or zarr.json)")
        scales = _multiscales(_attributes(file))
        if not isinstance(scales, list) or not scales or not isinstance(scales[0], dict):
            raise ValueError("its OME-Zarr metadata name no image")
        levels, axes = scales[0].get("datasets"), scales[0].get("axes")
        if not isinstance(levels, list) or not isinstance(axes, list):
            raise ValueError("its OME-Zarr metadata name no levels or no axes (versions 0.4 and 0.5 are read)")
        check_level(level, len(levels))
        path = levels[level].get("path") if isinstance(levels[level], dict) else None
        names = [str(axis.get("name") if isinstance(axis, dict) else axis) for axis in axes]
        if not isinstance(path, str) or ".." in path.split("/") or any(name not in _AXES for name in names):
            raise ValueError(f"its OME-Zarr metadata name the axes {names} and the path {path!r}, which are not read")
        self._folder = os.path.join(folder, path)
        self._array: Any = zarr.open_array(self._folder, mode="r")
        if len(names) != self._array.ndim:
            raise ValueError(f"it has {self._array.ndim} axes where its metadata name {names}")
        if not [name for name in os.listdir(self._folder) if not name.startswith(".") and name != "zarr.json"]:
            raise ValueError("all of its chunks are missing")  # of some, Zarr says that they are even
        self._all = "".join(_AXES[name] for name in names)
        kept = [(a, int(n)) for a, n in zip(self._all, self._array.shape, strict=True) if n != 1 or a in "YX"]
        self.axes, self.shape = "".join(a for a, _ in kept), tuple(n for _, n in kept)
        self.dtype = self._array.dtype
        self._scale = of_ngff(scales[0], levels[level], axes)

    def load(self, at: dict[str, int]) -> NDArray[Any]:
        """The values at these places; only the chunks that hold them are read."""
        _bounded(self._array, self._folder)
        index = tuple(
            at.get(axis, slice(None) if n != 1 or axis in "YX" else 0)
            for axis, n in zip(self._all, self._array.shape, strict=True)
        )
        return np.asarray(self._array[index])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    pillows = False
    """Pillow reads none of it"""

    def meaning(self, stack: bool = False) -> Meaning:
        """Intensities: OME-Zarr has no colours, no alpha and no palette."""
        return Meaning()

    def coloured(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values as they are."""
        return values

    def part_of(self, file: str) -> str:
        """Empty: a folder is whole."""
        return ""

    def scale(self) -> Scale:
        """µm per pixel of the level."""
        return self._scale

    def others(self) -> int:
        """None: one folder is one image."""
        return 0

    def kind(self) -> str:
        """Such as `OME-Zarr grey 16 bit`."""
        dtype = np.dtype(self.dtype)
        bits = f"{8 * dtype.itemsize} bit" + " signed" * (dtype.kind == "i")
        return f"OME-Zarr {bits if dtype.kind in 'ui' else dtype}"


def _bounded(array: Any, folder: str) -> None:
    """Raise where a chunk is too large, or its file larger than what it should hold: it may unpack without end."""
    size = float(np.prod([float(n) for n in array.chunks])) * np.dtype(array.dtype).itemsize
    if size > MOST:
        raise ValueError(f"its chunks are {size / 2**30:.1f} GiB each, and one image may take {MOST / 2**30:g}")
    whole = getattr(array, "shards", None) or array.chunks
    most = int(1.5 * np.prod(whole) * np.dtype(array.dtype).itemsize) + 2**16
    for where, _, names in os.walk(folder):
        for name in names:
            if os.path.getsize(os.path.join(where, name)) > most:
                raise ValueError(f"its chunk {name} is larger than the {most} bytes that it may take")


def _library() -> Any:
    if importlib.util.find_spec("zarr") is None:
        raise ValueError("OME-Zarr needs the library zarr: pip install 'sslcells[zarr]'")
    return importlib.import_module("zarr")


def _attributes(file: str) -> dict[str, Any]:
    if os.path.getsize(file) > _MOST_METADATA:
        raise ValueError(f"{os.path.basename(file)} is larger than {_MOST_METADATA >> 20} MiB")
    with open(file, encoding="utf-8") as opened:
        try:
            found = json.load(opened)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.path.basename(file)} is damaged: {error}") from None
    if file.endswith("zarr.json"):
        found = found.get("attributes") if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _multiscales(attributes: dict[str, Any]) -> Any:
    """0.5 has them below `ome`, 0.4 at the top."""
    ome = attributes.get("ome")
    return (ome if isinstance(ome, dict) else attributes).get("multiscales")
