"""Masks of segmented cells: which file is the mask of which field, and where its cells are."""

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sslcells.config import ConfigError
from sslcells.data._decode import ZARR, Unreadable, metadata_file
from sslcells.data._names import composed

_SUFFIXES = (".tif", ".tiff", ".png")
_ENDINGS = (".ome.tiff", ".ome.tif", ".ome.zarr", ".tiff", ".tif", ".png", ".zarr", ".jpeg", ".jpg", ".bmp", ".webp")
_WORDS = "cp[-_ ]?masks?|masks?|seg|segmentation|labels?|label[-_ ]?(?:image|map)|stardist|instances?"
_AFTER = re.compile(rf"[-_. ](?:{_WORDS})$", re.IGNORECASE)
_COUNTED = 2**22
"""labels up to this number are counted, larger ones sorted"""
_BEFORE = re.compile(rf"^(?:{_WORDS})[-_. ]", re.IGNORECASE)


class Pairs(NamedTuple):
    """Fields and their masks, and what has no partner."""

    fields: list[str]
    masks: list[str]
    """path of the mask of each, as it can be opened"""
    without: list[str]
    """fields without a mask"""
    alone: list[str]
    """masks without a field"""


class Cells(NamedTuple):
    """The cells of one mask, in the order of their labels."""

    label: NDArray[np.int64]
    """(N,) the number in the mask"""
    area: NDArray[np.int64]
    """(N,) px"""
    centre: NDArray[np.float64]
    """(N, 2) y and x of the centroid in px from the upper left corner of the field"""
    box: NDArray[np.int64]
    """(N, 4) left, upper, right and lower edge"""
    border: NDArray[np.bool_]
    """(N,) True if it touches the border of the field"""
    pieces: NDArray[np.int64]
    """(N,) parts that do not touch each other"""

    def only(self, which: NDArray[np.int64]) -> "Cells":
        """Some of them."""
        label, area, centre, box, border, pieces = self
        return Cells(label[which], area[which], centre[which], box[which], border[which], pieces[which])


def pair(fields: Sequence[str], root: Path, masks: Path | None, label: str | None = None) -> Pairs:
    """Find the mask of each field: of its own name, with a word such as `_masks`, or the labels of an OME-Zarr image.

    `fields` are paths below `root`; `masks` is the folder of the masks, by default that of the fields. In the folder of
    the fields itself, a file is a mask only if its name says so.

    Raises:
        ConfigError: if a field may have several masks, or none has one.
    """
    where = root if masks is None else masks
    apart = os.path.realpath(where) != os.path.realpath(root)
    inside = os.path.relpath(os.path.realpath(root), os.path.realpath(where)).replace(os.sep, "/")
    candidates = sorted(name for name in _files(where) if not apart or not f"{name}/".startswith(f"{inside}/"))
    named = {name: _stems(name, apart) for name in candidates}
    inner = {name: found for name in fields if (found := _inside_zarr(name, root, where, label)) is not None}
    ours = [name for name in fields if name in inner or apart or not _is_mask(name, named, fields)]
    of_stem = defaultdict[str, list[str]](list)
    for name, stems in named.items():
        for stem in stems:
            of_stem[stem].append(name)
    alike = Counter(stem_of(name) for name in ours)
    of: dict[str, str] = dict(inner)
    used: set[str] = set()
    for name in ours:
        stem = stem_of(name)
        others = [mask for mask in of_stem[stem] if apart or mask != name]
        near = [] if name in of else _nearest(name, others, alike[stem] == 1)
        if len(near) > 1:
            raise ConfigError(f"{name} has several masks below {where}: {' and '.join(near[:3])}; leave one there")
        if near:
            of[name] = str(where / near[0])
            used.add(near[0])
    if not of:
        raise ConfigError(_nothing(ours, candidates, root, where))
    rest = [name for name in candidates if name not in used and (apart or name not in ours) and not _in(name, inner)]
    return Pairs([n for n in ours if n in of], [of[n] for n in ours if n in of], [n for n in ours if n not in of], rest)


def _nearest(field: str, masks: Sequence[str], alone: bool) -> list[str]:
    """The masks whose folders end most like the field's; where other fields have its name, they must end so."""
    folders = field.split("/")[-2::-1]
    best, found = -1, list[str]()
    for mask in masks:
        theirs = mask.split("/")[-2::-1]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(folders, theirs, strict=False)))
        fits = folders == theirs or 0 < same == min(len(folders), len(theirs))
        if same < best or not (alone or fits):
            continue
        found = [mask] if same > best else [*found, mask]
        best = same
    return found


def stem_of(name: str) -> str:
    """The name of a file without folder and ending, its letters composed."""
    base = composed(posixpath.basename(name))
    return next((base[: -len(end)] for end in _ENDINGS if base.lower().endswith(end)), base)


def cells_of(mask: NDArray[np.integer[Any]]) -> Cells:
    """The cells of a mask (H, W).

    Raises:
        Unreadable: if it does not tell cells apart.
    """
    numbers, compact = _numbered(mask)
    found = ndimage.find_objects(compact)
    count = len(found)
    area, pieces = np.zeros(count, np.int64), np.zeros(count, np.int64)
    centre = np.zeros((count, 2))
    for i, at in enumerate(found):
        own = compact[at] == i + 1
        area[i], pieces[i] = own.sum(), ndimage.label(own, np.ones((3, 3), bool))[1]
        centre[i] = [along.mean() + axis.start + 0.5 for along, axis in zip(np.nonzero(own), at, strict=True)]
    if count == 1 and pieces[0] > 1:
        raise Unreadable(
            f"its one label {numbers[0]} has {pieces[0]} separate parts: it tells cells from background, not from each "
            f"other; number them first (scipy.ndimage.label)"
        )
    box = np.array([(x.start, y.start, x.stop, y.stop) for y, x in found], np.int64).reshape(count, 4)
    high, wide = mask.shape
    border = (box[:, :2] == 0).any(1) | (box[:, 2] == wide) | (box[:, 3] == high)
    return Cells(numbers, area, centre, box, border, pieces)


def _numbered(mask: NDArray[np.integer[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The labels above 0, and the mask with their places from 1 on."""
    if mask.max(initial=0) < _COUNTED:
        numbers = np.flatnonzero(np.bincount(mask.ravel(), minlength=1)[1:]) + 1
        place = np.zeros(int(mask.max(initial=0)) + 1, np.int32)
        place[numbers] = np.arange(1, len(numbers) + 1)
        return numbers, place[mask]
    numbers, inverse = np.unique(mask, return_inverse=True)
    first = int(numbers[0] != 0)
    return numbers[1 - first :].astype(np.int64), (inverse.reshape(mask.shape) + first).astype(np.int32)


def _files(folder: Path) -> Iterator[str]:
    """Paths of files that may be masks, and of OME-Zarr images, below a folder."""
    for where, folders, names in os.walk(folder, followlinks=True):
        below = os.path.relpath(where, folder).replace(os.sep, "/")
        start = "" if below == "." else f"{below}/"
        kept = [name for name in folders if not name.startswith(".") and name.casefold() not in ("@eadir", "__macosx")]
        folders[:] = [name for name in kept if not name.lower().endswith(ZARR)]
        yield from (f"{start}{name}" for name in kept if name.lower().endswith(ZARR))
        yield from (f"{start}{n}" for n in names if n.lower().endswith(_SUFFIXES) and not n.startswith("."))


def _stems(mask: str, apart: bool) -> set[str]:
    """The names of fields that a mask may belong to; in a folder of masks alone also the same name."""
    stem = stem_of(mask)
    out = {stem} if apart else set()
    waiting = [stem]
    while waiting:
        name = waiting.pop()
        shorter = {_AFTER.sub("", name), _BEFORE.sub("", name)} - {name, ""}
        waiting += shorter - out
        out |= shorter
    return out


def _is_mask(name: str, named: dict[str, set[str]], fields: Sequence[str]) -> bool:
    """Whether a file among the fields is the mask of another one."""
    folder = posixpath.dirname(name)
    there = {stem_of(field) for field in fields if posixpath.dirname(field) == folder and field != name}
    return bool(named.get(name, set()) & there)


def _inside_zarr(field: str, root: Path, masks: Path, label: str | None) -> str | None:
    """The labels of an OME-Zarr image, in itself or in that of the same path below the folder of masks."""
    if ZARR not in field.lower():
        return None
    for image in (masks / field, root / field):
        folder = image / "labels"
        if not folder.is_dir():
            continue
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and metadata_file(str(p)) is not None)
        if label is not None and label in names:
            return str(folder / label)
        if label is not None or len(names) > 1:
            asked = "has several labels" if label is None else f"has no labels called {label!r}"
            raise ConfigError(f"{image} {asked}; --label names one of: {', '.join(names) or 'none'}")
        if names:
            return str(folder / names[0])
    return None


def _in(name: str, inner: dict[str, str]) -> bool:
    """Whether a candidate is an OME-Zarr image whose own labels were taken."""
    return any(f"/{name}/" in f"{path}/" for path in inner.values())


def _nothing(fields: Sequence[str], candidates: Sequence[str], root: Path, masks: Path) -> str:
    cellpose = next(masks.glob("**/*_seg.npy"), None)
    if cellpose is not None and not candidates:
        return f"{cellpose} is not read: save cellpose's masks as TIFF or PNG (--save_tif or --save_png)"
    such = f", such as {candidates[0]}" if candidates else ""
    return (
        f"none of the {len(fields)} fields below {root}, such as {fields[0]}, has a mask below {masks} "
        f"({len(candidates)} TIFF, PNG or Zarr files{such}): a mask is called as its field, with _masks, _mask, _seg, "
        f"_cp_masks or _labels after it"
    )
