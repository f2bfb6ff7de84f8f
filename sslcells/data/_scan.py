"""Where in a folder the splits are, and the image files below them."""

import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

from sslcells.config import ConfigError, nearest
from sslcells.storage import is_file, is_folder

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_SHOWN = 10  # names in one message


def is_split(folder: str) -> bool:
    """Whether a folder of this name is taken for a split."""
    return any(folder.casefold() in names for names in _SPLIT_NAMES.values())


def find_root(path: str) -> Path:
    """The folder that data.path names.

    Raises:
        ConfigError: where it is none, with the nearest name that is.
    """
    root = Path(path).expanduser()
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


def find_splits(root: Path, given: dict[str, str | None]) -> dict[str, str]:
    """The sub-folder of each split there is, as `given` or found by its name; "" is the whole folder.

    Raises:
        ConfigError: where a given one is missing, a found one is ambiguous, train is missing, or two overlap.
    """
    present = subfolders(root)
    found: dict[str, str] = {}
    for split, name in given.items():
        if name is not None:
            found[split] = _named_split(root, split, name, present)
            continue
        matches = [folder for folder in present if folder.casefold() in _SPLIT_NAMES[split]]
        if len(matches) > 1:
            raise ConfigError(f"{root} holds {' and '.join(matches)}: say which is meant with data.{split}=")
        if matches:
            found[split] = matches[0]
    if found and "train" not in found:
        raise ConfigError(
            f"{root} holds {', '.join(found.values())} but no folder called train; name it with data.train= "
            f"(there are: {_some(present)})"
        )
    _apart(root, found)
    return found or {"train": ""}


def _named_split(root: Path, split: str, name: str, present: Sequence[str]) -> str:
    if not is_folder(root / name):
        folded = {folder.casefold(): folder for folder in present}
        same = folded.get(name.casefold())
        near = f" (did you mean {same}?)" if same else nearest(name, present)
        raise ConfigError(f"data.{split}={name!r}: {root} has no such sub-folder{near}; there are: {_some(present)}")
    folder = posixpath.normpath(Path(name).as_posix())
    return "" if folder == "." else folder


def _apart(root: Path, folders: dict[str, str]) -> None:
    """Refuse splits that share images: what is measured on them would flatter."""
    real = {split: (root / folder).resolve() for split, folder in folders.items()}
    for outer, outside in real.items():
        for inner, inside in real.items():
            if outer != inner and inside.is_relative_to(outside):
                raise ConfigError(
                    f"the {inner} split, {root / folders[inner]}, lies in the {outer} split, "
                    f"{root / folders[outer]}: they would share images"
                )


def subfolders(folder: Path) -> list[str]:
    """Sorted names of the folders in a folder.

    Raises:
        ConfigError: where it cannot be listed.
    """
    return sorted(name for name, inner in _entries(str(folder)) if inner)


def walk(folder: Path) -> Iterator[str]:
    """Paths of the images below `folder`, relative to it, in the order of the file system; links are followed.

    Asks the file system for directory listings and nothing else, as there may be a million files.

    Raises:
        ConfigError: where a folder cannot be listed.
    """
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        for name, inner in _entries(f"{folder}/{prefix}"):
            if inner:
                waiting.append(f"{prefix}{name}/")
            elif name.lower().endswith(SUFFIXES):
                yield prefix + name


def _entries(folder: str) -> Iterator[tuple[str, bool]]:
    """Names in a folder, and whether each is a folder; without hidden ones and links back up."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    inner = entry.is_dir()
                    if not (inner and entry.is_symlink() and _turns_back(Path(entry.path))):
                        yield entry.name, inner
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be listed: {error.strerror}") from None


def _turns_back(link: Path) -> bool:
    """Whether a link leads to a folder that it lies in."""
    return link.parent.resolve().is_relative_to(link.resolve())


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_SHOWN], *["…"] * (len(names) > _SHOWN)]) or "none"
