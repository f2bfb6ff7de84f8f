"""Finds the image files in a folder."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sslcells.config import ConfigError, nearest
from sslcells.data._decode import ZARR, metadata_file
from sslcells.data._patterns import Patterns
from sslcells.storage import is_file, is_folder
from sslcells.values import place

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
"""of files that are read as images"""
KINDS = (*SUFFIXES, ZARR)
"""and of folders that are images"""

OURS = ".sslcells"
"""Folder beside the images in which sslcells remembers which ones it verified."""

_JUNK = ("@eadir", "__macosx", "thumbnails", "thumbs")


def find_root(path: str) -> Path:
    """The folder that data.path names.

    Raises:
        ConfigError: if it is not a folder; the message has the most similar name.
    """
    root = place(path)
    if is_folder(root):
        return root
    if is_file(root):
        kind = "; data.kind=medmnist reads such a file" if root.suffix == ".npz" else ""
        raise ConfigError(f"data.path={path!r} is a file, not the folder that holds the images{kind}")
    missing = root
    while not is_folder(missing.parent):
        missing = missing.parent
    near = nearest(missing.name, subfolders(missing.parent))
    raise ConfigError(f"data.path={path!r}: {missing.parent} has no folder {missing.name!r}{near}")


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder, without those that are OME-Zarr images.

    Raises:
        ConfigError: if it cannot be listed.
    """
    shown = (entry for entry in _entries(str(folder)) if not _left(entry.name) and not _is_zarr(entry.name))
    found = (entry.name for entry in shown if _is_folder(entry))
    return sorted(name for name in found if not _turns_back(f"{folder}/{name}", [os.path.realpath(folder)]))


def listed(folder: Path) -> list[str]:
    """The names in a folder, of files and folders.

    Raises:
        ConfigError: if it cannot be listed.
    """
    return [entry.name for entry in _entries(str(folder))]


Ignored = dict[str, tuple[int, str]]
"""Kind of file → number of files, and an example."""


EVERY = Patterns()
"""Takes every image."""


class Listing(NamedTuple):
    """The image files in a folder, sorted by relative path, and what was ignored."""

    names: list[str]
    sizes: list[int]
    """bytes; −1 for a broken link"""
    times: list[int]
    """last change in nanoseconds; −1 for a broken link"""
    ignored: Ignored

    def only(self, names: set[str]) -> "Listing":
        """The listing of some of its files."""
        rows = [row for row in zip(self.names, self.sizes, self.times, strict=True) if row[0] in names]
        return Listing([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], {})

    @classmethod
    def of(cls, folder: Path, prefix: str = "", patterns: Patterns = EVERY) -> "Listing":
        """List a folder at any depth; every path starts with `prefix`, and is one that `patterns` takes.

        Raises:
            ConfigError: if a folder cannot be listed.
        """
        ignored: Ignored = {}
        taken = _taken(_walk(folder, ignored), prefix, patterns, ignored)
        files = sorted((f"{prefix}{name}", *_size_and_time(entry)) for name, entry in taken)
        names, sizes, times = zip(*files, strict=True) if files else ((), (), ())
        return cls([*names], [*sizes], [*times], {k: (n, prefix + example) for k, (n, example) in ignored.items()})


def _taken(
    found: Iterable[tuple[str, "os.DirEntry[str]"]], prefix: str, patterns: Patterns, ignored: Ignored
) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """The images that the patterns take; the others are counted in `ignored`."""
    for name, entry in found:
        if patterns and (why := patterns.leaves_out(f"{prefix}{name}")) is not None:
            _count(ignored, why, name)
        else:
            yield name, entry


def walk(folder: Path, prefix: str = "", patterns: Patterns = EVERY) -> Iterator[str]:
    """Relative paths of the images in `folder`, in the order of the file system; links are followed.

    Every file with an image's suffix counts, readable or not. Only directory listings are read, as there may be a
    million files. Only images whose path, `prefix` and the relative one, `patterns` take.

    Raises:
        ConfigError: if a folder cannot be listed.
    """
    return (name for name, _ in _taken(_walk(folder, {}), prefix, patterns, {}))


def _walk(folder: Path, ignored: Ignored) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Like `walk`, with the directory entry of each image; other files are counted in `ignored`."""
    # Each folder comes with the real paths that led to it, one per link, so that circular links are noticed.
    waiting = [("", [os.path.realpath(folder)])]
    while waiting:
        prefix, real = waiting.pop()
        for entry in _entries(f"{folder}/{prefix}"):
            path = prefix + entry.name
            if _hidden(entry.name):
                if entry.name != OURS:
                    _count(ignored, "hidden", path)
            elif _junk(entry.name):
                _count(ignored, "thumbnails, masks and what systems leave", path)
            elif _is_folder(entry) and _is_zarr(entry.name):
                yield from _zarr_images(path, entry)
            elif _is_folder(entry):
                if not entry.is_symlink():
                    waiting.append((f"{path}/", [*real[:-1], f"{real[-1]}/{entry.name}"]))
                elif _turns_back(entry.path, real):
                    _count(ignored, "links back to a folder above", path)
                else:
                    waiting.append((f"{path}/", [*real, os.path.realpath(entry.path)]))
            elif entry.name.lower().endswith(SUFFIXES):
                yield path, entry
            elif entry.is_symlink() and not os.path.exists(entry.path):
                _count(ignored, "broken links", path)
            else:
                _count(ignored, os.path.splitext(entry.name)[1].lower() or "without a suffix", path)


def _zarr_images(path: str, folder: "os.DirEntry[str]") -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """The OME-Zarr images of a folder x.zarr: itself, or those of a plate or a series below it.

    Folders of chunks, of which there may be very many, are not listed, and label images are no images.
    """
    if metadata_file(folder.path) is not None or not _is_group(folder.path):
        yield path, folder  # where it is no image either, reading it says so
        return
    found = False
    waiting = [(path, folder)]
    while waiting:
        prefix, group = waiting.pop()
        for entry in _entries(group.path):
            if _hidden(entry.name) or entry.name in ("labels", "OME") or not _is_folder(entry) or entry.is_symlink():
                continue
            if metadata_file(entry.path) is not None:
                found = True
                yield f"{prefix}/{entry.name}", entry
            elif _is_group(entry.path):
                waiting.append((f"{prefix}/{entry.name}", entry))
    if not found:
        yield path, folder


def _is_group(folder: str) -> bool:
    """True for a Zarr group without an image, by its metadata: a plate, a well, a series; an array is none."""
    if os.path.isfile(f"{folder}/.zgroup"):
        return True
    try:
        with open(f"{folder}/zarr.json", "rb") as file:
            return b'"group"' in file.read(2**20)
    except OSError:
        return False


def _is_zarr(name: str) -> bool:
    return name.lower().endswith(ZARR)


def is_image(name: str) -> bool:
    """True if a file, or a folder of Zarr, of this name is read as an image."""
    return not _hidden(name) and name.lower().endswith(KINDS)


def _count(ignored: Ignored, kind: str, path: str) -> None:
    count, example = ignored.get(kind, (0, path))
    ignored[kind] = count + 1, min(example, path)


def _junk(name: str) -> bool:
    """True for what Synology, macOS and cellpose put beside images, as if it were images."""
    stem = name.casefold().partition(".")[0]
    return name.casefold() in _JUNK or stem.endswith("_masks")


def _left(name: str) -> bool:
    return _hidden(name) or _junk(name)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or without permission: opening it reports the error
        return False


def _size_and_time(entry: "os.DirEntry[str]") -> tuple[int, int]:
    try:
        stat = entry.stat()
        if _is_folder(entry):  # OME-Zarr: its chunks are too many to be looked at
            stat = os.stat(metadata_file(entry.path) or entry.path)
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _entries(folder: str) -> Iterator["os.DirEntry[str]"]:
    """The entries of a folder."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be listed: {error.strerror}") from None


def _turns_back(path: str, real: Sequence[str]) -> bool:
    """True if a link leads to a folder on the way to it (`real`), or to a parent of one."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return any(f"{way}/".startswith(f"{target.rstrip('/')}/") for way in real)
