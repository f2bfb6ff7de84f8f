"""From files to images: files that are parts of one image, and files that hold several."""

import posixpath
from collections.abc import Sequence
from typing import NamedTuple

from sslcells.data._decode import ZARR, Decoder, Header, plane_names, plane_sizes, split_plane

_SETS = (".ome.tif", ".ome.tiff")
_PLANES = (".tif", ".tiff", ZARR)


class Images(NamedTuple):
    """The images in a list of files."""

    names: list[str]
    """path of each, with the plane where every plane is an image"""
    headers: list[Header | None]
    parts: dict[str, tuple[int, str]]
    """for Found: the files that belong to another file's image"""

    @property
    def known(self) -> tuple[list[str], list[Header]]:
        """The images whose header is known, and their headers."""
        known = [(name, h) for name, h in zip(self.names, self.headers, strict=True) if h is not None]
        return [name for name, _ in known], [h for _, h in known]


def to_look_at(names: Sequence[str], decoder: Decoder) -> list[str]:
    """The files of which only the header says how many images they are."""
    endings = (*_SETS, *_PLANES) if decoder.z == "each" else _SETS
    in_zarr = f"{ZARR}/"
    return [n for n in names if n.lower().endswith(endings) or (decoder.z == "each" and in_zarr in n.lower())]


def images_of(names: Sequence[str], headers: Sequence[Header | None], decoder: Decoder) -> Images:
    """The images in files: one for each set of OME-TIFF files, and with `z: each` one for each plane."""
    here = set(names)
    parts: list[str] = []
    images: list[tuple[str, Header | None]] = []
    for name, header in zip(names, headers, strict=True):
        if header is not None and header.part and posixpath.join(posixpath.dirname(name), header.part) in here:
            parts.append(name)
        elif header is not None and header.planes and decoder.z == "each":
            images += [(f"{name}{ending}", header) for ending in plane_names(plane_sizes(header.planes))]
        else:
            images.append((name, header))
    counted = {"further files of OME-TIFF sets": (len(parts), parts[0])} if parts else {}
    return Images([n for n, _ in images], [h for _, h in images], counted)


def file_of(name: str, decoder: Decoder) -> str:
    """The file of an image: without the plane."""
    return split_plane(name)[0] if decoder.z == "each" else name
